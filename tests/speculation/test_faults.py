"""What a drafter does wrong costs its drafts, is counted, and costs no token; what is not served is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from draft_cases import PROMPTS, RIGHT, Streams, check_equal, loaded, sequences
from torch import Tensor

import hybridgen
from hybridgen.errors import ConfigError, EngineError
from hybridgen.execution.drafting import DraftCall
from hybridgen.speculation.oracle import OracleDrafter


class Faulty(OracleDrafter):
    """An oracle whose drafts something happens to, from the given call on."""

    name = "faulty"

    def __init__(self, *args: Any, fault: str, at: int) -> None:
        super().__init__(*args)
        self._fault, self._at = fault, at

    def draft(self, call: DraftCall) -> Tensor:
        drafts = super().draft(call)
        self._at -= 1
        if self._at > 0:
            return drafts
        match self._fault:
            case "raises":
                raise ArithmeticError("no idea")
            case "above":
                drafts[:, 1] = families.VOCAB
            case "below":
                drafts[:, 2] = -7
            case "far":
                drafts[:, 0] = 2**62
            case "floats":
                return drafts.float()
            case "narrow":
                return drafts[:, :2]
            case "elsewhere":
                return drafts.to("meta")
            case "nothing":
                return None  # type: ignore[return-value]
        return drafts


KINDS = {"floats": "torch.float32 [", "narrow": ", 2] on cpu", "elsewhere": "on meta", "nothing": "type NoneType"}
"""What is said of drafts that are no drafts."""


@pytest.mark.parametrize(
    ("fault", "mode"),
    [(fault, mode) for fault in ("raises", "above", "below", "far") for mode in ("eager", "graph")]
    + [("floats", "eager"), ("nothing", "eager"), ("narrow", "graph"), ("elsewhere", "graph")],
)
def test_a_fault_costs_drafts_and_no_token(fault: str, mode: str, streams: Streams) -> None:
    path, params, expected = streams
    drafter = Faulty(sequences(expected[:4]), [7] * 4, fault=fault, at=12 if mode == "eager" else 60)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with hybridgen.Engine.load(
            path, mode=mode, speculation=drafter, max_batch=4, page_size=16, kv_memory="16MiB", max_context=192,
            decode_buckets=[4] if mode == "graph" else None, prefill_buckets=[], max_padding_ratio=64,
        ) as engine:  # fmt: skip
            while drafter._at > 0:
                check_equal(engine.generate(PROMPTS[:4], params[:4]), expected[:4])
            check_equal(engine.generate(PROMPTS[:4], params[:4]), expected[:4])
            stats = engine.stats()
    [why] = [reason for reason in stats.fallbacks if "drafter" in reason]
    assert [str(warning.message) for warning in caught if warning.category is RuntimeWarning] == [why]
    if fault in ("above", "below", "far"):
        assert why == "the drafter faulty gave ids that the model does not have; they are dropped"
        assert stats.speculation.drafter == "faulty"
    else:
        assert stats.speculation.drafter == f"off: {why}"
        assert ("ArithmeticError: no idea" if fault == "raises" else KINDS[fault]) in why
        assert fault == "raises" or ", not torch.int64 [" in why


def test_a_drafter_that_cannot_begin(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = OracleDrafter([], [])
    monkeypatch.setattr(drafter, "begin", lambda **_: 1 / 0)
    with pytest.raises(ConfigError, match="drafter oracle cannot begin: ZeroDivisionError: division by zero"):
        hybridgen.Engine.load(streams[0], mode="eager", speculation=drafter, kv_memory="16MiB")


def test_a_drafter_is_one_engines(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    path, params, expected = streams
    drafter = OracleDrafter(sequences(expected[:2]), RIGHT[:2])
    with loaded(path, speculation=drafter) as engine:
        with monkeypatch.context() as patch, pytest.raises(EngineError, match="drafts for another engine; make one"):
            patch.setattr(hybridgen.loading.Checkpoint, "load", lambda self: pytest.fail("weights are read"))
            loaded(path, speculation=drafter).__enter__()
        check_equal(engine.generate(PROMPTS[:2], params[:2]), expected[:2])
    with loaded(path, speculation=drafter) as engine:  # it was given back
        check_equal(engine.generate(PROMPTS[:2], params[:2]), expected[:2])


def test_places_without_a_draft_are_not_seen(streams: Streams) -> None:
    """The dummy page holds NaN: rows with fewer drafts than others, and rows of padding, attend to nothing there."""
    path, params, expected = streams
    oracle = OracleDrafter(sequences(expected[:6]), RIGHT[:6])  # rows 7 and 8 have no drafts at all
    with loaded(path, "graph", speculation=oracle) as engine:
        pages = [tensor for state in engine._runner.states for tensor in state.pages]
        for tensor in pages:
            tensor[0].fill_(torch.nan)
        check_equal(engine.generate(PROMPTS[:8], params[:8]), expected[:8])


def test_a_model_that_cannot_take_drafts_back_is_refused(tmp_path: Path) -> None:
    name, changes = families.ROPE_VARIANTS["longrope"]
    path = families.write(name, tmp_path, **changes)
    settings: dict[str, Any] = {"mode": "eager", "max_batch": 2, "page_size": 16, "speculation": "ngram"}
    with pytest.raises(hybridgen.ConfigError, match=r"speculation='ngram' .*rotary table .*max_context=\d+ or less"):
        hybridgen.Engine.load(path, **settings, max_context=256)
    with hybridgen.Engine.load(path, **settings, max_context=32) as engine:
        assert engine.generate([5, 6, 7], max_new_tokens=4).error is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speculation": "eagle"}, 'give "ngram", None, or a drafter of your own'),
        ({"speculation": True}, 'give "ngram", None'),
        ({"speculation": OracleDrafter}, 'give "ngram", None'),
        ({"speculation": "ngram", "graphs": "trees"}, 'use graphs="manual"'),
    ],
)
def test_a_config_that_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(hybridgen.ConfigError, match=message):
        hybridgen.EngineConfig(**fields)
