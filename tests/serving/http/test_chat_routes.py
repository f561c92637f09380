"""`/v1/chat/completions` and `/v1/responses` through OpenAI's own client."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from wire import Process

import hybridgen
from hybridgen.serving.http.text import Text

MESSAGES: list[Any] = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "def "}, {"type": "text", "text": "f(x):"}]},
]
PROMPT = "<system>be brief\n<user>def f(x):\n<assistant>"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}


class _Calls:
    """A tokenizer that reads a call out of whatever the model wrote, as a checkpoint's response template would."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.response_template = {"any": "thing"}
        self.seen: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._tokenizer(*given, **named)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def parse_response(self, response: Any, *, prefix: Any, tools: Any) -> dict[str, Any]:
        self.seen.append((response, prefix, tools))
        call = {"type": "function", "function": {"name": "look", "arguments": {"x": len(response)}}}
        return {"role": "assistant", "content": "so", "thinking": "hm", "tool_calls": [call, call]}


@pytest.fixture
def calling(door: Callable[..., str], demo: Process, text: Text) -> Any:
    """OpenAI's client for a model with tools."""
    tools = Text(_Calls(copy.deepcopy(text.tokenizer)))
    url = door(demo.path, text=tools)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client, tools.tokenizer


def test_a_chat_is_the_template_and_the_engine(api: openai.OpenAI, engine: hybridgen.Engine) -> None:
    out = api.chat.completions.create(
        model="demo", messages=MESSAGES, max_completion_tokens=9, temperature=0, logprobs=True, top_logprobs=2
    )
    expected = engine.generate(PROMPT, max_new_tokens=9, temperature=0, logprobs=2)
    [choice] = out.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert expected.logprobs is not None
    assert [each.logprob for each in choice.logprobs.content] == [each.logprob for each in expected.logprobs]
    assert bytes(b for each in choice.logprobs.content for b in each.bytes or []).decode() == expected.text
    assert [len(each.top_logprobs) for each in choice.logprobs.content] == [2] * 9
    assert out.usage is not None
    assert out.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_how_many_tokens_a_chat_takes(api: openai.OpenAI) -> None:
    def count(**fields: Any) -> int:
        out = api.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"ignore_eos": True}, **fields)
        assert out.usage is not None
        return out.usage.completion_tokens

    assert count() == 24  # the door's default
    assert count(max_tokens=5) == 5
    assert count(max_tokens=5, max_completion_tokens=7) == 7


def test_variables_of_the_template_and_a_message_to_go_on_with(api: openai.OpenAI, engine: hybridgen.Engine) -> None:
    out = api.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_tokens=5,
        temperature=0,
        extra_body={"chat_template_kwargs": {"mood": "glad"}},
    )
    prompt = "<system>be brief\n<user>def f(x):\nglad\n<assistant>"
    assert out.choices[0].message.content == engine.generate(prompt, max_new_tokens=5, temperature=0).text
    go_on = [*MESSAGES, {"role": "assistant", "content": "    return"}]
    out = api.chat.completions.create(
        model="demo", messages=go_on, max_tokens=5, temperature=0, extra_body={"continue_final_message": True}
    )
    prompt = "<system>be brief\n<user>def f(x):\n<assistant>    return"
    assert out.choices[0].message.content == engine.generate(prompt, max_new_tokens=5, temperature=0).text


def test_a_stream_keeps_the_rules_that_clients_need(api: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 6, "temperature": 0.8, "seed": 5, "n": 2}
    whole = api.chat.completions.create(model="demo", messages=MESSAGES, **fields)
    stream = api.chat.completions.create(model="demo", messages=MESSAGES, stream=True, **fields)
    chunks = [chunk.model_dump(exclude_unset=True) for chunk in stream]
    texts, roles, ends = ["", ""], [0, 0], [None, None]
    for chunk in chunks:
        assert "usage" not in chunk
        [choice] = chunk["choices"]
        assert "finish_reason" in choice
        index, delta = choice["index"], choice["delta"]
        if not texts[index] and not roles[index]:
            assert delta["role"] == "assistant"
        roles[index] += "role" in delta
        texts[index] += delta.get("content", "")
        if choice["finish_reason"] is not None:
            assert delta == {}
            ends[index] = choice["finish_reason"]
    assert roles == [1, 1]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]


def test_usage_at_the_end_of_a_stream(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, max_tokens=3, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_tool_calls(calling: Any, engine: hybridgen.Engine) -> None:
    client, tokenizer = calling
    out = client.chat.completions.create(model="demo", messages=MESSAGES, tools=[TOOL], max_tokens=6, temperature=0)
    prompt = "<system>be brief\n<user>def f(x):\ntools: look \n<assistant>"
    expected = engine.generate(prompt, max_new_tokens=6, temperature=0)
    ids, prefix, tools = tokenizer.seen[0]
    assert (tuple(ids), tuple(prefix)) == (expected.token_ids, expected.prompt_token_ids)
    assert tools == [TOOL]
    message = out.choices[0].message
    assert out.choices[0].finish_reason == "tool_calls"
    assert message.content == "so"
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [{"x": 6}, {"x": 6}]
    assert len({call.id for call in message.tool_calls}) == 2
    # What came goes back in: arguments are text there and an object in the template.
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "5"} for call in message.tool_calls]
    again = client.chat.completions.create(
        model="demo",
        messages=[*MESSAGES, message.model_dump(), *answers],
        tools=[TOOL],
        tool_choice="none",
        max_tokens=4,
    )
    assert again.choices[0].finish_reason == "length"


