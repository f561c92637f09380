"""What is measured: something that generates from token ids, and says when each token could be read."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from hybridgen.comparison.data.config import CompareConfig
from hybridgen.comparison.data.results import MODE, SWITCH
from hybridgen.config import EngineConfig, Mode
from hybridgen.core import Completion
from hybridgen.engine import Engine
from hybridgen.errors import RequestError
from hybridgen.graphs.router import FAILED
from hybridgen.loading.checkpoint import Checkpoint, LoadedModel
from hybridgen.params import SamplingParams
from hybridgen.telemetry.statistics import EngineStats, PhaseCounts, hit_rate

GRAPHS = frozenset({"cuda graph", "cudagraph tree", "compiled step", "stand-in"})
"""How a recording is launched: the last part of `StepSummary.kind`."""

_BEHIND_SECONDS = 120
"""Longest wait for what an engine's other process compiles."""


class Output(NamedTuple):
    """What a call brought."""

    tokens: list[list[int]]
    """Generated ids, per prompt."""
    inside: float | None
    """Seconds that its requests took, where the subject says so itself; else the whole call's."""
    times: list[list[float]]
    """Seconds from the request's submission to each token, per prompt; empty where the subject does not say."""


@dataclass
class GraphUse:
    """How the steps of a cell's measured calls ran."""

    pre_captured: int = 0
    """By a graph that was captured at start-up."""
    lazy: int = 0
    """By one that was captured later, while idle."""
    padded: int = 0
    """Of these two, padded to a larger bucket."""
    none: int = 0
    """Without a graph."""
    failed: int = 0
    """Of those without a graph, because its capture failed, was not tried, or it was found wrong."""
    capture_failures: int = 0
    """Captures that failed in its calls, those of warm-up too."""
    phases: dict[str, PhaseCounts] = field(default_factory=dict)
    """Hits, padded hits and misses by phase; empty where nothing is recorded."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Steps by phase, kind and reason."""

    def add(self, before: EngineStats, after: EngineStats) -> None:
        """Count the steps between two snapshots."""
        self.add_failures(before, after)
        for phase, counts in after.graphs.phases.items():
            known = before.graphs.phases.get(phase, PhaseCounts())
            self.phases[phase] = self.phases.get(phase, PhaseCounts()).plus(counts, known)
        held = {_identity(row): row for row in before.graphs.graphs}
        lazy = sum(
            row.hits - (held[_identity(row)].hits if _identity(row) in held else 0)
            for row in after.graphs.graphs
            if row.lazy
        )
        self.lazy += lazy
        for (phase, kind, reason), count in after.steps.items():
            new = count - before.steps.get((phase, kind, reason), 0)
            if not new:
                continue
            self.reasons[f"{phase}, {kind}: {reason}"] += new
            if kind.rpartition(", ")[2] in GRAPHS:
                self.pre_captured += new
                self.padded += new if reason.startswith("padded") else 0
            else:
                self.none += new
                self.failed += new if reason.endswith(FAILED) else 0
        self.pre_captured -= lazy

    def add_failures(self, before: EngineStats, after: EngineStats) -> None:
        """Count the captures that failed between two snapshots."""
        self.capture_failures += after.graphs.capture_failures - before.graphs.capture_failures

    @property
    def hit_rate(self) -> float | None:
        """Share of steps that a graph ran, 0 to 1; None where nothing is recorded."""
        counts = self.phases.values()
        return hit_rate(sum(count.hits for count in counts), sum(count.misses for count in counts))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `hit_rate` of all steps and of each phase."""
        phases = {phase: {**vars(counts), "hit_rate": counts.hit_rate} for phase, counts in self.phases.items()}
        return {**vars(self), "hit_rate": self.hit_rate, "phases": phases, "reasons": dict(self.reasons)}


def _identity(row: Any) -> tuple[Any, ...]:
    return row.phase, row.tokens, row.rows, row.sampling, row.owner, row.lazy


class Subject(Protocol):
    """Something to measure. `call` may raise what it likes: that is reported, and the run goes on."""

    name: str
    kind: str
    """`mode`, `switch` or `baseline`."""

    def call(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Generate so many tokens for each prompt."""

    def settle(self) -> None:
        """What is left to do after warm-up, before anything is measured."""

    def stats(self) -> EngineStats | None:
        """Statistics of an engine; None of a baseline."""

    def close(self) -> None:
        """Free what it holds."""


