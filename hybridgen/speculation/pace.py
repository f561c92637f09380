"""How many drafts of each row the next decode step checks.

All rows of a step check as many, so that it can be recorded. The more are checked, the longer a step takes; how many of
them are right is known only afterwards. So the choice goes by what each row has shown, and by what recorded steps were
measured to take.

A drafter with passes of its own takes time in each step that drafts. Where that is not worth it nobody drafts: a quiet
step is a plain one, with a recording of its own. The drafter does not read what such a step brings, and drafts less
well behind it; that shows in how many of its drafts are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from hybridgen.execution.drafting import DRAFTS

_WEIGHT = 0.125
"""The least that a step's drafts have in what is known of a row; the first ones have more, because little is known."""
_HOPE = 0.75
"""How likely a draft is to be right in a row that has shown nothing yet. More than most drafters reach: a row whose
drafts were never checked would never show that they are right."""
_RETURN = 0.02
"""How far a row comes back to that with each step whose drafts were not checked: its text may repeat itself by now."""
_SLOWEST = 4
"""How many times slower a row comes back that was wrong each time it was tried."""
_WORTH = 1.05
"""Tokens of a step over those of a plain one from which on drafts are checked where no times were measured."""


@dataclass(eq=False, slots=True)
class RowPace:
    """What one request has shown."""

    likely: float = _HOPE
    """How often a draft was right, when all before it were; the last steps count most."""
    waiting: int = 0
    """Drafts that wait for its next step, as far as the host has read."""
    steps: int = 0
    """In which its drafts were checked."""
    missed: int = 0
    """The last of these, in which not one was right."""

    def expected(self, most: int, waiting: int | None = None) -> float:
        """Drafts that are accepted, of so many that are checked at most.

        Args:
            waiting: that so many wait; None: as many as do.
        """
        total, chance = 0.0, 1.0
        for _ in range(min(most, self.waiting if waiting is None else waiting)):
            chance *= self.likely
            total += chance
        return total

    def read(self, checked: int, accepted: int, waiting: int, *, quiet: bool = False) -> None:
        """A step was read: so many drafts were checked, so many of them were right, so many wait now; or it was quiet,
        and nobody drafted."""
        if checked:
            self.steps += 1
            self.missed = 0 if accepted else self.missed + 1
            weight = max(_WEIGHT, 1 / (self.steps + 1))
            self.likely += weight * (accepted / min(accepted + 1, checked) - self.likely)
        elif (self.waiting or quiet) and self.likely < _HOPE:
            self.likely += _RETURN / min(1 + self.missed, _SLOWEST)
        self.waiting = waiting


class Choice(NamedTuple):
    """How a decode step runs."""

    query_len: int
    """Tokens a row: 1, and the drafts that are checked."""
    quiet: bool = False
    """Whether nobody drafts at its end."""


def choose_or_pause(
    rows: Sequence[RowPace], drafts: int, seconds: Callable[[Choice], float | None], most: int | None = None
) -> Choice:
    """`choose`, for a drafter that costs more than it is to be asked for nothing.

    Where times are known it drafts as long as steps with all of its drafts are expected to bring more tokens in a
    second than quiet ones; else in every step.

    Args:
        drafts: of a row, that it makes.
        seconds: what a step takes; None where that was not measured.
        most: see `choose`.
    """
    quiet, checks = seconds(Choice(1, quiet=True)), seconds(Choice(1 + drafts))
    if quiet is None or checks is None:
        return Choice(choose(rows, lambda count: seconds(Choice(count)), most))
    if most is not None and len(rows) * (1 + drafts) > most:
        return Choice(1, quiet=True)
    waiting = any(row.waiting for row in rows)
    # Where no drafts wait, a step that makes some is for those behind it.
    tokens = len(rows) + sum(row.expected(drafts, None if waiting else drafts) for row in rows)
    if tokens * quiet <= len(rows) * checks:
        return Choice(1, quiet=True)
    unrecorded = seconds(Choice(1)) is None
    return Choice(1 + drafts if waiting or unrecorded else 1)


def choose(rows: Sequence[RowPace], seconds: Callable[[int], float | None], most: int | None = None) -> int:
    """Tokens a row of the next decode step: 1, or 1 and the drafts that are checked.

    The one that brings the most tokens in a second. Where a plain step was measured and one with drafts was not, it is
    not taken: it would run without its recording.

    Args:
        seconds: what a step of so many tokens a row takes; None where that was not measured.
        most: tokens of a step at most; None: any number.
    """
    longest = max((row.waiting for row in rows), default=0)
    if not longest:
        return 1
    plain = seconds(1)
    best, best_rate = 1, float(len(rows)) * (_WORTH if plain is None else 1.0)
    # Those that hold the drafts that wait, up to the first that holds all of them.
    for count in [n for below, n in pairwise(DRAFTS) if below < longest]:
        tokens = len(rows) + sum(row.expected(count) for row in rows)
        if most is not None and len(rows) * (count + 1) > most:
            break
        took = seconds(count + 1)
        if plain is not None and took is None:
            continue
        rate = tokens if plain is None or took is None else tokens * plain / took
        if rate > best_rate:
            best, best_rate = count + 1, rate
    return best