def test_tool_calls_of_a_stream(calling: Any) -> None:
    client, _ = calling
    stream = client.chat.completions.create(model="demo", messages=MESSAGES, tools=[TOOL], max_tokens=6, stream=True)
    calls: dict[int, dict[str, str]] = {}
    content = ""
    ends = []
    for chunk in stream:
        [choice] = chunk.choices
        content += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            call = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
            call["arguments"] += part.function.arguments
        if choice.finish_reason:
            ends.append(choice.finish_reason)
    assert content == "so"
    assert ends == ["tool_calls"]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls.values()] == [("look", {"x": 6})] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL]}, "tools"),  # nothing reads its calls
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 10**6}, "max_completion_tokens"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"extra_body": {"chat_template_kwargs": {"self": 1}}}, "chat_template_kwargs"),
        ({"extra_body": {"chat_template_kwargs": {"truncation": True, "max_length": 2}}}, "chat_template_kwargs"),
        ({"extra_body": {"input": "x"}}, "input"),  # of another route
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$defs": ["x"]}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_what_is_wrong_is_named(api: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(**{"model": "demo", "messages": MESSAGES, **fields})
    assert caught.value.param == param


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def test_formats_of_a_chat(api: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": SCHEMA}}
    out = api.chat.completions.create(
        model="demo", messages=MESSAGES, response_format=form, temperature=2, seed=1, n=3, max_tokens=40
    )
    for choice in out.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    whole = api.chat.completions.create(
        model="demo", messages=MESSAGES, response_format={"type": "json_object"}, temperature=0, max_tokens=30
    )
    assert (whole.choices[0].message.content or "").startswith("{")
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        bad: Any = {
            "type": "json_schema",
            "json_schema": {"name": "it", "schema": {"type": "array", "uniqueItems": True}},
        }
        api.chat.completions.create(model="demo", messages=MESSAGES, response_format=bad)


def test_a_model_of_pydantic(api: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        city: Literal["Rome", "Oslo"]
        warm: bool

    out = api.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Answer, temperature=0, max_tokens=60
    )
    assert isinstance(out.choices[0].message.parsed, Answer)
    found = api.responses.parse(model="demo", input="x", text_format=Answer, temperature=0, max_output_tokens=60)
    assert isinstance(found.output_parsed, Answer)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_regex": "[0-9]{2}"}, "[0-9]{2}"),
        ({"guided_json": {"const": "é"}}, '"é"'),
        ({"structured_outputs": {"grammar": 'start: "<" /[xy]/ ">"'}}, "<[xy]>"),
    ],
)
def test_what_other_servers_clients_send(api: openai.OpenAI, extra: dict[str, Any], pattern: str) -> None:
    out = api.completions.create(model="demo", prompt="x", temperature=2, seed=0, max_tokens=20, extra_body=extra)
    assert re.fullmatch(pattern, out.choices[0].text)


WEIGH: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
STRICT = {
    "type": "object",
    "properties": {"x": {"enum": [1, 22]}},
    "required": ["x"],
    "additionalProperties": False,
}
LOOK: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": STRICT}}


