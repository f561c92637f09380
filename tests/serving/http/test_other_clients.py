"""Clients of other projects against the door: LangChain, LiteLLM and lm-evaluation-harness, each in its own words."""

from __future__ import annotations

import json
from typing import Any

import pytest

import hybridgen
from hybridgen.demo import model_path

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # what they import takes half a minute

WORDS = "def f(x):"
PROMPT = f"<user>{WORDS}\n<assistant>"
"""What the tests' template makes of it."""
PERSON = {
    "title": "person",
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["age"],
    "additionalProperties": False,
}
LOOK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look something up.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM asks the network for prices when it is imported."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


def greedy(engine: hybridgen.Engine, tokens: int) -> str:
    return engine.generate(PROMPT, temperature=0, max_new_tokens=tokens).text


@pytest.fixture
def chat(url: str) -> Any:
    """LangChain's chat model of OpenAI's protocol."""
    langchain = pytest.importorskip("langchain_openai")
    return langchain.ChatOpenAI(
        model="demo", base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=8, max_retries=0
    )


def test_langchain_invokes_streams_and_batches(chat: Any, engine: hybridgen.Engine) -> None:
    expected = greedy(engine, 8)
    answer = chat.invoke(WORDS)
    assert answer.content == expected
    assert answer.usage_metadata["output_tokens"] == 8
    chunks = list(chat.stream(WORDS))
    assert "".join(chunk.content for chunk in chunks) == expected
    assert len(chunks) > 3
    assert [each.content for each in chat.batch([WORDS, WORDS])] == [expected] * 2


def test_langchain_has_tools_and_structured_output(chat: Any) -> None:
    bound = chat.bind_tools([LOOK], tool_choice="look").bind(max_tokens=200, temperature=1.5, seed=1)
    [call] = bound.invoke(WORDS).tool_calls
    assert call["name"] == "look"
    assert isinstance(call["args"]["x"], int)
    person = chat.with_structured_output(PERSON, method="json_schema").bind(max_tokens=200, seed=1)
    assert isinstance(person.invoke(WORDS)["age"], int)


def complete(url: str, **fields: Any) -> Any:
    litellm = pytest.importorskip("litellm")
    return litellm.completion(
        model="openai/demo",
        api_base=f"{url}/v1",
        api_key="none",
        messages=[{"role": "user", "content": WORDS}],
        num_retries=0,
        **fields,
    )


def test_litellm_completes_and_streams(url: str, engine: hybridgen.Engine) -> None:
    expected = greedy(engine, 8)
    answer = complete(url, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    chunks = list(complete(url, max_tokens=8, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_litellm_has_tools_formats_and_errors(url: str) -> None:
    litellm = pytest.importorskip("litellm")
    answer = complete(url, max_tokens=200, tools=[LOOK], tool_choice="required", temperature=1.5, seed=1)
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(json.loads(call.function.arguments)["x"], int)
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    answer = complete(url, max_tokens=200, response_format=form, seed=1)
    assert isinstance(json.loads(answer.choices[0].message.content)["age"], int)
    with pytest.raises(litellm.ContextWindowExceededError):
        complete(url, max_tokens=10**6)
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        complete(url, temperature=-1)


def test_the_harness_gets_the_scores_of_the_engine(url: str, engine: hybridgen.Engine) -> None:
    """lm-eval's `local-completions`, beside our own adapter in this process."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from hybridgen.integrations.lm_eval import HybridgenLM

    def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]

    tokens = {"tokenizer_backend": "huggingface", "tokenizer": str(model_path())}
    theirs = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="demo", max_length=1024, **tokens)
    ours = HybridgenLM(engine, max_gen_toks=16)
    pairs = [("def f(a, b):\n    return", " a + b"), ("import ", "os"), ("x", " = 1"), ("class A:\n", "    def f")]
    scores = [model.loglikelihood(instances("loglikelihood", pairs)) for model in (ours, theirs)]
    for (mine, greedy), (other, expected) in zip(*scores, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
        assert greedy == expected
    asked = [
        ("def main():\n", {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}),
        ("import os\n", {"until": ["\n\n", "def"], "max_gen_toks": 24, "do_sample": False}),
    ]
    texts = [model.generate_until(instances("generate_until", asked)) for model in (ours, theirs)]
    assert texts[0] == texts[1]
