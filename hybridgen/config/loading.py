"""The mode, and how a model is found and read."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybridgen.config.modes import Mode
from hybridgen.config.settings import (
    check_adapter,
    check_device,
    check_dtype,
    check_quantization,
    check_revision,
    one_of,
    setting,
    switch,
)


@dataclass(frozen=True, kw_only=True)
class LoadingFields:
    """Fields of `EngineConfig`."""

    mode: Mode | str = field(
        default=Mode.AUTO,
        metadata=setting(
            "`eager`, `jit`, `graph`, `hybrid`, or `auto`: `hybrid` on CUDA; on a CPU `hybrid` whose start and first "
            "call are those of `eager`, or `eager` (docs/modes.md).",
            one_of(Mode),
        ),
    )
    dtype: str = field(
        default="auto",
        metadata=setting(
            "`auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.", check_dtype, in_key=False, opens=True
        ),
    )
    quantization: str | None = field(
        default=None,
        metadata=setting(
            "Quantise the projections of a checkpoint while it is read: `fp8`, `int8` or `int4`, by rounding to the "
            "nearest (docs/quantisation.md). None: as the checkpoint has them; one that is quantised needs no setting.",
            check_quantization,
            opens=True,
        ),
    )
    quantize_head: str | None = field(
        default=None,
        metadata=setting(
            "Quantise the head too, in one of the same formats; also of a quantised checkpoint, whose head mostly "
            "has 16 bits.",
            check_quantization,
            opens=True,
        ),
    )
    fp8_activations: bool = field(
        default=False,
        metadata=setting(
            "Round activations to FP8 too, a row by a scale of its own, where FP8 weights multiply more than 256 rows: "
            "prefill and large batches (docs/quantisation.md).",
            switch,
        ),
    )
    device: str = field(
        default="auto",
        metadata=setting(
            "`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.", check_device, in_key=False, opens=True
        ),
    )
    revision: str | None = field(
        default=None,
        metadata=setting("Branch, tag or commit of a hub model.", check_revision, in_key=False, opens=True),
    )
    adapter: str | None = field(
        default=None,
        metadata=setting(
            "A directory or hub id of a PEFT adapter, which is merged into the weights (extra `lora`); see "
            "`Engine.set_adapter`.",
            check_adapter,
            in_key=False,
        ),
    )
    merge_adapters: bool = field(
        default=True,
        metadata=setting(
            "Merge the adapters of a live PEFT model into copies of the weights that they change, made anew at each "
            "call; off: they run as modules in the layers, without copies.",
            switch,
            in_key=False,
        ),
    )
    trust_remote_code: bool = field(
        default=False,
        metadata=setting(
            "Run Python code that a checkpoint brings; reaches config, tokenizer and model alike.",
            switch,
            in_key=False,
            opens=True,
        ),
    )
    allow_pickle: bool = field(
        default=False,
        metadata=setting(
            "Also read `.bin` weights, whose loading can run code; safetensors only otherwise.",
            switch,
            in_key=False,
            opens=True,
        ),
    )
    local_files_only: bool = field(
        default=False,
        metadata=setting("Never ask the hub; use what its cache holds.", switch, in_key=False, opens=True),
    )
