"""Drafts where something comes between: steps that fail, recordings that are dropped, an end of text in a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from draft_cases import PROMPTS, RIGHT, Streams, check_equal, loaded, sequences

from hybridgen import FinishReason, RequestError
from hybridgen.graphs import recorder, stand_in
from hybridgen.speculation.oracle import OracleDrafter


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("drafts", ["oracle", "model"])
def test_a_step_that_fails(drafts: str, run_ahead: int, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs again request by request; the one to blame ends, and no token of the others is lost or said twice."""
    path, params, expected = streams
    given: dict[str, Any] = {"drafter": path}
    if drafts == "oracle":
        given = {"speculation": OracleDrafter(sequences(expected[:5]), RIGHT[:5])}
    with loaded(path, run_ahead=run_ahead, **given) as engine:
        runner = engine._runner
        assert runner is not None
        decode, calls = runner.decode, []

        def failing(slots: tuple[int, ...], query_len: int = 1, **kind: Any) -> Any:
            calls.append(query_len)
            if len(calls) > 4 and 2 in slots:
                raise ArithmeticError("of the third request")
            return decode(slots, query_len, **kind)

        monkeypatch.setattr(runner, "decode", failing)
        found = engine.generate(PROMPTS[:5], params[:5])
        most = max(calls)
        monkeypatch.undo()
        [failed] = [place for place, each in enumerate(found) if each.error is not None]
        assert isinstance(found[failed].error, RequestError)
        assert found[failed].token_ids == expected[failed].token_ids[: len(found[failed].token_ids)]
        others = [place for place in range(5) if place != failed]
        check_equal([found[place] for place in others], [expected[place] for place in others])
        assert most > 1
        check_equal(engine.generate(PROMPTS[:5], params[:5]), expected[:5])


@pytest.mark.parametrize("drafts", ["oracle", "model"])
def test_recordings_that_make_room_for_others(drafts: str, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are kept, of plain steps and of steps with drafts of several sizes."""
    path, params, expected = streams
    for module in (stand_in, recorder):  # or drafts may not be worth their time here
        monkeypatch.setattr(module, "median_seconds", lambda *_: 1.0)
    given: dict[str, Any] = {"drafter": path}
    if drafts == "oracle":
        given = {"speculation": OracleDrafter(sequences(expected), RIGHT)}
    sizes: dict[str, Any] = {"decode_buckets": (1, 2), "prefill_buckets": (), "max_graphs": 2, "capture_after": 1}
    with loaded(path, "graph", max_batch=2, **sizes, **given) as engine:
        for count in (1, 3, 1, 2):
            found = engine.generate(PROMPTS[:count], params[:count])
            while engine.record_missing():
                pass
            check_equal(found, expected[:count])
        stats = engine.stats()
    assert stats.graphs.evictions > 0
    assert stats.speculation.accepted > 0


def test_the_models_own_end_inside_a_run(streams: Streams) -> None:
    """An end-of-sequence id of the checkpoint's, drafted right, ends the request there."""
    path, _, _ = streams
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0}
    with loaded(path) as engine:
        long = engine.generate(PROMPTS[1], **options)
    oracle = OracleDrafter(sequences([long]), [7])
    with loaded(path, speculation=oracle) as engine:
        for place in range(2, 7):
            end = long.token_ids[place]
            engine.checkpoint = dataclasses.replace(engine.checkpoint, eos_token_ids=(end,))
            found = engine.generate(PROMPTS[1], **options)
            assert found.token_ids == long.token_ids[: long.token_ids.index(end) + 1]
            assert (found.finish_reason, found.stop_match) == (FinishReason.STOP, end)
            whole = engine.generate(PROMPTS[1], **options, ignore_eos=True)
            assert whole.token_ids == long.token_ids
            assert whole.accepted_tokens > 20
