"""What a comparison runs; the part of a result that a rerun needs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from hybridgen.arguments import check_keywords
from hybridgen.config import EngineConfig, Mode, switch
from hybridgen.errors import ConfigError, shown
from hybridgen.fields import about, described

USUAL_PROMPT = 512
"""Tokens up to which default prefill buckets lie close together, as `graphs.buckets` has it (which imports torch)."""

MODES = ("eager", "jit", "graph", "hybrid")
BASELINES = ("hf-dynamic", "hf-static", "hf-batch", "vllm")
REFERENCE = "eager"
"""The mode that the others' tokens are compared with; it is always run."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "prefill_buckets=[]": {"prefill_buckets": []},
    "decode_buckets=[]": {"decode_buckets": []},
    "mode=graph": {"mode": "graph"},
    "metadata_copy=False": {"metadata_copy": False},
    "double_buffer=False": {"double_buffer": False},
    "run_ahead=0": {"run_ahead": 0},
    "fused_decode=False": {"fused_decode": False},
    "fuse_projections=False, fused_decode=False": {"fuse_projections": False, "fused_decode": False},
    "sample_in_graph=False": {"sample_in_graph": False},
    "lazy_capture=False": {"lazy_capture": False},
    "max_padding_ratio=0": {"max_padding_ratio": 0},
    "speculation=ngram": {"speculation": "ngram"},
}
"""Mode `hybrid` with one switch the other way, or with two where one needs the other: fused decode needs joined
projections. `mode=graph` is it without compilation and without fused decode."""

_OWN_ENGINE_FIELDS = frozenset({"mode", "max_batch", "max_context", "on_graph_event"})
"""Set by the comparison itself, or nothing that a file can hold."""
_NOT_SHARED = {
    "adapter": "its engines share one copy of the weights; merge the adapter and give that checkpoint",
    "tensor_parallel": "its engines share one copy of the weights, in this process; leave it out",
}


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


