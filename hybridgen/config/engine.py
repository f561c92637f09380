"""How a model is loaded and run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hybridgen.config.loading import LoadingFields
from hybridgen.config.modes import GraphOwner, Mode
from hybridgen.config.recording import RecordingFields
from hybridgen.config.running import RunningFields
from hybridgen.config.settings import check_compile_cache, check_listener, check_progress, setting, switch
from hybridgen.core import GraphEvent
from hybridgen.errors import ConfigError, shown
from hybridgen.fields import described
from hybridgen.hints import unknown

EQUAL_BITS_ROWS = 8
"""Rows of a step at most with `equal_bits=True`."""


# A dataclass has the fields of its last base first.
@described
@dataclass(frozen=True, kw_only=True)
class EngineConfig(RecordingFields, RunningFields, LoadingFields):
    """How a model is loaded and run; each field is also a keyword of `generate()` and `stream()`.

    Raises:
        ConfigError: a field or a value is unknown, or a value is out of its range.
    """

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

        if self.equal_bits:
            self._check_equal_bits()

    def _check_equal_bits(self) -> None:
        hybrid = self.mode in (Mode.HYBRID, Mode.AUTO)
        if not hybrid or not self.fused_decode or self.graphs is not GraphOwner.MANUAL:
            raise ConfigError(
                f'equal_bits=True with mode="{self.mode}", fused_decode={self.fused_decode}, graphs="{self.graphs}": '
                'it is a fused kernel that has equal bits; use mode="hybrid" and leave the other two out'
            )
        if self.max_batch > EQUAL_BITS_ROWS:
            raise ConfigError(
                f"equal_bits=True with max_batch={self.max_batch}: bits are equal in steps of up to "
                f"{EQUAL_BITS_ROWS} tokens; set max_batch={EQUAL_BITS_ROWS} or less"
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
        if self.quantize_drafter is not None and self.drafter is None:
            raise ConfigError(
                f"quantize_drafter={shown(self.quantize_drafter)} without a drafter; give drafter=, or leave it out"
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
        return Mode(self.mode).on(device_type)

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)
