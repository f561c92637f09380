"""An engine put together around a loaded model, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridgen.cache import KVScales
from hybridgen.compilation.store.session import CompileCache
from hybridgen.config import EngineConfig, ResolvedConfig
from hybridgen.engine.builder import Builder, Built
from hybridgen.engine.drafter import LoadedDrafter, Opened, load_drafter, open_drafter
from hybridgen.engine.ready import device_of, make_ready
from hybridgen.engine.warm_start import Starter, Startup
from hybridgen.errors import ConfigError
from hybridgen.loading import Checkpoint, LoadedModel
from hybridgen.loading.adapters import Adapters
from hybridgen.models import BoundModel
from hybridgen.models.quantised import round_activations
from hybridgen.parallel.lead import Lead
from hybridgen.telemetry import import_time
from hybridgen.telemetry.statistics import Counters, FormatRow
from hybridgen.telemetry.traffic import formats_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    checkpoint: Checkpoint
    config: EngineConfig
    resolved: ResolvedConfig
    counters: Counters
    startup: Startup
    starter: Starter
    built: Built
    adapters: Adapters | None
    """None for a live module, whose owner merges adapters."""
    drafter: LoadedDrafter | None
    kv_scales: Mapping[str, KVScales]
    """Of cached keys and values, by the names of attention modules."""
    formats: Mapping[str, FormatRow]
    """What the weights are stored as, by format."""

    def keep_plan(self) -> None:
        """Note for the next process what was recorded."""
        self.starter.keep_plan(self.built.runner)


def assemble(
    checkpoint: Checkpoint,
    loaded: LoadedModel,
    config: EngineConfig,
    resolved: ResolvedConfig,
    cache: CompileCache,
    counters: Counters,
    undo: ExitStack,
    lead: Lead | None = None,
    drafter: Opened | None = None,
) -> Parts:
    """Make a loaded model ready, and build what runs it.

    Args:
        undo: gets what frees the device again, so that a failure leaves nothing behind.
        lead: the group of processes that have the model's other parts.
        drafter: what `open_drafter()` gave before the weights were read; None opens it here, if there is one.
    """
    for note, count in loaded.notes.items():
        counters.fall_back(note, count)
    startup = Startup(import_time.take_seconds(), loaded.seconds, opening=checkpoint.seconds)
    startup.add("artifacts", cache.seconds)
    # Its reason is found before the group is closed.
    with nullcontext() if lead is None else lead.together():
        bound, twin = make_ready(
            checkpoint,
            loaded,
            config,
            resolved,
            undo,
            fusing=startup.timed("fuse projections"),
            fall_back=counters.fall_back,
        )
        if config.fp8_activations:
            _round_activations(bound.model, checkpoint.name, counters)
        starter = Starter(cache, startup, counters)
        builder = Builder(checkpoint, config, resolved, starter, startup, counters, loaded.kv_scales, lead)
        with device_of(checkpoint.device):
            opened = drafter or open_drafter(checkpoint, config, resolved)
            its_drafter = _load_drafter(opened, bound, builder, undo)
            built = builder.build(bound, undo, twin, its_drafter)
    if twin is not None:
        twin.settle()
    return Parts(
        checkpoint,
        config,
        resolved,
        counters,
        startup,
        starter,
        built,
        adapters=None if twin is not None else Adapters(bound.model),
        drafter=its_drafter,
        kv_scales=loaded.kv_scales,
        formats=formats_of(bound.model, bound.weights),
    )


def _round_activations(model: PreTrainedModel, name: str, counters: Counters) -> None:
    count, others = round_activations(model)
    if not count:
        raise ConfigError(
            f"fp8_activations=True: no projection of {name!r} has FP8 weights with a scale for "
            f"each output ({', '.join(others) or 'none is quantised'}); give quantization='fp8' or such a "
            "checkpoint, or leave it out"
        )
    for note, number in others.items():
        counters.fall_back(note, number)


def _load_drafter(opened: Opened | None, bound: BoundModel, builder: Builder, undo: ExitStack) -> LoadedDrafter | None:
    if opened is None:
        return None
    found = load_drafter(opened, builder.checkpoint, bound, builder.config, builder.resolved, undo)
    builder.startup.add("drafter", found.seconds)
    for note, count in found.notes.items():
        builder.counters.fall_back(note, count)
    return found
