"""The runs: warm-up, interleaved rounds until the medians are known well enough, and what goes wrong meanwhile."""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from hybridgen.comparison.data import results
from hybridgen.comparison.data.config import REFERENCE, CompareConfig
from hybridgen.comparison.data.results import CellResult
from hybridgen.comparison.data.schedule import Cell, cells, in_order, prompts
from hybridgen.comparison.data.statistics import Agreement, agreement, settled, summarise
from hybridgen.comparison.measuring.subjects import GraphUse, Output, Subject
from hybridgen.comparison.measuring.utilisation import Clocks, cpu_share
from hybridgen.device.failures import is_fatal
from hybridgen.device.memory import PeakMemory, taken
from hybridgen.errors import OutOfMemoryError, described

logger = logging.getLogger(__name__)

Progress = Callable[[str, float, float], None]
"""Told what is done, how much of it, and of how much."""


@dataclass
class Record:
    """What is known of a cell while it is measured."""

    cell: Cell
    status: str = results.OK
    error: str | None = None
    stopped: str | None = None
    first_call: float = 0.0
    """Seconds of its very first call."""
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    firsts: list[list[float]] = field(default_factory=list)
    """TTFT of each request, per call."""
    gaps: list[float] = field(default_factory=list)
    """Between tokens, of all requests and calls."""
    peak: int = 0
    """Memory that a call took above what was taken before it."""
    left: int = 0
    """On a CPU, resident memory that its warm-up left taken: caches are paid for when they are first written."""
    agreement: Agreement | None = None
    use: GraphUse = field(default_factory=GraphUse)
    has_use: bool = False

    def ends(self, config: CompareConfig) -> bool:
        """Whether it needs no more calls; notes why."""
        if self.status != results.OK:
            return True
        bounds = {"confidence": config.confidence, "tolerance": config.tolerance}
        ttfts = self.ttfts
        if len(self.walls) < min(config.min_repeats, config.repeats):
            return False
        if settled(self.walls, **bounds) and (not ttfts or settled(ttfts, **bounds)):
            self.stopped = "interval"
        elif len(self.walls) >= config.repeats:
            self.stopped = "repeats"
        return self.stopped is not None

    @property
    def ttfts(self) -> list[float]:
        """The calls' median TTFTs."""
        return [statistics.median(call) for call in self.firsts if call]


