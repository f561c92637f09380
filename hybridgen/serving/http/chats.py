"""`/v1/chat/completions`: the next message of a chat, with tool calls where the tokenizer can read them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from hybridgen.core import Completion, TokenEvent
from hybridgen.serving.http.errors import ApiError
from hybridgen.serving.http.fields import Body, schema_of
from hybridgen.serving.http.jobs import (
    MOST_TOP,
    Served,
    Usage,
    chat_logprob,
    choices_of,
    most_tokens,
    new_id,
    reason,
    sampling_for,
)
from hybridgen.serving.http.text import Text, chat_messages
from hybridgen.serving.http.tools import Tools, message_parts
from hybridgen.text.chat_templates import NOT_VARIABLES

FIELDS = frozenset(
    {
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "modalities",
        "reasoning_effort",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
    }
)


class ChatJob:
    """A request to `/v1/chat/completions`."""

    ends_with_done = True

    @staticmethod
    def brief(body: Body) -> bool:
        """A template is rendered, and the answer is read for reasoning and tools."""
        return False

    def __init__(self, served: Served, body: Body) -> None:
        """Check a request and encode its messages. It takes long: call it in another thread.

        Raises:
            ApiError: a field is wrong.
            HybridgenError: the chat cannot be encoded.
        """
        served.check_model(body)
        body.check_known(FIELDS, served.ignored)
        form = schema_of(body, body.table("response_format"), "response_format")
        if body.values.get("modalities", ["text"]) != ["text"]:
            raise body.wrong("modalities", '["text"]')
        self._served = served
        self.stream = body.switch("stream")
        self._usage_asked = bool(body.table("stream_options").get("include_usage"))
        self._tools = Tools(served.text, body)
        form |= self._tools.form(form, "response_format")
        logprobs = None
        if body.switch("logprobs"):
            logprobs = body.number("top_logprobs", 0, MOST_TOP, whole=True) or 0
        elif "top_logprobs" in body.values:
            raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
        go_on = body.switch("continue_final_message")
        options = template_options(body, turn(body.switch("add_generation_prompt", not go_on), go_on))
        if "reasoning_effort" in body.values:
            options.setdefault("reasoning_effort", body.text("reasoning_effort"))
        prompt = encode(served.text, chat_messages(body.items("messages")), self._tools.told, options)
        self.prompts = [prompt]
        wanted = most_tokens(body, "max_completion_tokens", "max_tokens")
        self.sampling = sampling_for(
            served, body, self.prompts, wanted, "max_completion_tokens", logprobs=logprobs, **form
        )
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": served.name}

    def _message(self, completion: Completion) -> tuple[dict[str, Any], str]:
        """The message of a completion, and why it ended."""
        ended = reason(completion)
        message = self._tools.message(completion, self.prompts[0])
        return message, "tool_calls" if "tool_calls" in message else ended

    def result(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The whole answer."""
        usage, choices = Usage(), []
        for index, completion in choices_of(completions, self.sampling.n):
            message, ended = self._message(completion)
            logprobs = None
            if completion.logprobs is not None:
                logprobs = {"content": [chat_logprob(self._served.text, item) for item in completion.logprobs]}
            choices.append(
                {
                    "index": index,
                    "message": {"refusal": None, **message},
                    "logprobs": logprobs,
                    "finish_reason": ended,
                }
            )
            usage.add(completion, None if index else self.prompts[0])
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage.as_dict()}

    async def chunks(self, events: AsyncIterator[TokenEvent]) -> AsyncIterator[tuple[str | None, dict[str, Any]]]:
        """The answer in parts. With tools, a message comes when it is complete: only then it is known what it is."""
        usage, begun = Usage(), set()
        head = self._head | {"object": "chat.completion.chunk"}
        more: dict[str, Any] = {"usage": None} if self._usage_asked else {}

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, ended: str | None = None) -> Any:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": ended}
            return None, head | {"choices": [choice]} | more

        async for event in events:
            index = event.choice
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            logprobs = None
            if event.logprob is not None:
                logprobs = {"content": [chat_logprob(self._served.text, event.logprob)]}
            text = "" if self._tools.read else event.text
            if text or logprobs is not None:
                yield chunk(index, {"content": text}, logprobs)
            if event.completion is None:
                continue
            usage.add(event.completion, None if index else self.prompts[0])
            message, ended = self._message(event.completion)
            if self._tools.read:
                for part in message_parts(message):
                    yield chunk(index, part)
            yield chunk(index, {}, ended=ended)
        if self._usage_asked:
            yield None, head | {"choices": [], "usage": usage.as_dict()}


def turn(generation_prompt: bool, go_on: bool) -> dict[str, Any]:
    """How the template ends the prompt.

    Raises:
        ApiError: both ways are asked for.
    """
    if generation_prompt and go_on:
        raise ApiError("continue_final_message and add_generation_prompt exclude each other; give one of them")
    return {"continue_final_message": True} if go_on else {"add_generation_prompt": generation_prompt}


def encode(
    text: Text, messages: list[dict[str, Any]], tools: list[dict[str, Any]], options: dict[str, Any]
) -> list[int]:
    """Ids of a chat.

    Raises:
        HybridgenError: the chat cannot be encoded.
    """
    return text.encode_chat(messages, **options, **({"tools": tools} if tools else {}))


def template_options(body: Body, ending: dict[str, Any]) -> dict[str, Any]:
    """What a request hands to the template.

    Args:
        ending: how the template ends the prompt, see `turn`.

    Raises:
        ApiError: `chat_template_kwargs` has a name that is no variable of a template.
    """
    given = body.table("chat_template_kwargs")
    for name in sorted(NOT_VARIABLES & given.keys()):
        raise ApiError(
            f"chat_template_kwargs has {name}, which is no variable of a template; leave it out, or give it as a field "
            "of the request if it is one",
            param="chat_template_kwargs",
        )
    return given | ending
