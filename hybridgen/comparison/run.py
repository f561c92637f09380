"""A comparison from start to end: one model, an engine for each mode on its weights, the runs, checks and result."""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from hybridgen.comparison import results
from hybridgen.comparison.baselines import Unavailable, build_baseline
from hybridgen.comparison.checks import REPORTED, logit_error
from hybridgen.comparison.config import REFERENCE, CompareConfig
from hybridgen.comparison.files import check_output
from hybridgen.comparison.measure import Measurement, release, status_of
from hybridgen.comparison.provenance import gpu_state, provenance
from hybridgen.comparison.results import Comparison, SubjectResult
from hybridgen.comparison.schedule import Cell, cells
from hybridgen.comparison.subjects import (
    BASELINE,
    MODE,
    SWITCH,
    EngineSubject,
    Subject,
    build,
    compile_something,
    names,
)
from hybridgen.comparison.utilisation import cuda_probe, device_shares
from hybridgen.config import EngineConfig, bar_disabled
from hybridgen.core import Completion
from hybridgen.device.memory import taken
from hybridgen.engine.preflight import check_config
from hybridgen.engine.requests import context_limit
from hybridgen.errors import ConfigError, described
from hybridgen.kernels.read_ceiling import read_ceiling
from hybridgen.loading import Checkpoint
from hybridgen.models.projections import fuse_projections
from hybridgen.models.twin import twin
from hybridgen.telemetry.traffic import Traffic

logger = logging.getLogger(__name__)

UTILISATION_TOKENS = 16
"""New tokens of a call under the profiler, whose record of a long one takes long to read."""
_LOADING = ("dtype", "device", "revision", "trust_remote_code", "allow_pickle", "local_files_only", "progress")
"""Fields of `EngineConfig` that say how a model is opened."""


@dataclass
class _Built:
    """What is known of a subject beside its calls."""

    result: SubjectResult
    growth: int | None = None
    """Memory that building it took."""


