"""What results hold and how they look: equal after pickling, short in a list, a table in a notebook."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

import hybridgen
from hybridgen import Completion, Engine, FinishReason, RequestError, Timing

FAST: dict[str, Any] = {"mode": "eager", "dtype": "float32", "max_batch": 4, "kv_memory": "16MiB", "device": "cpu"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(None, **FAST) as loaded:
        yield loaded


def test_a_pickled_completion_equals_itself(engine: Engine) -> None:
    for fields in ({"max_new_tokens": 1}, {"max_new_tokens": 4, "n": 3, "temperature": 1.0, "logprobs": 2}):
        out = engine.generate("import os", **fields)
        assert pickle.loads(pickle.dumps(out)) == out == copy.deepcopy(out)
    failed = Completion(
        text="",
        token_ids=(),
        prompt_token_ids=(1,),
        finish_reason=FinishReason.ERROR,
        seed=0,
        timing=Timing(queue=None, ttft=None, total=0.0),
        error=RequestError("it failed"),
    )
    assert pickle.loads(pickle.dumps(failed)) == failed
    assert pickle.loads(pickle.dumps(engine.stats())) == engine.stats()


def test_choices_are_always_there(engine: Engine) -> None:
    one = engine.generate("import os", max_new_tokens=3)
    assert [choice.token_ids for choice in one.choices] == [one.token_ids]
    three = engine.generate(["import os", "x"], max_new_tokens=3, n=3, temperature=1.0)
    assert [len(out.choices) for out in three] == [3, 3]
    best = max(
        engine.generate("x", max_new_tokens=3, n=3, temperature=1.0, logprobs=0).choices,
        key=lambda choice: choice.cumulative_logprob,
    )
    assert best.cumulative_logprob == pytest.approx(sum(item.logprob for item in best.logprobs))
    assert one.cumulative_logprob is None


def test_the_prompt_is_in_the_completion_as_it_was_given(engine: Engine) -> None:
    text, ids = engine.generate(["import os", [5, 6, 7]], max_new_tokens=2)
    assert (text.prompt, ids.prompt) == ("import os", None)
    assert ids.prompt_token_ids == (5, 6, 7)
    assert all(event.completion is None or event.completion.prompt == "x" for event in engine.stream("x"))


def test_what_is_cut_from_prompts_is_counted(engine: Engine) -> None:
    before = engine.stats().tokens.get("truncated", 0)
    out = engine.generate([5] * 40, max_new_tokens=2, truncate_prompt=10)
    assert (out.truncated_tokens, out.prompt_token_ids) == (30, (5,) * 10)
    assert engine.stats().tokens["truncated"] - before == 30
    assert engine.generate("x", max_new_tokens=2, truncate_prompt=10).truncated_tokens == 0


def test_results_are_short_in_a_list(engine: Engine) -> None:
    out = engine.generate("import os", max_new_tokens=40, n=2, temperature=1.0, ignore_eos=True)
    text = repr(out)
    assert text.startswith("Completion(")
    assert "40 tokens, length, " in text
    assert "2 choices" in text
    assert len(text) < 180
    assert str(out) == text
    assert repr(engine.stats()).startswith("EngineStats(")
    assert len(repr(engine.stats())) < 250
    assert repr(engine) == f"<Engine {engine.checkpoint.name}: eager on cpu>"


def test_notebooks_show_tables(engine: Engine) -> None:
    out = engine.generate("if a < b:", max_new_tokens=4)
    page = out._repr_html_()
    assert page.startswith("<table>")
    assert "if a &lt; b:" in page
    assert "4 tokens, length" in page
    assert "KV cache" in engine.stats()._repr_html_()
    assert engine._repr_html_().startswith("<table>")
    closed = Engine.load(None, **FAST)
    closed.close()
    assert ": closed" in closed._repr_html_()
    assert repr(closed).endswith(": closed>")


BAD = ["import os", "", [10**9], {"messages": "hi"}, [5] * 5000, None, "x"]
"""Two good prompts among bad ones."""


def check_returned(outs: list[Completion]) -> None:
    assert [out.error is None for out in outs] == [True, False, False, False, False, False, True]
    assert [len(out.token_ids) for out in outs] == [3, 0, 0, 0, 0, 0, 3]
    for index, out in enumerate(outs[1:-1], start=1):
        assert isinstance(out.error, hybridgen.HybridgenError)
        assert str(out.error).startswith(f"prompt {index}"), str(out.error)
        assert out.finish_reason is FinishReason.ERROR
        assert [choice.error for choice in out.choices] == [out.error]
    assert [outs[0].prompt, outs[1].prompt, outs[3].prompt] == ["import os", "", {"messages": "hi"}]


def test_bad_rows_become_completions_with_their_error(engine: Engine) -> None:
    with pytest.raises(hybridgen.PromptError, match="prompt 1 is an empty string"):
        engine.generate(BAD, max_new_tokens=3)
    outs = engine.generate(BAD, max_new_tokens=3, errors="return")
    check_returned(outs)
    assert outs[0].token_ids == engine.generate("import os", max_new_tokens=3).token_ids
    check_returned(hybridgen.generate(engine, iter(BAD), max_new_tokens=3, errors="return"))
    ended = {e.index: e.completion for e in engine.stream(BAD, max_new_tokens=3, errors="return") if e.completion}
    assert {index: done.error is None for index, done in ended.items()} == {
        index: index in (0, 6) for index in range(len(BAD))
    }
    assert all(out.error is not None for out in engine.generate(["", ""], errors="return"))


def test_one_prompt_too(engine: Engine) -> None:
    out = engine.generate("", errors="return")
    assert isinstance(out.error, hybridgen.PromptError)
    with pytest.raises(hybridgen.ConfigError, match="errors='skip'; give 'raise'"):
        engine.generate("x", errors="skip")
    with pytest.raises(hybridgen.SamplingError, match=r"2 entries for 1"):  # of the call, not of a row
        engine.generate(["x"], [hybridgen.SamplingParams()] * 2, errors="return")
    with pytest.raises(hybridgen.PromptError):
        hybridgen.generate(None, [""], **FAST)
    assert hybridgen.generate(None, [""], errors="return", **FAST)[0].error is not None


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_only_allowed_tokens_are_chosen_and_others_rows_are_as_before(mode: str) -> None:
    allowed = [70, 71, 200]
    with Engine.load(None, **FAST | {"mode": mode}) as engine:
        free = engine.generate("import os", max_new_tokens=6, temperature=0)
        wanted = [{"allowed_token_ids": allowed, "temperature": 1.0, "seed": 3}, {"temperature": 0}]
        params = [hybridgen.SamplingParams(max_new_tokens=6, ignore_eos=True, **fields) for fields in wanted]
        kept, other = engine.generate(["import os"] * 2, params)
        assert set(kept.token_ids) <= set(allowed)
        assert len(set(kept.token_ids)) > 1
        assert other.token_ids == free.token_ids
        # The most likely of the allowed ones, and a slot that had them is free of them afterwards.
        scored = engine.generate("import os", max_new_tokens=1, temperature=0, logprobs=64)
        first = engine.generate(
            "import os", max_new_tokens=1, temperature=0, allowed_token_ids=[5, scored.token_ids[0]]
        )
        assert first.token_ids == scored.token_ids
        for _ in range(4):
            assert engine.generate("import os", max_new_tokens=6, temperature=0).token_ids == free.token_ids
