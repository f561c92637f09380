"""`/v1/completions` through OpenAI's own client, against the engine in this process."""

from __future__ import annotations

from typing import Any

import openai
import pytest

import hybridgen
from hybridgen.serving.http.completions import TextJob
from hybridgen.serving.http.fields import Body
from hybridgen.serving.http.text import Text

PROMPTS = ["import os\n", "def read(path):\n", "# é ü 漢字 🙂\n"]


def test_texts_equal_the_engine(api: openai.OpenAI, engine: hybridgen.Engine) -> None:
    out = api.completions.create(model="demo", prompt=PROMPTS, max_tokens=9, temperature=0)
    expected = engine.generate(PROMPTS, max_new_tokens=9, temperature=0)
    assert [choice.text for choice in out.choices] == [each.text for each in expected]
    assert [choice.index for choice in out.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in out.choices} == {"length"}
    assert out.usage is not None
    assert out.usage.prompt_tokens == sum(len(each.prompt_token_ids) for each in expected)
    assert out.usage.completion_tokens == 27
    assert out.usage.total_tokens == out.usage.prompt_tokens + 27


def test_ids_choices_and_a_seed(api: openai.OpenAI, engine: hybridgen.Engine) -> None:
    ids = [[100, 17, 300], [5, 6]]
    fields: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 11, "n": 2}
    out = api.completions.create(model="demo", prompt=ids, max_tokens=7, extra_body={"top_k": 40}, **fields)
    expected = engine.generate(ids, max_new_tokens=7, top_k=40, **fields)
    texts = [choice.text for each in expected for choice in each.choices]
    assert [choice.text for choice in out.choices] == texts
    assert [choice.index for choice in out.choices] == [0, 1, 2, 3]
    one = api.completions.create(model="demo", prompt=ids[1], max_tokens=3, temperature=0)
    assert one.choices[0].text == engine.generate(ids[1], max_new_tokens=3, temperature=0).text


def test_without_a_word_it_takes_sixteen_tokens(api: openai.OpenAI) -> None:
    out = api.completions.create(model="demo", prompt="import os", temperature=0)
    assert out.usage is not None
    assert out.usage.completion_tokens == 16


def test_log_probabilities(api: openai.OpenAI, engine: hybridgen.Engine, text: Text) -> None:
    prompt = PROMPTS[1]
    out = api.completions.create(model="demo", prompt=prompt, max_tokens=8, temperature=0, logprobs=2)
    expected = engine.generate(prompt, max_new_tokens=8, temperature=0, logprobs=2)
    found = out.choices[0].logprobs
    assert found is not None
    assert expected.logprobs is not None
    assert found.token_logprobs == [item.logprob for item in expected.logprobs]
    assert found.tokens is not None
    assert "".join(found.tokens) == expected.text
    assert found.text_offset == [len("".join(found.tokens[:place])) for place in range(8)]
    assert found.top_logprobs is not None
    for table, item in zip(found.top_logprobs, expected.logprobs, strict=True):
        assert table == {text.token(token): value for token, value in item.top}
    drawn = api.completions.create(
        model="demo", prompt=prompt, max_tokens=8, temperature=2.0, seed=1, logprobs=1
    ).choices[0]
    assert drawn.logprobs is not None
    pairs = list(zip(drawn.logprobs.tokens or (), drawn.logprobs.top_logprobs or (), strict=True))
    assert all(token in table for token, table in pairs)
    assert {len(table) for _, table in pairs} == {1, 2}


def test_a_prompt_is_scored_with_echo(api: openai.OpenAI, engine: hybridgen.Engine, text: Text) -> None:
    ids = list(engine.checkpoint.tokenizer("def read(path):\n    return")["input_ids"])
    [scores] = engine.score([ids[:1]], [ids[1:]])
    for most in (0, 1):  # lm-eval's way: with one token that it drops
        out = api.completions.create(model="demo", prompt=[ids], max_tokens=most, temperature=0, logprobs=1, echo=True)
        found: Any = out.choices[0].logprobs
        assert found.tokens[: len(ids)] == [text.token(each) for each in ids]
        assert len(found.token_logprobs) == len(ids) + most
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        assert found.token_logprobs[1 : len(ids)] == pytest.approx(scores.logprobs, abs=1e-5)
        likely = [
            value == max(top.values())
            for value, top in zip(found.token_logprobs[1 : len(ids)], found.top_logprobs[1 : len(ids)], strict=True)
        ]
        assert likely == list(scores.is_greedy)
        assert out.choices[0].text.startswith("def read(path):\n    return")