@described
@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared, and how long. A result holds it, and `hybridgen compare --config` runs it again.

    Raises:
        ConfigError: a value is unknown or out of its range.
    """

    modes: Sequence[str] = field(
        default=MODES,
        metadata=about(
            "Modes of the engine; `eager` is always among them, because the others' tokens are compared with its."
        ),
    )
    prompt_lengths: Sequence[int] = field(
        default=(10, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500), metadata=about("Tokens of a prompt.")
    )
    batch_sizes: Sequence[int] = field(default=(1, 4, 8, 16, 32), metadata=about("Prompts of a call."))
    new_tokens: int = field(
        default=64, metadata=about("Tokens that each prompt gets; end-of-sequence tokens are ignored.")
    )
    temperature: float = field(
        default=0.0,
        metadata=about(
            "0 is greedy. Above it, request i draws with seed `seed + i` in every mode; baselines draw otherwise."
        ),
    )
    baselines: Sequence[str] = field(
        default=(),
        metadata=about(
            "Other engines in the same run: `hf-dynamic`, `hf-static` (Hugging Face `generate` with that "
            "cache), `hf-batch` (`generate_batch`), `vllm` (if it can be imported)."
        ),
    )
    ablate: bool = field(default=False, metadata=about("Also run mode `hybrid` with each switch off alone."))
    budget: float = field(
        default=120.0,
        metadata=about(
            "Seconds of measured calls after which the run ends; start-up, warm-up and checks are not in them."
        ),
    )
    tolerance: float = field(
        default=0.02,
        metadata=about(
            "A cell is done when the confidence intervals of its medians (time of a call, TTFT) are "
            "within this share of them."
        ),
    )
    confidence: float = field(default=0.95, metadata=about("Of these intervals."))
    repeats: int = field(default=50, metadata=about("Measured calls of a cell at most."))
    min_repeats: int = field(
        default=10,
        metadata=about(
            "Measured calls of a cell at least, if the budget allows, however soon its medians are known: "
            "a 99th percentile needs calls too."
        ),
    )
    warm_up: int = field(default=2, metadata=about("Calls of a cell that are not measured."))
    together: bool = field(
        default=True,
        metadata=about(
            "Keep all engines loaded and take their calls in one random order; else one engine after the "
            "other, which needs less memory and does not spread slow changes of the machine evenly."
        ),
    )
    fresh_compile: bool = field(
        default=True,
        metadata=about(
            "Compile each mode from an empty Inductor cache, so that start-up times can be compared; else "
            "a mode finds what an earlier one compiled."
        ),
    )
    utilisation: bool = field(
        default=True,
        metadata=about("Measure on CUDA how busy the device is, in calls of their own under the profiler at the end."),
    )
    seed: int = field(default=0, metadata=about("Of the prompts, the order of the calls, and draws."))
    engine: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=about("Fields of `EngineConfig` for every engine, such as `dtype` or `token_budget`."),
    )

    def __post_init__(self) -> None:
        given = {REFERENCE, *self._names("modes", MODES)}
        object.__setattr__(self, "modes", tuple(mode for mode in MODES if mode in given))
        object.__setattr__(self, "baselines", self._names("baselines", BASELINES))
        object.__setattr__(self, "prompt_lengths", self._sizes("prompt_lengths"))
        object.__setattr__(self, "batch_sizes", self._sizes("batch_sizes"))
        for name, least in (("new_tokens", 1), ("repeats", 1), ("min_repeats", 1), ("warm_up", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={shown(value)}; give an integer of at least {least}")
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("budget", 0.0, math.inf),
            ("tolerance", 0.0, 1.0),
            ("confidence", 0.5, 0.999),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ConfigError(f"{name}={shown(value)}; give a number from {low:g} to {high:g}")
        for each in fields(self):
            if isinstance(each.default, bool):
                switch(each.name, getattr(self, each.name))
        if self.ablate and "hybrid" not in self.modes:
            raise ConfigError("ablate=True switches parts of mode hybrid off; add hybrid to modes")
        self._check_engine()

    def _names(self, name: str, known: Sequence[str]) -> tuple[str, ...]:
        given = getattr(self, name)
        if not isinstance(given, Iterable):
            raise ConfigError(f"{name}={shown(given)}; give a list of: {', '.join(known)}")
        listed = [given] if isinstance(given, str) else list(given)
        for value in listed:
            if value not in known:
                raise ConfigError(f"{name} holds {shown(value)}; choose from: {', '.join(known)}")
        return tuple(str(Mode(value)) if name == "modes" else value for value in dict.fromkeys(listed))

    def _sizes(self, name: str) -> tuple[int, ...]:
        given = getattr(self, name)
        if not isinstance(given, (int, Iterable)):
            raise ConfigError(f"{name}={shown(given)}; give a list of integers of at least 1")
        listed = [given] if isinstance(given, int) else list(given)
        for value in listed:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} holds {shown(value)}; give integers of at least 1")
        if not listed:
            raise ConfigError(f"{name} is empty; give at least one size")
        return tuple(sorted(set(listed)))

    def _check_engine(self) -> None:
        if not isinstance(self.engine, Mapping):
            raise ConfigError(f"engine={shown(self.engine)} is no mapping; give fields of EngineConfig")
        check_keywords(self.engine, EngineConfig.field_names())
        own = sorted(_OWN_ENGINE_FIELDS & set(self.engine))
        if own:
            raise ConfigError(f"{own[0]}= is set by the comparison; leave it out")
        checked = EngineConfig(**{"mode": "hybrid", "max_batch": max(self.batch_sizes), **self.engine})
        for name, why in _NOT_SHARED.items():
            if name in self.engine and getattr(checked, name) != getattr(EngineConfig(), name):
                raise ConfigError(f"{name}={shown(self.engine[name])} is not for a comparison: {why}")
        plain = {name: value if _is_plain(value) else getattr(checked, name) for name, value in self.engine.items()}
        for name, value in plain.items():
            if not _is_plain(value):
                raise ConfigError(
                    f"{name}={shown(value)} is not for a comparison: its result is a file that holds the config; "
                    "give a name or a path"
                )
        object.__setattr__(self, "engine", plain)

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """The engines that are built, by name: the fields of `EngineConfig` that tell them apart."""
        named: dict[str, dict[str, Any]] = {mode: {"mode": mode} for mode in self.modes}
        if self.ablate:
            named |= {f"hybrid, {name}": {"mode": "hybrid", **fields} for name, fields in ABLATIONS.items()}
        return named

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its output."""
        return max(self.prompt_lengths) + self.new_tokens

    def engine_config(self, variant: Mapping[str, Any], limit: int) -> EngineConfig:
        """The config of one engine: as large a batch as the cells need, and a context that holds them and every
        default prefill bucket, so that several engines fit beside each other and have their usual graphs.

        Args:
            limit: the longest context of the model.

        Raises:
            ConfigError: the fields do not go together.
        """
        usual: dict[str, Any] = {
            "max_batch": max(self.batch_sizes),
            "max_context": max(self.longest, min(limit, USUAL_PROMPT + self.new_tokens)),
            "capture_after": 1,  # what warm-up misses is captured before anything is measured
            "progress": False,
            "prefix_cache": False,  # the same prompts come again and again, and their prefill is what is measured
        }
        if self.fresh_compile:  # else a second run would find what the first one compiled, and what was hot in it
            usual["compile_cache"] = False
        return EngineConfig(**{**usual, **self.engine, **variant})

    def replace(self, **changes: Any) -> CompareConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def field_names(cls) -> frozenset[str]:
        """The names of the fields."""
        return frozenset(f.name for f in fields(cls))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> CompareConfig:
        """The config that `as_dict()` wrote.

        Raises:
            ConfigError: a name or a value is unknown.
        """
        check_keywords(values, cls.field_names())
        return cls(**values)


SMOKE = CompareConfig(
    prompt_lengths=(10, 40),
    batch_sizes=(1, 4),
    new_tokens=12,
    baselines=("hf-dynamic", "hf-static"),
    budget=10.0,
    repeats=12,
    warm_up=1,
    engine={"dtype": "float32", "page_size": 16, "decode_buckets": [1, 4], "prefill_buckets": [16, 64, 160]},
)
"""What `hybridgen compare --smoke` runs: all modes in under two minutes on two cores."""
