"""Bytes that a decode step must read, and what share of the memory's speed that is (MBU).

Model bandwidth utilisation: achieved bandwidth over the device's own, for the bytes that cannot be avoided: the weights
once a step, and the keys and values of every row's context (Databricks, "LLM inference performance engineering", 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from hybridgen.cache import LayerState
from hybridgen.cache.state import bytes_per_slot
from hybridgen.models import BoundModel
from hybridgen.models.binding import paged
from hybridgen.models.packed_experts import PackedExperts
from hybridgen.models.weights import WeightError, WeightProvider
from hybridgen.telemetry.statistics import DecodeStats, FormatRow


@dataclass(frozen=True)
class Traffic:
    """What decode steps of a model read."""

    weights: int
    """Bytes of weights that a step reads, whatever its rows are; 0 where that depends on the tokens (experts)."""
    cache: tuple[tuple[int, int], ...]
    """(window, bytes of keys and values per position) of all layers with that window together; 0 is no window."""
    ceiling: float | None
    """Bytes per second that the device reads at best (`kernels.read_ceiling`); None where that is not known."""
    states: int = 0
    """Bytes of the states that a row's layers keep whatever its length."""

    def step_bytes(self, rows: int, positions: float) -> float:
        """Bytes of a step.

        Args:
            positions: cached positions of a row, on average.
        """
        context = sum(each * (min(positions, window) if window else positions) for window, each in self.cache)
        return self.weights + rows * (context + self.states)

    def bandwidth(self, rows: int, positions: float, seconds: float) -> float | None:
        """Bytes per second of steps that take this long; None where the bytes are not known."""
        return self.step_bytes(rows, positions) / seconds if self.weights and seconds > 0 else None

    def mbu(self, bandwidth: float | None) -> float | None:
        """Share of the ceiling; None where one of them is not known."""
        return bandwidth / self.ceiling if self.ceiling and bandwidth is not None else None


def traffic_of(bound: BoundModel, states: Sequence[LayerState], ceiling: float | None) -> Traffic:
    """Count a model's bytes: all its weights but the embedding table, of which a step reads a row per token.

    A tied embedding is the head's weight too, and counts.

    Args:
        states: what its layers keep, as `BoundModel.layer_states()` gives it.
    """
    model = bound.model
    weights = 0 if _has_experts(model.modules()) else _bytes(model, bound.weights, model.get_input_embeddings())
    cache: dict[int, int] = {}
    for site, state in zip(bound.sites, paged(states), strict=True):
        # Within its chunk a row sees between one position and all: half of them on average.
        window = site.sees.window or site.sees.chunk // 2
        cache[window] = cache.get(window, 0) + state.bytes_per_position
    # A slot has two places for each state, of which a step reads one.
    return Traffic(weights, tuple(cache.items()), ceiling, bytes_per_slot(states) // 2)


def _bytes(model: nn.Module, weights: WeightProvider, skipped: nn.Module | None) -> int:
    """Bytes of projections as their weights say, and of the parameters of everything else."""
    total = 0
    counted: set[int] = set()  # where tensors begin: modules may share them
    for name, module in model.named_modules():
        if module is skipped:
            continue
        try:
            weight = weights.get((name,))
        except WeightError:
            pass
        else:
            stored = {tensor.data_ptr() for tensor in weight.tensors().values()}
            total += 0 if stored <= counted else weight.bytes_read
            counted |= stored
        for parameter in module.parameters(recurse=False):
            if parameter.data_ptr() not in counted:
                counted.add(parameter.data_ptr())
                total += parameter.numel() * parameter.element_size()
    return total


def formats_of(model: nn.Module, weights: WeightProvider) -> dict[str, FormatRow]:
    """How the weights of a model's projections are stored: those in the format that most have, first."""
    counts: dict[str, list[int]] = {}
    errors: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            form, found = module.format, (module.projections, module.bytes_stored, module.values)
        else:
            try:
                weight = weights.get((name,))
            except WeightError:
                continue
            form, found = str(weight.format), (1, weight.bytes_read, math.prod(weight.shape))
        count = counts.setdefault(form, [0, 0, 0])
        for place, value in enumerate(found):
            count[place] += value
        error = getattr(module, "error", None)
        if isinstance(error, float):
            errors.setdefault(form, []).append(error)
    ordered = sorted(counts.items(), key=lambda item: -item[1][0])
    return {
        name: FormatRow(number, 8 * size / values, math.hypot(*known) / len(known) ** 0.5 if known else None)
        for name, (number, size, values) in ordered
        for known in (errors.get(name, []),)
    }


def _has_experts(modules: Iterable[nn.Module]) -> bool:
    return any(hasattr(module, "experts") for module in modules)


class DecodeMeter:
    """Adds up decode steps that followed each other: their time, tokens and bytes."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.steps = 0
        self.seconds = 0.0
        self.bytes = 0.0
        self._last: float | None = None

    def step(self, rows: int, positions: int, now: float) -> None:
        """A decode step was read.

        Args:
            positions: cached positions of all its rows together.
            now: by `time.perf_counter()`.
        """
        if self._last is not None:
            self.steps += 1
            self.seconds += now - self._last
            self.bytes += self.traffic.step_bytes(rows, positions / rows)
        self._last = now

    def pause(self) -> None:
        """Another call ran, so the time until the next decode step is read is not that step's alone."""
        self._last = None

    def stats(self) -> DecodeStats:
        """How fast the steps read memory."""
        bandwidth = self.bytes / self.seconds if self.traffic.weights and self.seconds else None
        return DecodeStats(
            steps=self.steps,
            seconds=self.seconds,
            read_bandwidth=bandwidth,
            ceiling=self.traffic.ceiling,
            mbu=self.traffic.mbu(bandwidth),
        )
