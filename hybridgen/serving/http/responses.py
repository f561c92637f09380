"""`/v1/responses`: OpenAI's newer route, for text in, text and tool calls out. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from hybridgen.core import Completion, TokenEvent
from hybridgen.errors import shown
from hybridgen.serving.http.chats import encode, template_options
from hybridgen.serving.http.errors import ApiError
from hybridgen.serving.http.fields import Body, schema_of
from hybridgen.serving.http.jobs import Served, Usage, most_tokens, new_id, reason, sampling_for
from hybridgen.serving.http.text import chat_messages
from hybridgen.serving.http.tools import Tools

FIELDS = frozenset(
    {
        "input",
        "instructions",
        "max_output_tokens",
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "text",
        "reasoning",
        "chat_template_kwargs",
        "truncation",
    }
)


class ResponseJob:
    """A request to `/v1/responses`."""

    ends_with_done = False

    @staticmethod
    def brief(body: Body) -> bool:
        """A template is rendered, and the answer is read for reasoning and tools."""
        return False

    def __init__(self, served: Served, body: Body) -> None:
        """Check a request and encode its input. It takes long: call it in another thread.

        Raises:
            ApiError: a field is wrong.
            HybridgenError: the chat cannot be encoded.
        """
        served.check_model(body)
        body.check_known(FIELDS, served.ignored)
        if body.number("n", 1, 1, whole=True) not in (None, 1):
            raise body.wrong("n", "1")
        if body.text("truncation", "disabled") != "disabled":
            raise body.wrong("truncation", "disabled: no input is cut without a word")
        form = body.table("text").get("format") or {}
        schema = schema_of(body, form if isinstance(form, dict) else {"type": form}, "text")
        self._served = served
        self.stream = body.switch("stream")
        self._given_tools = body.items("tools")
        nested = [_nested(index, each) for index, each in enumerate(self._given_tools)]
        self._tools = Tools(served.text, Body({**body.values, "tools": nested}))
        schema |= self._tools.form(schema, "text")
        self._instructions = body.text("instructions") or None
        messages = input_messages(body.values.get("input"))
        if self._instructions:
            messages = [{"role": "system", "content": self._instructions}, *messages]
        options = template_options(body, {"add_generation_prompt": True})
        effort = body.table("reasoning").get("effort")
        if effort is not None:
            if not isinstance(effort, str):
                raise body.wrong("reasoning", "an object whose effort is a string")
            options.setdefault("reasoning_effort", effort)
        self.prompts = [encode(served.text, chat_messages(messages), self._tools.told, options)]
        self._wanted = most_tokens(body, "max_output_tokens")
        self.sampling = sampling_for(served, body, self.prompts, self._wanted, "max_output_tokens", **schema)
        self._id, self._created = new_id("resp"), int(time.time())
        self._item = new_id("msg")

    def _response(self, status: str, output: list[dict[str, Any]], completion: Completion | None) -> dict[str, Any]:
        usage = None
        incomplete = None
        if completion is not None:
            counted = Usage()
            counted.add(completion, self.prompts[0])
            usage = {
                "input_tokens": counted.prompt,
                "input_tokens_details": {"cached_tokens": counted.cached},
                "output_tokens": counted.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted.prompt + counted.completion,
            }
            if reason(completion) == "length":
                status, incomplete = "incomplete", {"reason": "max_output_tokens"}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": self._instructions,
            "max_output_tokens": self._wanted,
            "model": self._served.name,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": self.sampling.temperature,
            "tool_choice": self._tools.choice,
            "tools": self._given_tools,
            "top_p": self.sampling.top_p,
            "truncation": "disabled",
            "usage": usage,
            "metadata": {},
        }

    def _text_item(self, text: str, status: str = "completed") -> dict[str, Any]:
        content = [] if status == "in_progress" else [_part(text)]
        return {"id": self._item, "type": "message", "status": status, "role": "assistant", "content": content}

    def _output(self, completion: Completion) -> list[dict[str, Any]]:
        """The items of a completion."""
        reason(completion)  # it may have ended with an error
        message = self._tools.message(completion, self.prompts[0])
        items = []
        if message.get("content"):
            items.append(self._text_item(message["content"]))
        for call in message.get("tool_calls", ()):
            function = call["function"]
            items.append(
                {"id": new_id("fc"), "type": "function_call", "status": "completed", "call_id": call["id"], **function}
            )
        return items or [self._text_item("")]

    def result(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The whole answer."""
        [completion] = completions
        return self._response("completed", self._output(completion), completion)

    async def chunks(self, events: AsyncIterator[TokenEvent]) -> AsyncIterator[tuple[str | None, dict[str, Any]]]:
        """The answer as named events, numbered. With tools, items come when they are complete."""
        number = 0

        def event(kind: str, **values: Any) -> tuple[str, dict[str, Any]]:
            nonlocal number
            number += 1
            return kind, {"type": kind, "sequence_number": number - 1, **values}

        begun = False
        async for each in events:
            if not begun:
                begun = True
                yield event("response.created", response=self._response("in_progress", [], None))
                yield event("response.in_progress", response=self._response("in_progress", [], None))
                if not self._tools.read:
                    for kind, values in self._opening(0):
                        yield event(kind, **values)
            if each.text and not self._tools.read:
                where = {"item_id": self._item, "output_index": 0, "content_index": 0}
                yield event("response.output_text.delta", **where, delta=each.text, logprobs=[])
            if each.completion is None:
                continue
            output = self._output(each.completion)
            for index, item in enumerate(output):
                if item["type"] == "message":
                    if self._tools.read:
                        for kind, values in self._opening(index):
                            yield event(kind, **values)
                    for kind, values in self._closing(index, item):
                        yield event(kind, **values)
                else:
                    yield event("response.output_item.added", output_index=index, item={**item, "arguments": ""})
                    where = {"item_id": item["id"], "output_index": index}
                    yield event("response.function_call_arguments.delta", **where, delta=item["arguments"])
                    yield event("response.function_call_arguments.done", **where, arguments=item["arguments"])
                    yield event("response.output_item.done", output_index=index, item=item)
            response = self._response("completed", output, each.completion)
            yield event(f"response.{response['status']}", response=response)

    def _opening(self, index: int) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "response.output_item.added", {"output_index": index, "item": self._text_item("", "in_progress")}
        where = {"item_id": self._item, "output_index": index, "content_index": 0}
        yield "response.content_part.added", {**where, "part": _part("")}

    def _closing(self, index: int, item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        text = item["content"][0]["text"]
        where = {"item_id": self._item, "output_index": index, "content_index": 0}
        yield "response.output_text.done", {**where, "text": text, "logprobs": []}
        yield "response.content_part.done", {**where, "part": _part(text)}
        yield "response.output_item.done", {"output_index": index, "item": item}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _nested(index: int, tool: Any) -> dict[str, Any]:
    """A function as chats write it: this route has it flat.

    Raises:
        ApiError: it is no function.
    """
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise ApiError(f"tools[{index}] is of type {shown(kind)}; this server has functions alone", param="tools")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def input_messages(given: Any) -> list[dict[str, Any]]:
    """The messages of an input: a text, or items.

    Raises:
        ApiError: an item is of another kind.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ApiError(f"input={shown(given)}; give a string or a list of messages", param="input")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if messages and "tool_calls" in messages[-1]:
                messages[-1]["tool_calls"].append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":  # what the model thought before is not fed again
            raise ApiError(f"input[{index}] is {shown(item, 60)}; this server takes messages and calls", param="input")
    return messages
