"""What results hold and how they look: equal after pickling, short in a list, a table in a notebook."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

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
