"""How a model is loaded and run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple

from hybridgen.core import GraphEvent
from hybridgen.errors import ConfigError, shown
from hybridgen.fields import described
from hybridgen.hints import unknown
from hybridgen.settings import (
    check_adapter,
    check_backend,
    check_buckets,
    check_compile_cache,
    check_device,
    check_drafter,
    check_dtype,
    check_kv_dtype,
    check_listener,
    check_page_size,
    check_progress,
    check_quantization,
    check_ratio,
    check_revision,
    check_seconds,
    check_speculation,
    integer,
    one_of,
    parse_bytes,
    setting,
    switch,
)


class Mode(StrEnum):
    """How the steps of the model run."""

    EAGER = "eager"
    """PyTorch operators, one at a time."""
    JIT = "jit"
    """The decoder layer compiled with `torch.compile`; dynamic sizes; no graphs."""
    GRAPH = "graph"
    """PyTorch's own kernels, recorded in CUDA graphs of decode batches and prompt lengths."""
    HYBRID = "hybrid"
    """The compiled layer, recorded in CUDA graphs."""
    AUTO = "auto"
    """`hybrid` on CUDA. On a CPU what has been compiled, while the rest is compiled behind; see docs/modes.md."""

    @property
    def compiles(self) -> bool:
        """Whether the decoder layer is compiled."""
        return self in (Mode.JIT, Mode.HYBRID)

    @property
    def records(self) -> bool:
        """Whether steps are recorded."""
        return self in (Mode.GRAPH, Mode.HYBRID)

    def on(self, device_type: str) -> Mode:
        """The mode that runs on such a device: what `auto` stands for, else itself. For `auto` on a CPU, where nothing
        can be compiled behind (`compilation.store.session.mode_of`)."""
        if self is not Mode.AUTO:
            return self
        return Mode.HYBRID if device_type == "cuda" else Mode.EAGER


class GraphOwner(StrEnum):
    """Who records and replays steps on CUDA."""

    MANUAL = "manual"
    """Captured by hand into one pool: buckets with padding."""
    TREES = "trees"
    """Inductor's cudagraph trees: the whole step compiled with `mode="reduce-overhead"`."""
    BOTH = "both"
    """By hand for the buckets; trees for decode sizes between them, recorded while idle."""