@dataclass
class _Run:
    """A comparison under way."""

    config: CompareConfig
    checkpoint: Checkpoint
    model: Any
    limit: int
    load_seconds: float
    folder: str
    bar: tqdm
    built: dict[str, _Built] = field(default_factory=dict)
    subjects: dict[str, Subject] = field(default_factory=dict)
    """Those that are open."""
    logit_errors: dict[Cell, float] = field(default_factory=dict)
    busy: dict[Cell, float] = field(default_factory=dict)
    traffic: Traffic | None = None
    """What a decode step reads, as the first engine counted it."""
    notes: list[str] = field(default_factory=list)
    fuse_seconds: float = 0.0
    references: dict[tuple[int, int], list[Completion]] = field(default_factory=dict)
    """Mode eager's completions with log-probabilities, by prompt length and batch size."""

    def __post_init__(self) -> None:
        self.device = self.checkpoint.device
        self.measurement = Measurement(self.config, self.device, self.checkpoint.vocab_size, self.show)
        # Weights are joined once: a twin of the template shares the joined ones too. A live module's stay apart.
        self.template = twin(self.model)
        if self.config.engine.get("fuse_projections", True) and self.checkpoint.module is None:
            start = time.perf_counter()
            fuse_projections(self.template)
            self.fuse_seconds = time.perf_counter() - start

    def pay_once(self) -> None:
        """Spend what a process spends once, so that it is on no row's bill: Inductor's imports, kernels of ours."""
        start = time.perf_counter()
        inductor = self.config.engine.get("compile_backend", "inductor") == "inductor"
        if self.config.fresh_compile and inductor and {"jit", "hybrid"} & set(self.config.modes):
            compile_something(self.device)
        if self.device.type == "cuda":
            engine_config = self.config.engine_config({"mode": REFERENCE}, self.limit)
            try:
                build(REFERENCE, engine_config, twin(self.template), self.config, None).close()
            except Exception as error:  # the row of mode eager will say so
                logger.debug("the first engine failed: %s", error)
            release(self.device)
        took = time.perf_counter() - start
        if took > 1:
            self.notes.append(
                "What a process pays once (Inductor's imports, compilation of hybridgen's own kernels) is in no row; "
                f"it took {took:.1f} s."
            )

    def show(self, what: str, done: float, total: float) -> None:
        """Move the progress bar."""
        if self.bar.disable:
            return
        self.bar.set_description(what, refresh=False)
        self.bar.total = round(total, 1)
        self.bar.n = round(done, 1)
        self.bar.refresh()

    def groups(self) -> None:
        """Measure everything: all subjects together, or one after the other."""
        listed = names(self.config)
        groups = [listed] if self.config.together else [[name] for name in listed]
        utilisation = self.config.utilisation and self.device.type == "cuda"
        if utilisation and len(groups) > 1:
            utilisation = False  # the profiler of one would slow the next
            self.notes.append("no GPU utilisation: it is measured with together=True only")
        for group in groups:
            self.group(group, self.config.budget / len(groups), utilisation=utilisation)
            if self.measurement.interrupted:
                break
        self.leave_out([name for name in listed if name not in self.built], "interrupted before it was built")

    def group(self, listed: Sequence[str], budget: float, *, utilisation: bool) -> None:
        """Build these subjects, measure them, check them and close them."""
        try:
            for index, name in enumerate(listed):
                self.show(f"build {name}", index, len(listed))
                self._build(name)
            self.measurement.run(self.subjects, budget)
            if not self.measurement.interrupted:
                self._check_logits()
                if utilisation:
                    self._utilisation()
        except KeyboardInterrupt:  # what was measured is worth having, whatever was under way
            self.measurement.interrupted = True
            self.leave_out([name for name in listed if name not in self.built], "interrupted before it was built")
            self.notes.append("interrupted; checks that come after measuring are missing or not complete")
        finally:
            for name, subject in list(self.subjects.items()):
                self._finish(name, subject)
            self.subjects.clear()
            release(self.device)

    def _build(self, name: str) -> None:
        variant = self.config.variants.get(name)
        result = SubjectResult(name=name, kind=_kind(name, self.config))
        self.built[name] = built = _Built(result)
        release(self.device)
        before = taken(self.device)
        try:
            if variant is None:
                path = str(self.checkpoint.name) if self.checkpoint.source is not None else None
                start = time.perf_counter()
                self.subjects[name] = build_baseline(name, twin(self.model), path, self.config)
                result.startup = {"load weights": self.load_seconds, "other": time.perf_counter() - start}
            else:
                self.subjects[name] = self._build_engine(name, variant, result)
        except Unavailable as error:
            self.leave_out([name], str(error))
        except Exception as error:  # whatever a model, a compiler or a peer raises: the others are worth having
            result.status, result.error = status_of(error), described(error)
            logger.warning("%s cannot be built: %s", name, result.error)
            logger.debug("a subject failed", exc_info=error)
            self.measurement.leave_out(name, result.status, result.error)
            error.__traceback__ = None
        release(self.device)
        if before is not None:
            built.growth = (taken(self.device) or 0) - before
            if self.device.type == "cpu":  # what was released meanwhile is no gain of this subject
                built.growth = max(0, built.growth)

    def _build_engine(self, name: str, variant: dict[str, Any], result: SubjectResult) -> EngineSubject:
        config = self.config
        engine_config = config.engine_config(variant, self.limit)
        module = twin(self.template if engine_config.fuse_projections else self.model)
        # What a switch is compared by is not its start-up: it finds what mode hybrid compiled.
        fresh = config.fresh_compile and result.kind == MODE
        subject = build(name, engine_config, module, config, self.folder if fresh else None)
        self.traffic = subject.engine.traffic
        if subject.engine.mode.compiles:
            result.compile_cache = "empty" if fresh and engine_config.compile_backend == "inductor" else "shared"
        parts = dict(subject.stats().startup)
        other = max(0.0, subject.build_seconds - sum(parts.values()))
        parts |= {"load weights": self.load_seconds}
        if self.fuse_seconds and engine_config.fuse_projections:
            parts |= {"fuse projections": self.fuse_seconds}
        result.startup = {**parts, "other": other}
        return subject

    def leave_out(self, listed: Sequence[str], why: str) -> None:
        """Report subjects as not measured."""
        for name in listed:
            result = SubjectResult(name=name, kind=_kind(name, self.config), status=results.NOT_MEASURED, error=why)
            self.built[name] = _Built(result)
            self.measurement.leave_out(name, results.NOT_MEASURED, why)

    def _measured(self, subject: str) -> list[Cell]:
        """A subject's cells that went well."""
        records = self.measurement.records
        return [cell for cell in cells(self.config, [subject]) if records[cell].status == results.OK]

    def _check_logits(self) -> None:
        """One call of each cell with log-probabilities, after everything else was timed: it can bring new graphs."""
        engines = {name: s for name, s in self.subjects.items() if isinstance(s, EngineSubject)}
        for index, (name, subject) in enumerate(engines.items()):
            self.show("check logits", index, len(engines))
            for cell in self._measured(name):
                key = cell.prompt_length, cell.batch_size
                try:
                    given = self.measurement.prompts(cell)
                    found = subject.completions(given, self.config.new_tokens, REPORTED)
                except KeyboardInterrupt:  # an engine's is an Exception too
                    raise
                except Exception as error:
                    self.notes.append(f"logits of {_place(cell)} are not checked: {described(error)}")
                    continue
                if name == REFERENCE:
                    self.references[key] = found
                if key in self.references:
                    worst = logit_error(found, self.references[key])
                    if worst is not None:
                        self.logit_errors[cell] = worst

    def _utilisation(self) -> None:
        """How busy the device is in short calls: their times first, then the profiler, which slows what follows."""
        listed = [(name, cell) for name in self.subjects for cell in self._measured(name)]
        tokens = min(UTILISATION_TOKENS, self.config.new_tokens)
        calls = {
            cell: partial(self.subjects[name].call, self.measurement.prompts(cell), tokens) for name, cell in listed
        }
        try:
            for cell in device_shares(calls, cuda_probe(self.device), self.busy, self.show):
                self.notes.append(f"no GPU utilisation of {_place(cell)}: the profiler saw more work than it takes")
        except KeyboardInterrupt:
            raise
        except Exception as error:  # nothing was lost that was measured before
            self.notes.append(f"GPU utilisation is not complete: {described(error)}")

    def _finish(self, name: str, subject: Subject) -> None:
        """Take a subject's statistics and close it."""
        result = self.built[name].result
        known = self.measurement.records  # not all, after Ctrl-C in warm-up
        records = [known[cell] for cell in cells(self.config, [name]) if cell in known]
        result.startup["first calls"] = sum(
            max(0.0, record.first_call - statistics.median(record.walls)) for record in records if record.walls
        )
        try:
            stats = subject.stats()
            if stats is not None:
                result.cache_bytes, result.graph_bytes = stats.cache_bytes, stats.graphs.bytes
                result.captured, result.lazy_captures = len(stats.graphs.graphs), stats.graphs.lazy_captures
                result.failures, result.fallbacks = dict(stats.graphs.failures), dict(stats.fallbacks)
                result.late_compiles = stats.late_compiles
            subject.close()
        except Exception as error:  # an engine whose device failed, for example
            self.notes.append(f"{name} did not end well: {described(error)}")

    def result(self, given: Any, ceiling: float | None, facts: dict[str, Any]) -> Comparison:
        """Everything that is known; `given` is the model as the caller named it."""
        live = self.checkpoint.module is not None
        traffic = self.traffic
        if traffic is not None and not traffic.weights:
            self.notes.append("no MBU: the model has experts, and which are read depends on the tokens")
        weights = sum(parameter.nbytes for parameter in {id(p): p for p in self.model.parameters()}.values())
        found = []
        for cell in cells(self.config, names(self.config)):
            record = self.measurement.records[cell]
            row = self.measurement.cell_result(record)
            growth = self.built[cell.subject].growth
            row.logit_error = self.logit_errors.get(cell)
            row.gpu_utilisation = self.busy.get(cell)
            if growth is not None and growth >= 0 and record.walls:  # below 0: somebody else gave memory back
                left = sum(r.left for r in self.measurement.records.values() if r.cell.subject == cell.subject)
                row.memory = weights + growth + left + record.peak
            if ceiling is not None and row.tpot is not None and traffic is not None and traffic.weights:
                context = cell.prompt_length + self.config.new_tokens / 2
                row.mbu = traffic.bandwidth(cell.batch_size, context, row.tpot.p50) / ceiling
            found.append(row)
        return Comparison(
            config=self.config,
            model="demo model" if given is None else self.checkpoint.name,
            source=None if live or given is None else os.fspath(given),
            live=live,
            dtype=str(self.checkpoint.dtype).removeprefix("torch."),
            device=str(self.device),
            subjects=[self.built[name].result for name in names(self.config)],
            cells=found,
            provenance=facts,
            read_ceiling=ceiling,
            notes=self.notes,
            measured_seconds=self.measurement.spent,
        )


