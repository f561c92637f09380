"""The stand-in for graphs."""

from __future__ import annotations

from store_cases import decode

from hybridgen.graphs import StandInRecorder
from hybridgen.graphs.stand_in import OWNER


def test_it_warms_up_and_replays_the_step() -> None:
    calls: list[int] = []
    recorder = StandInRecorder()
    recorded = recorder.record(decode(4), lambda: calls.append(1), None)
    assert len(calls) >= 2
    before = len(calls)
    recorded.replay()
    assert len(calls) == before + 1
    assert (recorded.owner, recorder.owner, recorded.bytes, recorded.thread) == (OWNER, OWNER, 0, None)
    assert recorded.seconds == recorded.plain_seconds >= 0  # no speed is claimed
    recorded.release()
    recorder.close()