@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_is_forced(api: openai.OpenAI, parallel: bool) -> None:
    """The demo model's tokenizer reads no calls: forced ones need none that does."""
    out = api.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        tools=[LOOK, WEIGH],
        tool_choice="required",
        parallel_tool_calls=parallel,
        temperature=2,
        seed=1,
        max_tokens=200,
    )
    [choice] = out.choices
    assert choice.finish_reason == "tool_calls"
    calls: Any = choice.message.tool_calls
    assert parallel or len(calls) == 1
    for call in calls:
        schema = {"look": STRICT, "weigh": WEIGH["function"]["parameters"]}[call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_call_of_one_function_is_forced(api: openai.OpenAI) -> None:
    one: Any = {"type": "function", "function": {"name": "look"}}
    fields: Any = {"model": "demo", "tools": [WEIGH, LOOK], "temperature": 2, "max_tokens": 60}
    stream = api.chat.completions.create(messages=MESSAGES, tool_choice=one, stream=True, **fields)
    parts = [chunk.choices[0] for chunk in stream]
    [call] = [call for part in parts for call in part.delta.tool_calls or ()]
    assert call.function is not None
    assert call.function.name == "look"
    jsonschema.validate(json.loads(call.function.arguments or ""), STRICT)
    assert [part.finish_reason for part in parts if part.finish_reason] == ["tool_calls"]
    flat: Any = {"type": "function", **LOOK["function"]}
    answer = api.responses.create(
        model="demo", input="x", tools=[flat], tool_choice={"type": "function", "name": "look"}, temperature=2
    )
    assert [item.type for item in answer.output] == ["function_call"]


def test_a_forced_call_of_a_schema_with_references(api: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Point"}},
        "required": ["at"],
        "additionalProperties": False,
        "$defs": {"Point": STRICT},
    }
    tool: Any = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    fields: Any = {"model": "demo", "messages": MESSAGES, "parallel_tool_calls": False, "temperature": 2}
    out = api.chat.completions.create(tools=[tool], tool_choice="required", max_tokens=90, seed=1, **fields)
    [call] = out.choices[0].message.tool_calls or ()
    jsonschema.validate(json.loads(call.function.arguments), parameters)  # type: ignore[union-attr]
    other = copy.deepcopy(tool)
    other["function"]["parameters"]["$defs"]["Point"] = {"type": "null"}
    with pytest.raises(openai.BadRequestError, match="Point"):
        api.chat.completions.create(tools=[tool, other], tool_choice="required", max_tokens=9, **fields)


def test_a_forced_call_that_is_cut_is_text(api: openai.OpenAI) -> None:
    out = api.chat.completions.create(
        model="demo", messages=MESSAGES, tools=[LOOK], tool_choice="required", max_tokens=3
    )
    assert out.choices[0].finish_reason == "length"
    assert out.choices[0].message.tool_calls is None
    assert out.choices[0].message.content


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [LOOK], "tool_choice": "sometimes"},
        {"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "weigh"}}},
        {"tools": [LOOK], "tool_choice": {"type": "allowed_tools"}},
        {"tools": [], "tool_choice": "required"},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}], "tool_choice": "required"},
        {"tools": [LOOK], "tool_choice": "required", "response_format": {"type": "json_object"}},
    ],
)
def test_a_call_that_cannot_be_forced(api: openai.OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        api.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=4, **fields)


def test_a_template_that_refuses_is_the_callers_error(api: openai.OpenAI) -> None:
    refused: Any = [{"role": "function", "name": "f", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match=r"refused the messages: .*no functions"):
        api.chat.completions.create(model="demo", messages=refused)
    with pytest.raises(openai.BadRequestError, match="no variable of a template"):
        api.chat.completions.create(
            model="demo", messages=MESSAGES, extra_body={"chat_template_kwargs": {"tokenize": False}}
        )


def test_a_response(api: openai.OpenAI, engine: hybridgen.Engine) -> None:
    out = api.responses.create(
        model="demo", instructions="be brief", input="def f(x):", max_output_tokens=9, temperature=0
    )
    expected = engine.generate(PROMPT, max_new_tokens=9, temperature=0)
    assert out.output_text == expected.text
    assert out.status == "incomplete"  # it met the limit
    assert out.usage is not None
    assert out.usage.output_tokens == 9
    items: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "def f(x):"}]},
    ]
    again = api.responses.create(model="demo", input=items, max_output_tokens=9, temperature=0)
    assert again.output_text == expected.text


def test_a_response_as_a_stream(api: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "demo", "input": "def f(x):", "max_output_tokens": 9, "temperature": 0}
    whole = api.responses.create(**fields)
    with api.responses.stream(**fields) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text


def test_calls_in_a_response(calling: Any) -> None:
    client, tokenizer = calling
    flat = {"type": "function", **TOOL["function"]}
    out = client.responses.create(model="demo", input="def f(x):", tools=[flat], max_output_tokens=6)
    assert [item.type for item in out.output] == ["message", "function_call", "function_call"]
    assert tokenizer.seen[0][2] == [TOOL]
    call = out.output[1]
    history: Any = [
        {"role": "user", "content": "def f(x):"},
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "5"},
    ]
    again = client.responses.create(model="demo", input=history, tools=[flat], max_output_tokens=4)
    assert "[look(6)]\n<tool>5" in tokenizer.decode(tokenizer.seen[1][1])
    assert again.output[1].name == "look"
    with client.responses.stream(model="demo", input="def f(x):", tools=[flat], max_output_tokens=6) as stream:
        events = list(stream)
    assert [item.type for item in events[-1].response.output] == ["message", "function_call", "function_call"]


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp-1"},
        {"input": [{"type": "input_image", "image_url": "x"}]},
        {"tools": [{"type": "web_search"}]},
        {"truncation": "auto"},
        {"text": {"format": {"type": "yaml"}}},
        {"reasoning": {"effort": [1]}},
        {"prompt": {"id": "pmpt-1"}},
        {"extra_body": {"max_tokens": 3}},
        {"extra_body": {"response_format": {"type": "json_object"}}},
    ],
)
def test_what_a_response_cannot_have(api: openai.OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        api.responses.create(**{"model": "demo", "input": "x", **fields})