class Measurement:
    """All cells of a comparison, measured one call at a time."""

    def __init__(
        self,
        config: CompareConfig,
        device: torch.device,
        vocab_size: int,
        progress: Progress,
        clocks: Clocks = Clocks(),  # noqa: B008
    ) -> None:
        self.config = config
        self.device = device
        self.vocab_size = vocab_size
        self.records: dict[Cell, Record] = {}
        self.spent = 0.0
        """Seconds of measured calls."""
        self.interrupted = False
        self._progress = progress
        self._clocks = clocks
        self._reference: dict[tuple[int, int], list[list[int]]] = {}

    def prompts(self, cell: Cell) -> list[list[int]]:
        """What a cell generates from."""
        return prompts(self.config, cell.prompt_length, cell.batch_size, self.vocab_size)

    def leave_out(self, subject: str, status: str, why: str | None) -> None:
        """Report every cell of a subject that could not be built."""
        for cell in cells(self.config, [subject]):
            self.records[cell] = Record(cell, status, why)

    def leave_out_the_rest(self, subjects: Sequence[str], why: str) -> None:
        """Report the cells of these subjects that were never called."""
        for cell in cells(self.config, subjects):
            if cell not in self.records or (self.records[cell].status == results.OK and not self.records[cell].walls):
                self.records[cell] = Record(cell, results.NOT_MEASURED, why)

    def went_well(self, subject: str) -> list[Cell]:
        """A subject's cells that were measured."""
        return [cell for cell in cells(self.config, [subject]) if self.records[cell].status == results.OK]

    def run(self, subjects: Mapping[str, Subject], budget: float) -> None:
        """Warm these subjects up and measure their cells in rounds.

        Args:
            budget: seconds of measured calls.
        """
        self._warm_up(subjects)
        until = self.spent + budget
        number = 0
        try:
            while self.spent < until and self._round(subjects, number, until):
                number += 1
        except KeyboardInterrupt:
            self.interrupted = True
            logger.warning("interrupted; the report has what was measured")
        for cell in cells(self.config, list(subjects)):
            record = self.records[cell]
            if record.status == results.OK and record.stopped is None:
                record.stopped = "interrupted" if self.interrupted else "budget"
                if not record.walls:
                    record.status, record.error = results.NOT_MEASURED, f"{record.stopped} before its first call"

    def _warm_up(self, subjects: Mapping[str, Subject]) -> None:
        listed = cells(self.config, list(subjects))
        for index, cell in enumerate(listed):
            record = self.records[cell] = Record(cell)
            self._progress("warm up", index, len(listed))
            try:
                given = self.prompts(cell)
                before, held = subjects[cell.subject].stats(), self._resident()
                for call in range(max(1, self.config.warm_up)):
                    start = self._clocks.wall()
                    output = self._call(subjects[cell.subject], given)
                    if call == 0:
                        record.first_call = self._clocks.wall() - start
                    if cell.subject == REFERENCE:
                        self._reference[cell.prompt_length, cell.batch_size] = output.tokens
                record.left = max(0, self._resident() - held)
                after = subjects[cell.subject].stats()
                if before is not None and after is not None:
                    record.use.add_failures(before, after)
            except KeyboardInterrupt:  # an engine's is an Exception too
                raise
            except Exception as error:
                self._fault(record, error)
        for name, subject in subjects.items():
            try:
                subject.settle()
            except Exception as error:
                logger.warning("%s: what was left to do after warm-up failed: %s", name, described(error))

    def _round(self, subjects: Mapping[str, Subject], number: int, until: float) -> bool:
        """One call of every cell that is not done; returns whether any is left."""
        left = False
        for cell in in_order(self.config, list(subjects), number):
            record = self.records[cell]
            if record.stopped is not None or record.ends(self.config):
                continue
            left = True
            if self.spent >= until:
                return True
            self._measure(subjects[cell.subject], record)
            self._progress("measure", min(self.spent, self.config.budget), self.config.budget)
        return left

    def _measure(self, subject: Subject, record: Record) -> None:
        given = self.prompts(record.cell)
        try:
            before = subject.stats()
            memory = PeakMemory(self.device)
            cpu = self._clocks.cpu()
            start = self._clocks.wall()
            output = self._call(subject, given)
            wall = self._clocks.wall() - start
            cpu = self._clocks.cpu() - cpu
            self.spent += wall
            record.peak = max(record.peak, memory.growth())
            after = subject.stats()
        except KeyboardInterrupt:
            raise
        except Exception as error:
            self._fault(record, error)
            return
        record.walls.append(wall)
        record.cpus.append(cpu)
        # What the call took outside of its requests counts before their first token.
        outside = 0.0 if output.inside is None else max(0.0, wall - output.inside)
        record.firsts.append([times[0] + outside for times in output.times if times])
        record.gaps += [later - sooner for times in output.times for sooner, later in pairwise(times)]
        if before is not None and after is not None:
            record.use.add(before, after)
            record.has_use = True
        self._compare(record, output)

    def _call(self, subject: Subject, given: list[list[int]]) -> Output:
        output = subject.call(given, self.config.new_tokens)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return output

    def _resident(self) -> int:
        """Resident memory where the model is on a CPU, else 0."""
        return 0 if self.device.type == "cuda" else taken(self.device) or 0

    def _compare(self, record: Record, output: Output) -> None:
        reference = self._reference.get((record.cell.prompt_length, record.cell.batch_size))
        if reference is None:
            return
        found = agreement(output.tokens, reference)
        if record.agreement is None or found.share < record.agreement.share:
            record.agreement = found

    def _fault(self, record: Record, error: Exception) -> None:
        """Note that a cell's call raised, and go on: with a whole device, other cells can still run."""
        record.status, record.error = status_of(error), described(error)
        logger.warning("%s, prompt %d, batch %d: %s: %s", *record.cell, record.status, record.error)
        logger.debug("a call failed", exc_info=error)
        error.__traceback__ = None  # its frames hold tensors
        gc.collect()
        if self.device.type == "cuda" and not is_fatal(error):
            torch.cuda.empty_cache()

    def cell_result(self, record: Record) -> CellResult:
        """A cell's figures, without those that need more than its calls."""
        config, cell = self.config, record.cell
        median = statistics.median(record.walls) if record.walls else None
        tokens = cell.batch_size * config.new_tokens
        firsts = [first for call in record.firsts for first in call]
        return CellResult(
            **cell._asdict(),
            status=record.status,
            error=record.error,
            repeats=len(record.walls),
            stopped=record.stopped,
            wall=summarise(record.walls, config.confidence),
            ttft=summarise(firsts, config.confidence, record.ttfts),
            tpot=summarise(record.gaps, config.confidence, ()),
            tokens_per_s=tokens / median if median else None,
            cpu_utilisation=cpu_share(record.cpus, record.walls),
            cpu_per_step=statistics.median(record.cpus) / config.new_tokens if record.cpus else None,
            graphs=record.use.as_dict() if record.has_use else None,
            agreement=record.agreement,
            walls=record.walls,
            ttfts=record.ttfts,
        )


def status_of(error: BaseException) -> str:
    """`out of memory` or `failed`."""
    memory = isinstance(error, (OutOfMemoryError, torch.OutOfMemoryError, MemoryError))
    # A request that failed brings the name of what its step raised.
    return results.OUT_OF_MEMORY if memory or "OutOfMemoryError" in str(error) else results.FAILED


def release(device: torch.device) -> None:
    """Give back what closed subjects held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