@described
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is loaded and run; each field is also a keyword of `generate()` and `stream()`.

    Raises:
        ConfigError: a field or a value is unknown, or a value is out of its range.
    """

    mode: Mode | str = field(
        default=Mode.AUTO,
        metadata=setting(
            "`eager`, `jit`, `graph`, `hybrid`, or `auto`: `hybrid` on CUDA (`graph` with `tensor_parallel`); on a CPU "
            "`hybrid` whose start and first call are those of `eager`, or `eager` (docs/modes.md).",
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
            "GPUs, on a CPU on its cores. In modes `eager` and `graph`. See docs/scale.md.",
            integer(1, 64),
        ),
    )
    drafter: str | os.PathLike[str] | Any | None = field(
        default=None,
        metadata=setting(
            "A smaller model of the same vocabulary that drafts, which changes no token: a local path, a hub id or a "
            "live module; or the path or hub id of an EAGLE-3 head. Its keys and values lie beside the model's, in the "
            "same pages. See docs/speculation.md.",
            check_drafter,
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
    graphs: GraphOwner | str = field(
        default=GraphOwner.MANUAL,
        metadata=setting(
            "Who records steps in modes `graph` and `hybrid`: `manual`, or in `hybrid` also `trees` or `both`.",
            one_of(GraphOwner),
        ),
    )
    decode_buckets: Sequence[int] | None = field(
        default=None,
        metadata=setting(
            "Batch sizes of decode graphs; other sizes are padded to the next. An empty list: decode is "
            "not recorded. Else 1, 2, 4, 8, then steps of 8 to 64 and of 16 above, up to max_batch.",
            check_buckets,
            in_key=False,
        ),
    )
    prefill_buckets: Sequence[int] | None = field(
        default=None,
        metadata=setting(
            "Prompt lengths of prefill graphs. An empty list: prefill is not recorded. Else steps of 16 "
            "to 256 and of 32 to 512.",
            check_buckets,
            in_key=False,
        ),
    )
    capture_at_start: bool = field(
        default=True,
        metadata=setting(
            "Record all buckets for greedy decoding and for the model's own sampling at warm-up; else "
            "only while idle. Where the compile cache knows what earlier processes used, that alone is "
            "recorded at warm-up, and all sizes of `decode_buckets` and `prefill_buckets` where they are "
            "given; everything is with `lazy_capture=False`.",
            switch,
            in_key=False,
        ),
    )
    lazy_capture: bool = field(
        default=True,
        metadata=setting(
            "Record what was missing when nothing runs: at the end of a call, one graph per call.", switch, in_key=False
        ),
    )
    capture_after: int = field(
        default=3,
        metadata=setting(
            "Steps that a missing graph must have been wanted for before it is recorded.", integer(1), in_key=False
        ),
    )
    sample_in_graph: bool = field(
        default=True,
        metadata=setting(
            "Record sampling and the step's end too. Else, and for sampling that no graph has, a graph "
            "ends at the logits.",
            switch,
        ),
    )
    max_graphs: int = field(
        default=128,
        metadata=setting(
            "Graphs that are kept; the least recently used is dropped before another is captured.",
            integer(1),
            in_key=False,
        ),
    )
    max_graph_memory: int | str | None = field(
        default=None,
        metadata=setting(
            'Bytes that the captures of the graphs kept may have taken, or a text such as "512MiB"; above '
            "it the least recently used is dropped. Graphs share a pool of memory: what one took from it "
            "is for the others when it is dropped. With the last graph the pool goes, and its memory goes "
            "back to the device.",
            parse_bytes,
            in_key=False,
        ),
    )
    max_padding_ratio: float | None = field(
        default=None,
        metadata=setting(
            "Padding to a bucket up to this share of a step's size (1 doubles it). Else what the measured times say.",
            check_ratio,
            in_key=False,
        ),
    )
    validate: bool = field(
        default=False,
        metadata=setting(
            "Compare the first replay of each graph with the step run without it, bit for bit; a graph "
            "that differs is not used.",
            switch,
            in_key=False,
        ),
    )
    check_addresses: bool = field(
        default=False,
        metadata=setting(
            "Before each replay, check that no tensor that it reads has moved (for debugging; costs time).",
            switch,
            in_key=False,
        ),
    )
    metadata_copy: bool = field(
        default=True,
        metadata=setting(
            "Copy a step's metadata in one launch (`hybridgen::copy_metadata`); else tensor by tensor.", switch
        ),
    )
    double_buffer: bool = field(
        default=True,
        metadata=setting(
            "Two host blocks of metadata in turn, so that the next is filled while one is copied; else one.",
            switch,
            in_key=False,
        ),
    )
    compile_cache: bool | str | os.PathLike[str] = field(
        default=True,
        metadata=setting(
            "Keep what is compiled and measured for later processes: a directory, or True for "
            "`$HYBRIDGEN_CACHE_DIR`, the checkout's `compile_cache/` or the user's cache directory; False "
            "keeps nothing. See docs/compile-cache.md.",
            check_compile_cache,
            in_key=False,
        ),
    )
    offline_compile: bool = field(
        default=False,
        metadata=setting(
            "Compile nothing: raise `CacheMissError` where the cache lacks something, at start where it "
            "can be known there.",
            switch,
            in_key=False,
        ),
    )
    on_graph_event: Callable[[GraphEvent], None] | None = field(
        default=None, metadata=setting("Called with each capture, eviction and failure.", check_listener, in_key=False)
    )
    progress: bool | None = field(
        default=None,
        metadata=setting(
            "Progress bars over one second: on, off, or (None) on when standard error is a terminal.",
            check_progress,
            in_key=False,
            opens=True,
        ),
    )

    def __new__(cls, *_: Any, **given: Any) -> EngineConfig:
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise ConfigError(unknown(name, cls.field_names()))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, each.metadata["check"](each.name, getattr(self, each.name)))
        self._check_recording()
        if self.decode_buckets and self.decode_buckets[-1] > self.max_batch:
            raise ConfigError(
                f"decode_buckets holds {self.decode_buckets[-1]}, above max_batch={self.max_batch}; raise max_batch or "
                "leave it out"
            )
        if self.offline_compile and self.compile_cache is False:
            raise ConfigError("offline_compile=True with compile_cache=False: nothing could ever run; set one of them")
        if self.offline_compile and self.graphs is not GraphOwner.MANUAL:
            raise ConfigError(
                f'offline_compile=True with graphs="{self.graphs}": trees compile whole steps, and the cache keeps '
                'layers; use graphs="manual"'
            )

    def _check_recording(self) -> None:
        if self.graphs is not GraphOwner.MANUAL and self.mode not in (Mode.HYBRID, Mode.AUTO):
            raise ConfigError(
                f'graphs="{self.graphs}" with mode="{self.mode}": trees record compiled steps; use mode="hybrid"'
            )
        if self.graphs is not GraphOwner.MANUAL and self.compile_backend != "inductor":
            raise ConfigError(
                f'graphs="{self.graphs}" with compile_backend={shown(self.compile_backend)}: trees are Inductor\'s; '
                'leave compile_backend at "inductor"'
            )
        if self.speculation is not None and self.drafter is not None:
            raise ConfigError(
                f"speculation={shown(self.speculation)} and drafter={shown(self.drafter)}: one of them drafts; leave "
                "the other out"
            )
        if self.graphs is not GraphOwner.MANUAL and self.drafts:
            raise ConfigError(
                f'graphs="{self.graphs}" with {self.drafts}: trees record steps of one token a row; use graphs="manual"'
            )
        if not self.capture_at_start and not self.lazy_capture and self.mode in (Mode.GRAPH, Mode.HYBRID):
            raise ConfigError(
                f'mode="{self.mode}" with capture_at_start=False and lazy_capture=False records nothing; set one of '
                'them, or use mode="eager" or "jit"'
            )

    @property
    def drafts(self) -> str:
        """The field that says who drafts, with its value, in words; empty where nobody does."""
        given = {"speculation": self.speculation, "drafter": self.drafter}
        return next((f"{name}={shown(value)}" for name, value in given.items() if value is not None), "")

    @classmethod
    def field_names(cls) -> frozenset[str]:
        """The names that `generate()` accepts as keywords for loading and running."""
        return frozenset(f.name for f in fields(cls))

    @classmethod
    def key_fields(cls) -> tuple[str, ...]:
        """The names of the fields that are in the compile cache's key as they are."""
        return tuple(f.name for f in fields(cls) if f.metadata["in_key"])

    @classmethod
    def opening_fields(cls) -> tuple[str, ...]:
        """The names of the fields that say how a checkpoint is opened."""
        return tuple(f.name for f in fields(cls) if f.metadata["opens"])

    @classmethod
    def of(cls, config: EngineConfig | None, fields: Mapping[str, Any]) -> EngineConfig:
        """What a call's `config=` and single fields amount to; None is the default config.

        Args:
            fields: values that replace those of `config`; the names must be `field_names()`.

        Raises:
            ConfigError: `config` is something else, or a value is unknown or out of its range.
        """
        if config is None:
            config = cls()
        if not isinstance(config, EngineConfig):
            raise ConfigError(
                f"config={shown(config)} is not an EngineConfig; give EngineConfig(mode=...), or its fields as keywords"
            )
        return config.replace(**fields)

    def mode_on(self, device_type: str) -> Mode:
        """The mode that runs on such a device: what `auto` stands for, else the one given."""
        if self.mode is Mode.AUTO and self.tensor_parallel > 1:
            return Mode.GRAPH if device_type == "cuda" else Mode.EAGER
        return Mode(self.mode).on(device_type)

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)


class ResolvedConfig(NamedTuple):
    """What an `EngineConfig` leaves open, decided for one model on one device."""

    mode: Mode
    """How steps run; never `auto`."""
    max_context: int
    """Tokens of a request at most, its prompt and its output together."""
    token_budget: int
    """Prompt tokens of one prefill call at most."""
    query_len: int = 1
    """Tokens of a row in a decode step at most: above 1 where drafts are checked."""
    slots: int = 32
    """Requests that the step's buffers have room for; at least `max_batch`. Compiled code knows it."""

    @property
    def max_tokens(self) -> int:
        """Tokens of any prefill call at most: one request's, or the budget."""
        return min(self.token_budget, self.max_context)


def bar_disabled(progress: bool | None) -> bool | None:
    """tqdm's `disable` for a `progress`: None switches a bar off where standard error is no terminal."""
    return None if progress is None else not progress
