"""What comes out of a comparison, as plain values; `comparison.results` adds tables and files to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from hybridgen.comparison.data.config import CompareConfig
from hybridgen.comparison.data.statistics import Agreement, Summary
from hybridgen.errors import ConfigError, shown
from hybridgen.fields import about, described

SCHEMA = 1
"""Of the JSON; raised when the meaning of a field changes."""

OK, FAILED, OUT_OF_MEMORY, NOT_MEASURED = "ok", "failed", "out of memory", "not measured"
MODE, SWITCH, BASELINE = "mode", "switch", "baseline"
"""Kinds of subjects."""


@described
@dataclass(kw_only=True)
class CellResult:
    """One subject at one prompt length and batch size. Times are in seconds, sizes in bytes."""

    subject: str = field(metadata=about("The mode, switch or baseline."))
    prompt_length: int = field(metadata=about("Tokens of each prompt."))
    batch_size: int = field(metadata=about("Prompts of a call."))
    status: str = field(default=OK, metadata=about("`ok`, `failed`, `out of memory` or `not measured`."))
    error: str | None = field(default=None, metadata=about("Why not `ok`."))
    repeats: int = field(default=0, metadata=about("Measured calls."))
    stopped: str | None = field(
        default=None,
        metadata=about(
            "What ended its repeats: `interval` (within the tolerance), `repeats`, `budget` or `interrupted`."
        ),
    )
    wall: Summary | None = field(default=None, metadata=about("Of whole calls."))
    ttft: Summary | None = field(
        default=None, metadata=about("Time to first token, of every request; the interval is of the calls' medians.")
    )
    tpot: Summary | None = field(default=None, metadata=about("Time per output token after the first, of every token."))
    tokens_per_s: float | None = field(
        default=None, metadata=about("Generated tokens of a call over its median time, prefill included.")
    )
    cpu_per_step: float | None = field(
        default=None,
        metadata=about(
            "CPU seconds of the process per step, all threads; a step generates one token for each request."
        ),
    )
    cpu_utilisation: float | None = field(
        default=None,
        metadata=about(
            "CPU seconds of the process, all threads, over the wall seconds of its calls: 1 is one busy core."
        ),
    )
    gpu_utilisation: float | None = field(default=None, metadata=about("Share of a call in which the device was busy."))
    memory: int | None = field(
        default=None,
        metadata=about(
            "Device memory: the weights, what the engine took at start-up, and the peak of a call above "
            "that. On a CPU the same of the process's resident memory (RSS), what warm-up left taken "
            "included."
        ),
    )
    mbu: float | None = field(
        default=None,
        metadata=about(
            "Model bandwidth utilisation of decode: bytes that a step has to read, over the median TPOT "
            "and the read ceiling."
        ),
    )
    graphs: Mapping[str, Any] | None = field(
        default=None,
        metadata=about(
            "`pre_captured`, `lazy`, `padded`, `none`, `failed` steps, `hit_rate`, `capture_failures`, "
            "counts by `phases`, and steps by `reasons`; None for a baseline."
        ),
    )
    agreement: Agreement | None = field(
        default=None, metadata=about("With mode eager's tokens, in the call that agreed least.")
    )
    logit_error: float | None = field(
        default=None, metadata=about("Largest difference to mode eager's log-probabilities, see `checks`.")
    )
    walls: list[float] = field(default_factory=list, metadata=about("The calls, in order."))
    ttfts: list[float] = field(default_factory=list, metadata=about("Their median TTFTs."))


@described
@dataclass(kw_only=True)
class SubjectResult:
    """One subject as a whole."""

    name: str = field(metadata=about("As in `CellResult.subject`."))
    kind: str = field(metadata=about("`mode`, `switch` (mode hybrid with one part off) or `baseline`."))
    status: str = field(default=OK, metadata=about("`ok`, `failed`, `out of memory` or `not measured`."))
    error: str | None = field(default=None, metadata=about("Why not `ok`."))
    startup: dict[str, float] = field(
        default_factory=dict,
        metadata=about(
            "Seconds by part. Weights are read and joined once, and stand in every row. `first calls` is "
            "by how much the first calls of its cells were longer than the median ones."
        ),
    )
    compile_cache: str | None = field(
        default=None,
        metadata=about(
            "`empty` or `shared`: what Inductor found at start-up; None where nothing is compiled at start-up."
        ),
    )
    cache_bytes: int | None = field(default=None, metadata=about("The KV cache."))
    graph_bytes: int | None = field(default=None, metadata=about("Device memory that captures took."))
    captured: int | None = field(default=None, metadata=about("Graphs at the end."))
    lazy_captures: int | None = field(default=None, metadata=about("Those of them that were captured while idle."))
    failures: dict[str, str] = field(default_factory=dict, metadata=about("Captures that failed."))
    fallbacks: dict[str, int] = field(default_factory=dict, metadata=about("What ran another way than asked for."))
    late_compiles: int | None = field(default=None, metadata=about("Functions compiled after warm-up."))


@described
@dataclass(kw_only=True)
class ComparisonData:
    """All that is known of a comparison."""

    config: CompareConfig = field(metadata=about("What was run."))
    model: str = field(metadata=about("Its name for readers."))
    source: str | None = field(
        metadata=about("The path or hub id that a rerun loads; None for the demo model, and for a module in memory.")
    )
    live: bool = field(metadata=about("Whether the model was a module in memory; a rerun has to be given it again."))
    dtype: str = field(metadata=about("Of the weights."))
    device: str = field(metadata=about("Where it ran."))
    subjects: list[SubjectResult] = field(metadata=about("Modes, switches and baselines, each as a whole."))
    cells: list[CellResult] = field(metadata=about("A result for each subject, prompt length and batch size."))
    provenance: dict[str, Any] = field(metadata=about("The machine, the versions, the commit and the command."))
    read_ceiling: float | None = field(
        default=None,
        metadata=about("Bytes per second that the device's memory was measured to be read at; None on a CPU."),
    )
    notes: list[str] = field(
        default_factory=list, metadata=about("What a reader has to know: why something is missing.")
    )
    measured_seconds: float = field(default=0.0, metadata=about("Time of the measured calls."))

    def cell(self, subject: str, prompt_length: int, batch_size: int) -> CellResult:
        """One cell.

        Raises:
            ConfigError: there is no such cell.
        """
        for cell in self.cells:
            if (cell.subject, cell.prompt_length, cell.batch_size) == (subject, prompt_length, batch_size):
                return cell
        raise ConfigError(
            f"no cell {shown((subject, prompt_length, batch_size))}; subjects are "
            f"{', '.join(subject.name for subject in self.subjects)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; what is not finite is None."""
        values = {"schema": SCHEMA, **_plain(self)}
        return values | {"config": _plain(self.config.as_dict())}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The comparison that `as_dict()` wrote.

        Raises:
            ConfigError: it is of another schema, or no comparison.
        """
        if values.get("schema") != SCHEMA or "config" not in values:
            raise ConfigError(
                f"schema={shown(values.get('schema'))}; give the comparison.json of a run, of schema {SCHEMA}"
            )
        rest = {name: value for name, value in values.items() if name not in ("schema", "config", "subjects", "cells")}
        return cls(
            config=CompareConfig.of(values["config"]),
            subjects=[SubjectResult(**subject) for subject in values["subjects"]],
            cells=[_cell(cell) for cell in values["cells"]],
            **rest,
        )


def _cell(values: Mapping[str, Any]) -> CellResult:
    summaries = {
        name: Summary(**{**values[name], "grid": tuple(values[name]["grid"])})
        for name in ("wall", "ttft", "tpot")
        if values[name] is not None
    }
    found = values["agreement"]
    difference = None if found is None or found[1] is None else tuple(found[1])
    return CellResult(
        **{**values, **summaries, "agreement": None if found is None else Agreement(found[0], difference)}
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