def compare(
    model: Any,
    config: CompareConfig,
    *,
    tokenizer: Any = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Run a comparison; see `hybridgen.compare`, which is this with keywords."""
    if output is not None:
        check_output(output)
    checkpoint, limit = _open(model, config, tokenizer)
    facts = provenance(checkpoint.device)
    loaded = checkpoint.load()
    bar = tqdm(bar_format="{desc}: {n}/{total}", disable=bar_disabled(progress), leave=False)
    with tempfile.TemporaryDirectory(prefix="hybridgen-compare-", ignore_cleanup_errors=True) as folder, bar:
        run = _Run(config, checkpoint, loaded.model, limit, loaded.seconds, folder, bar)
        run.pay_once()
        ceiling = read_ceiling(checkpoint.device)  # before anything of ours takes the memory
        run.groups()
        if checkpoint.device.type == "cuda":
            facts["gpu_state_at_end"] = gpu_state(checkpoint.device)
        comparison = run.result(model, ceiling, facts)
    if output is not None:
        comparison.save(output)
    return comparison


def _open(model: Any, config: CompareConfig, tokenizer: Any) -> tuple[Checkpoint, int]:
    """The model without its weights, and its longest context; everything that can be checked so far is.

    Raises:
        ConfigError: the lengths are above the context, or an engine's fields do not go together.
        DeviceError: this machine cannot run one of the modes.
        EngineError: an engine has the module.
    """
    opening = EngineConfig(**{name: value for name, value in config.engine.items() if name in _LOADING})
    checkpoint = Checkpoint.open(model, opening, tokenizer=tokenizer)
    limit = context_limit(checkpoint, None)
    if config.longest > limit:
        raise ConfigError(
            f"prompt_lengths up to {max(config.prompt_lengths)} and new_tokens={config.new_tokens} make "
            f"{config.longest} tokens, above the model's {limit}; lower one of them"
        )
    for variant in config.variants.values():
        check_config(checkpoint, config.engine_config(variant, limit))
    return checkpoint, limit


def _kind(name: str, config: CompareConfig) -> str:
    if name not in config.variants:
        return BASELINE
    return MODE if name in config.modes else SWITCH


def _place(cell: Cell) -> str:
    return f"{cell.subject}, prompt {cell.prompt_length}, batch {cell.batch_size}"
