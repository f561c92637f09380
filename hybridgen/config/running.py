"""How many requests run at once and in what memory, who drafts, and what steps are made of."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from hybridgen.config.settings import (
    check_backend,
    check_drafter,
    check_kv_dtype,
    check_page_size,
    check_quantization,
    check_seconds,
    check_speculation,
    integer,
    parse_bytes,
    setting,
    switch,
)


@dataclass(frozen=True, kw_only=True)
class RunningFields:
    """Fields of `EngineConfig`."""

    max_batch: int = field(
        default=32,
        # What a compiler sees of it is `ResolvedConfig.slots`.
        metadata=setting("Requests that run at once.", integer(1, 4096), in_key=False),
    )
    max_context: int | None = field(
        default=None,
        metadata=setting(
            "Longest prompt plus output, in tokens. Else the model's own limit.", integer(2, optional=True)
        ),
    )
    page_size: int = field(
        default=64, metadata=setting("Tokens per KV-cache page; a power of two from 8 to 256.", check_page_size)
    )
    kv_memory: int | str | None = field(
        default=None,
        metadata=setting(
            'Bytes for the KV cache, or a text such as "4GiB". Else what the device has free, up to what '
            "max_batch requests of max_context tokens can use (at most 1 GiB on a CPU).",
            parse_bytes,
            in_key=False,
        ),
    )
    kv_dtype: str | None = field(
        default=None,
        metadata=setting(
            "`fp8`: keys and values are cached in 8 bits (e4m3), with the scales of the checkpoint where it has some; "
            "half the bytes, twice the tokens. None: in the dtype of the weights. See docs/quantisation.md.",
            check_kv_dtype,
            opens=True,
        ),
    )
    token_budget: int | None = field(
        default=None,
        metadata=setting(
            "Prompt tokens in one prefill call; longer prompts run in chunks. Else 8192 on CUDA, 1024 on a CPU.",
            integer(2, optional=True),
        ),
    )
    prefix_cache: bool = field(
        default=True,
        metadata=setting(
            "Requests whose prompts begin as earlier ones did use the keys and values that those left, in "
            "whole pages. Off for models whose keys depend on a request's length; see docs/usage.md.",
            switch,
            in_key=False,
        ),
    )
    longest_first: bool = field(
        default=True,
        metadata=setting(
            "Of a list that is given at once and not streamed, requests that may generate the most start first, so "
            "that few are left alone at the end. Completions come in the order of the list.",
            switch,
            in_key=False,
        ),
    )
    mixed_steps: bool = field(
        default=False,
        metadata=setting(
            "Of a list that is given at once and not streamed, requests that end long before the others are held back, "
            "and their prompts are fed in rows that decode does not fill, where recorded steps say that this is "
            "faster. See docs/performance.md.",
            switch,
            in_key=False,
        ),
    )
    run_ahead: int | None = field(
        default=None,
        metadata=setting(
            "Decode steps launched before the host reads the last one's tokens: 0 or 1. Else 1 on CUDA, 0 on a CPU.",
            integer(0, 1, optional=True),
            in_key=False,
        ),
    )
    speculation: str | Any | None = field(
        default=None,
        metadata=setting(
            "Draft tokens and check several in one step, which changes no token: `ngram` (what came behind "
            "the same tokens earlier in prompt or output), a drafter of one's own, or None. See "
            "docs/speculation.md.",
            check_speculation,
            in_key=False,
        ),
    )
    tensor_parallel: int = field(
        default=1,
        metadata=setting(
            "Processes that share one model, each with a part of its weights: on CUDA one for each of the first "
            "GPUs, on a CPU on its cores. See docs/scale.md.",
            integer(1, 64),
        ),
    )
    drafter: str | os.PathLike[str] | Any | None = field(
        default=None,
        metadata=setting(
            "A smaller model of the same vocabulary that drafts, which changes no token: a local path, a hub id or a "
            "live module; the path or hub id of an EAGLE-3 head; or `mtp`, the head for multi-token prediction that "
            "the checkpoint carries. Its keys and values lie beside the model's, in the same pages. See "
            "docs/speculation.md.",
            check_drafter,
            in_key=False,
        ),
    )
    quantize_drafter: str | None = field(
        default=None,
        metadata=setting(
            "Quantise the drafter's projections while it is read: a head's `fp8`, a model's `fp8`, `int8` or `int4`. "
            "What it drafts changes no token, and its passes read half the bytes. None: as they are stored.",
            check_quantization,
            in_key=False,
        ),
    )
    fuse_projections: bool = field(
        default=True,
        metadata=setting("Join q/k/v and gate/up weights where the layer allows it (one matrix product each).", switch),
    )
    fused_decode: bool = field(
        default=True,
        metadata=setting(
            "In mode `hybrid` on CUDA: decode small batches of Llama-like models with fused kernels "
            "(`docs/fused-decode.md`) in place of the model's compiled layers.",
            switch,
            in_key=False,
        ),
    )
    equal_bits: bool = field(
        default=False,
        metadata=setting(
            "In mode `hybrid` on CUDA: decode with one kernel, whatever is drafted and however many rows decode, so "
            "that the bits of a token depend on neither. For at most 8 tokens in a step (`max_batch`; drafts are cut "
            "to that), and models that the kernel serves; the others are refused. See docs/speculation.md.",
            switch,
            in_key=False,
        ),
    )
    tune_seconds: float = field(
        default=0.0,
        metadata=setting(
            "Seconds that the fused kernels' tuner may take at warm-up, where its choices for this model "
            "and device are not kept from an earlier start.",
            check_seconds,
            in_key=False,
        ),
    )
    compile_backend: str = field(
        default="inductor",
        metadata=setting("The backend of `torch.compile` in modes `jit` and `hybrid`.", check_backend),
    )
