"""Recording a step on all ranks: it is kept if all could record it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from hybridgen.errors import first_line
from hybridgen.graphs import GraphKey, Recorder
from hybridgen.graphs.cuda import CudaGraphRecorder
from hybridgen.graphs.recorder import Recorded
from hybridgen.parallel.group import CAPTURED, DONE, FAILED, STEP, Group


class OtherRankError(RuntimeError):
    """Another rank could not record a step that this one could."""


class OutOfStepError(RuntimeError):
    """The ranks do not run the same: nothing that follows would be right."""


def record_together(recorder: Recorder, group: Group, key: GraphKey, step: Callable[[], None]) -> Recorded:
    """Record a step on this rank while the others do the same. All of them get a recording, or none.

    Before each run of the step, between a capture and its first replay, and at the end, each rank says whether it goes
    on. So one that cannot record it, say because its device has no memory left, does not leave the others waiting in
    the step's collectives. In a capture these are only noted, so that a rank which fails there leaves nobody waiting.

    Raises:
        OtherRankError: another rank could not.
        OutOfStepError: this rank failed where the others wait in a step's collectives, or runs it more often.
        Exception: whatever the recorder raises on this rank; the others know.
    """
    waits = False
    """Whether the others may be waiting for this rank in a collective."""

    def run() -> None:
        nonlocal waits
        _agree(group, STEP)
        waits = not _is_capturing()
        step()
        waits = False

    def captured() -> None:
        nonlocal waits
        _agree(group, CAPTURED)
        waits = True

    if isinstance(recorder, CudaGraphRecorder):
        recorder.captured = captured
    try:
        recorded = recorder.record(key, run, None)  # times known from before would be checked with more or fewer runs
    except (OtherRankError, OutOfStepError):
        raise
    except Exception as error:
        if waits:
            raise OutOfStepError(f"a step failed on rank {group.rank} alone: {error}") from error
        _say(group, FAILED)
        raise
    try:
        _agree(group, DONE)
    except BaseException:
        recorded.release()
        raise
    return recorded


def _agree(group: Group, word: int) -> None:
    said = _say(group, word)
    failed = [rank for rank, other in enumerate(said) if other == FAILED]
    if failed:
        raise OtherRankError(f"rank {failed[0]} could not record it")
    if len(set(said)) > 1:
        raise OutOfStepError(f"the ranks record a step in other ways: {said}")


def _say(group: Group, word: int) -> list[int]:
    try:
        return group.say(word)
    except RuntimeError as error:
        raise OutOfStepError(f"another rank is gone: {first_line(error)}") from error


def _is_capturing() -> bool:
    """Whether collectives are only noted, so that nobody waits in them."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class LeadRecorder:
    """A recorder of rank 0, which has the others record too."""

    def __init__(
        self,
        recorder: Recorder,
        group: Group,
        together: Callable[[], AbstractContextManager[None]],
        begin: Callable[[GraphKey], None],
        release: Callable[[GraphKey], None],
    ) -> None:
        """
        Args:
            together: ends the group where something inside raises.
            begin: tells the other ranks to record a step.
            release: tells them that its recording is not needed any more.
        """
        self.owner = recorder.owner
        self._recorder, self._group, self._together = recorder, group, together
        self._begin, self._release = begin, release

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        """See `Recorder.record`; `known` is not used."""
        self._begin(key)
        try:
            with self._group.progress.long:
                recorded = record_together(self._recorder, self._group, key, step)
        except OutOfStepError:
            with self._together():
                raise

        def release() -> None:
            self._release(key)
            recorded.release()

        return replace(recorded, release=release)

    def close(self) -> None:
        """See `Recorder.close`."""
        self._recorder.close()
