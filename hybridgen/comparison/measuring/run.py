"""The measurement from start to end: one model, subjects on its weights, the runs, the checks, what is known then."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from hybridgen.comparison.data.config import CompareConfig
from hybridgen.comparison.data.provenance import gpu_state, provenance
from hybridgen.comparison.data.results import NOT_MEASURED, ComparisonData, SubjectResult
from hybridgen.comparison.data.schedule import cells, kind_of, names
from hybridgen.comparison.measuring.building import Builder, Built
from hybridgen.comparison.measuring.measure import Measurement, release
from hybridgen.comparison.measuring.subjects import Subject
from hybridgen.comparison.measuring.untimed import Untimed
from hybridgen.config import EngineConfig, bar_disabled
from hybridgen.engine.preflight import check_config
from hybridgen.engine.requests import context_limit
from hybridgen.errors import ConfigError, described
from hybridgen.kernels.read_ceiling import read_ceiling
from hybridgen.loading import Checkpoint


@dataclass
class _Run:
    """A comparison under way."""

    config: CompareConfig
    checkpoint: Checkpoint
    model: Any
    builder: Builder
    bar: tqdm
    built: dict[str, Built] = field(default_factory=dict)
    subjects: dict[str, Subject] = field(default_factory=dict)
    """Those that are open."""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = self.checkpoint.device
        self.measurement = Measurement(self.config, self.device, self.checkpoint.vocab_size, self.show)
        self.untimed = Untimed(self.measurement, self.show, self.notes)

    def pay_once(self) -> None:
        """Spend what a process spends once, and say so where it took long."""
        took = self.builder.pay_once()
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
        groups = [listed] if self.config.together else [(name,) for name in listed]
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
                self.untimed.check_logits(self.subjects)
                if utilisation:
                    self.untimed.measure_utilisation(self.subjects)
        except KeyboardInterrupt:  # what was measured is worth having, whatever was under way
            self.measurement.interrupted = True
            self.measurement.leave_out_the_rest(list(self.subjects), "interrupted before its first call")
            self.notes.append("interrupted; checks that come after measuring are missing or not complete")
        finally:
            for name, subject in list(self.subjects.items()):
                self._finish(name, subject)
            self.subjects.clear()
            release(self.device)

    def _build(self, name: str) -> None:
        built = self.built[name] = self.builder.build(name)
        if built.subject is not None:
            self.subjects[name] = built.subject
        else:
            self.measurement.leave_out(name, built.result.status, built.result.error)

    def leave_out(self, listed: Sequence[str], why: str) -> None:
        """Report subjects as not measured."""
        for name in listed:
            kind = kind_of(name, self.config)
            self.built[name] = Built(SubjectResult(name=name, kind=kind, status=NOT_MEASURED, error=why))
            self.measurement.leave_out(name, NOT_MEASURED, why)

    def _finish(self, name: str, subject: Subject) -> None:
        """Take a subject's statistics and close it."""
        result = self.built[name].result
        known = self.measurement.records
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

    def result(self, given: Any, ceiling: float | None, facts: dict[str, Any]) -> ComparisonData:
        """Everything that is known; `given` is the model as the caller named it."""
        live = self.checkpoint.module is not None
        traffic = self.builder.traffic
        if traffic is not None and not traffic.weights:
            self.notes.append("no MBU: the model has experts, and which are read depends on the tokens")
        weights = sum(parameter.nbytes for parameter in {id(p): p for p in self.model.parameters()}.values())
        found = []
        for cell in cells(self.config, names(self.config)):
            record = self.measurement.records[cell]
            row = self.measurement.cell_result(record)
            growth = self.built[cell.subject].growth
            row.logit_error = self.untimed.logit_errors.get(cell)
            row.gpu_utilisation = self.untimed.busy.get(cell)
            if growth is not None and growth >= 0 and record.walls:  # below 0: somebody else gave memory back
                left = sum(r.left for r in self.measurement.records.values() if r.cell.subject == cell.subject)
                row.memory = weights + growth + left + record.peak
            if ceiling is not None and row.tpot is not None and traffic is not None and traffic.weights:
                context = cell.prompt_length + self.config.new_tokens / 2
                rate = traffic.bandwidth(cell.batch_size, context, row.tpot.p50)
                row.mbu = None if rate is None else rate / ceiling
            found.append(row)
        return ComparisonData(
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


def measure(model: Any, config: CompareConfig, *, tokenizer: Any, progress: bool | None) -> ComparisonData:
    """Measure what a config asks for; see `hybridgen.compare`."""
    checkpoint, limit = _open(model, config, tokenizer)
    facts = provenance(checkpoint.device)
    loaded = checkpoint.load()
    bar = tqdm(bar_format="{desc}: {n}/{total}", disable=bar_disabled(progress), leave=False)
    with tempfile.TemporaryDirectory(prefix="hybridgen-compare-", ignore_cleanup_errors=True) as folder, bar:
        builder = Builder(config, checkpoint, loaded, limit=limit, folder=folder)
        run = _Run(config, checkpoint, loaded.model, builder, bar)
        run.pay_once()
        ceiling = read_ceiling(checkpoint.device)  # before anything of ours takes the memory
        run.groups()
        if checkpoint.device.type == "cuda":
            facts["gpu_state_at_end"] = gpu_state(checkpoint.device)
        return run.result(model, ceiling, facts)


def _open(model: Any, config: CompareConfig, tokenizer: Any) -> tuple[Checkpoint, int]:
    """The model without its weights, and its longest context; everything that can be checked so far is.

    Raises:
        ConfigError: the lengths are above the context, or an engine's fields do not go together.
        DeviceError: this machine cannot run one of the modes.
    """
    opening = EngineConfig.opening_fields()
    checkpoint = Checkpoint.open(
        model,
        EngineConfig(**{name: value for name, value in config.engine.items() if name in opening}),
        tokenizer=tokenizer,
    )
    limit = context_limit(checkpoint, None)
    if config.longest > limit:
        raise ConfigError(
            f"prompt_lengths up to {max(config.prompt_lengths)} and new_tokens={config.new_tokens} make "
            f"{config.longest} tokens, above the model's {limit}; lower one of them"
        )
    for variant in config.variants.values():
        check_config(checkpoint, config.engine_config(variant, limit))
    return checkpoint, limit