class EngineSubject:
    """An engine of ours in one mode or variant."""

    def __init__(self, name: str, engine: Engine, config: CompareConfig, build_seconds: float) -> None:
        self.name = name
        self.kind = MODE if name in config.modes else SWITCH
        self.engine = engine
        self.build_seconds = build_seconds
        self._config = config

    def call(self, prompts: list[list[int]], new_tokens: int, *, logprobs: int | None = None) -> Output:
        """Generate; the tokens' times are the engine's own.

        Raises:
            RequestError: a request failed.
        """
        completions = self.completions(prompts, new_tokens, logprobs)
        return Output(
            [list(completion.token_ids) for completion in completions],
            max(completion.timing.total for completion in completions),
            [list(completion.timing.token_times) for completion in completions],
        )

    def completions(self, prompts: list[list[int]], new_tokens: int, logprobs: int | None) -> list[Completion]:
        """The completions of a call, all of which are whole.

        Raises:
            RequestError: one is not.
        """
        config = self._config
        sampling = [
            SamplingParams(
                max_new_tokens=new_tokens,
                temperature=config.temperature,
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                repetition_penalty=1.0,
                ignore_eos=True,
                seed=config.seed + index,
                logprobs=logprobs,
            )
            for index in range(len(prompts))
        ]
        completions: list[Completion] = self.engine.generate(prompts, sampling)
        for completion in completions:
            if completion.error is not None:
                raise completion.error
            if len(completion.token_ids) != new_tokens:
                raise RequestError(f"a request got {len(completion.token_ids)} of {new_tokens} tokens")
        return completions

    def settle(self) -> None:
        """Capture what warm-up missed, so that no measured call ends with a capture; and wait for what is compiled
        behind calls, which are measured as they will be."""
        until = time.monotonic() + _BEHIND_SECONDS
        while True:
            if self.engine.idle():
                continue
            if not self.engine.stats().graphs.behind or time.monotonic() > until:
                return
            time.sleep(0.1)

    def stats(self) -> EngineStats:
        """The engine's."""
        return self.engine.stats()

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


def build(
    name: str, engine_config: EngineConfig, loaded: LoadedModel, config: CompareConfig, cache: str | None
) -> EngineSubject:
    """An engine around a module, whose weights are quantised already where that was asked for.

    Args:
        cache: a directory for an empty Inductor cache of its own; None shares the process's.
    """
    if loaded.owned:
        engine_config = engine_config.replace(quantization=None, quantize_head=None)
    mode = Mode(engine_config.mode)
    alone = cache is not None and mode.compiles and engine_config.compile_backend == "inductor"
    with empty_compile_cache(cache) if alone and cache is not None else contextlib.nullcontext():
        start = time.perf_counter()
        checkpoint = Checkpoint.open(loaded.model, engine_config)
        engine = Engine(checkpoint, loaded, engine_config)
        return EngineSubject(name, engine, config, time.perf_counter() - start)


@contextlib.contextmanager
def empty_compile_cache(folder: str) -> Iterator[None]:
    """Inductor and Triton find nothing compiled inside, and leave what they compile in `folder`.

    The folder has to stay while the compiled code is in use.
    """
    from torch._inductor.utils import fresh_cache

    with fresh_cache(dir=folder, delete=False):
        yield


def compile_something(device: torch.device) -> None:
    """Compile a small function, for what the first compilation of a process costs: imports and worker processes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, empty_compile_cache(folder):
        torch.compile(_small, dynamic=False)(torch.ones(8, device=device))


def _small(x: torch.Tensor) -> torch.Tensor:
    return (x * 2 + 1).sum()
