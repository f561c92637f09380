"""Calls after the timed ones, because they would disturb times: logits, and how busy the device is.

Log-probabilities can bring new graphs, and after the profiler launches in this process are slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from hybridgen.comparison.data.checks import REPORTED, logit_error
from hybridgen.comparison.data.config import REFERENCE
from hybridgen.comparison.data.schedule import Cell
from hybridgen.comparison.measuring.measure import Measurement, Progress
from hybridgen.comparison.measuring.subjects import EngineSubject, Subject
from hybridgen.comparison.measuring.utilisation import cuda_probe, device_shares
from hybridgen.core import Completion
from hybridgen.errors import described

UTILISATION_TOKENS = 16
"""New tokens of a call under the profiler, whose record of a long one takes long to read."""


@dataclass
class Untimed:
    """What these calls find out, by cell."""

    measurement: Measurement
    progress: Progress
    notes: list[str]
    """What is missing, and why, is added here."""
    logit_errors: dict[Cell, float] = field(default_factory=dict)
    busy: dict[Cell, float] = field(default_factory=dict)
    """Share of a call's time in which the device was busy."""
    _references: dict[tuple[int, int], list[Completion]] = field(default_factory=dict)
    """Mode eager's completions with log-probabilities, by prompt length and batch size."""

    def check_logits(self, subjects: Mapping[str, Subject]) -> None:
        """One call of each cell with log-probabilities."""
        measurement = self.measurement
        engines = {name: subject for name, subject in subjects.items() if isinstance(subject, EngineSubject)}
        for index, (name, subject) in enumerate(engines.items()):
            self.progress("check logits", index, len(engines))
            for cell in measurement.went_well(name):
                key = cell.prompt_length, cell.batch_size
                try:
                    given = measurement.prompts(cell)
                    found = subject.completions(given, measurement.config.new_tokens, REPORTED)
                except KeyboardInterrupt:  # an engine's is an Exception too
                    raise
                except Exception as error:
                    self.notes.append(f"logits of {_place(cell)} are not checked: {described(error)}")
                    continue
                if name == REFERENCE:
                    self._references[key] = found
                if key in self._references:
                    worst = logit_error(found, self._references[key])
                    if worst is not None:
                        self.logit_errors[cell] = worst

    def measure_utilisation(self, subjects: Mapping[str, Subject]) -> None:
        """How busy a CUDA device is in short calls: first their times, then all calls under the profiler."""
        measurement = self.measurement
        tokens = min(UTILISATION_TOKENS, measurement.config.new_tokens)
        calls = {
            cell: partial(subject.call, measurement.prompts(cell), tokens)
            for name, subject in subjects.items()
            for cell in measurement.went_well(name)
        }
        try:
            for cell in device_shares(calls, cuda_probe(measurement.device), self.busy, self.progress):
                self.notes.append(f"no GPU utilisation of {_place(cell)}: the profiler saw more work than it takes")
        except KeyboardInterrupt:
            raise
        except Exception as error:  # nothing was lost that was measured before
            self.notes.append(f"GPU utilisation is not complete: {described(error)}")


def _place(cell: Cell) -> str:
    return f"{cell.subject}, prompt {cell.prompt_length}, batch {cell.batch_size}"