def test_stop_strings_echo_and_what_it_bans(api: openai.OpenAI, engine: hybridgen.Engine) -> None:
    whole = engine.generate("import os", max_new_tokens=16, temperature=0)
    stop = whole.text[5:8]
    out = api.completions.create(model="demo", prompt="import os", max_tokens=16, temperature=0, stop=[stop], echo=True)
    assert out.choices[0].text == "import os" + whole.text[: whole.text.index(stop)]
    assert out.choices[0].finish_reason == "stop"
    first = whole.token_ids[0]
    banned = api.completions.create(
        model="demo", prompt="import os", max_tokens=4, temperature=0, logit_bias={str(first): -100}
    )
    expected = engine.generate("import os", max_new_tokens=4, temperature=0, suppress_tokens=[first])
    assert banned.choices[0].text == expected.text


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream(api: openai.OpenAI, engine: hybridgen.Engine, n: int) -> None:
    fields: dict[str, Any] = {"temperature": 0.8, "seed": 3, "n": n}
    stream = api.completions.create(
        model="demo", prompt=PROMPTS, max_tokens=8, stream=True, logprobs=0, echo=False,
        stream_options={"include_usage": True}, **fields,
    )  # fmt: skip
    chunks = list(stream)
    expected = engine.generate(PROMPTS, max_new_tokens=8, **fields)
    texts = [""] * (3 * n)
    tokens: list[list[str]] = [[] for _ in texts]
    ends: dict[int, str] = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        [choice] = chunk.choices
        assert choice.index not in ends  # nothing comes after the reason
        texts[choice.index] += choice.text
        if choice.logprobs is not None and choice.logprobs.tokens is not None:
            tokens[choice.index] += choice.logprobs.tokens
        if choice.finish_reason is not None:
            assert choice.text == ""
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for each in expected for choice in (each.choices or (each,))]
    assert [len(each) for each in tokens] == [8] * (3 * n)
    assert set(ends) == set(range(3 * n))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8 * 3 * n
    assert chunks[-1].usage.prompt_tokens == sum(len(each.prompt_token_ids) for each in expected)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream", "unsupported_parameter"),
        ({"extra_body": {"guided_json": {}, "guided_regex": "a"}}, None, "invalid_value"),
        (
            {"extra_body": {"structured_outputs": {"structural_tag": "a"}}},
            "structured_outputs",
            "unsupported_parameter",
        ),
        ({"prompt": "q z " * 2000}, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": 10**6}, "max_tokens", "context_length_exceeded"),
        ({"model": "gpt-9"}, "model", "model_not_found"),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [["a"]]}, "prompt", None),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 2}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"extra_body": {"max_completion_tokens": 4}}, "max_completion_tokens", "unsupported_parameter"),
        ({"extra_body": {"guided_choice": "ab"}}, None, "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"extra_body": {"stop_token_ids": ["a"]}}, None, "invalid_value"),
    ],
)
def test_what_is_wrong_is_named(
    api: openai.OpenAI, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    values: dict[str, Any] = {"model": "demo", "prompt": "import os", "max_tokens": 4, **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        api.completions.create(**values)
    assert caught.value.status_code == (404 if param == "model" else 400)
    body: Any = caught.value.body
    assert (body["param"], body["code"]) == (param, code)
    assert body["message"]


def test_fields_that_ask_for_nothing_and_unknown_ones_pass(api: openai.OpenAI) -> None:
    extra = {"best_of": 1, "guided_json": None, "user": "me", "never_heard_of": [1, 2]}
    out = api.completions.create(model="demo", prompt="import os", max_tokens=2, extra_body=extra)
    assert out.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "brief"),
    [
        ({"prompt": list(range(9000))}, True),
        ({"prompt": [[5, 6], [7]]}, True),
        ({"prompt": "x" * 2000}, True),
        ({"prompt": "x" * 2001}, False),
        ({"prompt": [[5], "x" * 1500, "y" * 600]}, False),
        ({"prompt": "x", "logprobs": 0}, False),
        ({"prompt": [5], "echo": True}, False),
        ({"prompt": [5], "guided_json": {}}, False),
    ],
)
def test_what_takes_long_is_read_in_a_thread(fields: dict[str, Any], brief: bool) -> None:
    """A thread for what is quick would cost more than it; the event loop waits for what is not."""
    assert TextJob.brief(Body(fields)) is brief
