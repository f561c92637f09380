"""What every route that generates has in common: a job with prompts, and how its answers are counted."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hybridgen.core import Completion, FinishReason, TokenEvent, TokenLogprob
from hybridgen.params import SamplingParams
from hybridgen.serving.http.errors import ApiError
from hybridgen.serving.http.fields import Body, Ignored, sampling_of
from hybridgen.serving.http.text import Text

MOST_TOP = 20
"""Most likely tokens that can be asked for, as with OpenAI."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model behind the door."""

    name: str
    text: Text
    max_context: int
    """Tokens of prompt and output together."""
    default_tokens: int
    """Generated at most where a chat does not say how many."""
    created: int = field(default_factory=lambda: int(time.time()))
    ignored: Ignored = field(default_factory=Ignored)

    def check_model(self, body: Body) -> None:
        """
        Raises:
            ApiError: another model is asked for.
        """
        name = body.text("model", self.name)
        if name != self.name:
            raise ApiError(
                f"the model {name!r} does not exist here; this server has {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )


class Job(Protocol):
    """A request that was checked."""

    prompts: list[list[int]]
    sampling: SamplingParams
    stream: bool

    def __init__(self, served: Served, body: Body) -> None:
        """Check a request and encode its prompts.

        Raises:
            ApiError: a field is wrong.
        """

    @staticmethod
    def brief(body: Body) -> bool:
        """Whether reading the request and writing its answer takes less time than it takes to wake a thread for them.

        What is not brief goes to a thread, so that others need not wait for it. What is brief must not: while many
        requests come at once, threads wait for each other, and the first of them reaches the server after the last was
        read.
        """

    def result(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The whole answer."""

    def chunks(self, events: AsyncIterator[TokenEvent]) -> AsyncIterator[tuple[str | None, dict[str, Any]]]:
        """The answer in parts, each with the name of its event, if it has one."""

    @property
    def ends_with_done(self) -> bool:
        """Whether the stream ends with `[DONE]`."""


def tokens_left(served: Served, prompt: Sequence[int], wanted: int | None, param: str) -> int:
    """How many tokens may be generated after a prompt.

    Args:
        wanted: by the request; None: the server's default, as far as the context goes.

    Raises:
        ApiError: there is no room for them, with OpenAI's code.
    """
    left = served.max_context - len(prompt)
    if (1 if wanted is None else wanted) > left:
        after = "" if wanted is None else f" and {param}={wanted}"
        raise ApiError(
            # The words that clients look for, beside the code.
            f"this model's maximum context length is {served.max_context} tokens, and the prompt has "
            f"{len(prompt)}{after}; shorten the prompt or ask for less",
            param=param,
            code="context_length_exceeded",
        )
    return min(left, served.default_tokens) if wanted is None else wanted


def most_tokens(body: Body, *names: str, least: int = 1) -> int | None:
    """The first of these fields that is set: how many tokens to generate at most."""
    for name in names:
        found = body.number(name, least, 2**31, whole=True)
        if found is not None:
            return int(found)
    return None


def sampling_for(
    served: Served, body: Body, prompts: Sequence[Sequence[int]], wanted: int | None, param: str, **more: Any
) -> SamplingParams:
    """The sampling of all prompts of a request.

    Args:
        more: see `sampling_of`.

    Raises:
        ApiError: a field has a wrong value, or a prompt leaves no room.
    """
    most = min(tokens_left(served, prompt, wanted, param) for prompt in prompts)
    return sampling_of(body, max_new_tokens=most, **more)


def new_id(kind: str) -> str:
    """A name for something that is answered."""
    return f"{kind}-{uuid.uuid4().hex}"


def reason(completion: Completion) -> str:
    """OpenAI's word for why it ended.

    Raises:
        Exception: the one that it ended with.
    """
    if completion.error is not None:
        raise completion.error
    return "length" if completion.finish_reason is FinishReason.LENGTH else "stop"


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def add(self, completion: Completion, prompt: Sequence[int] | None) -> None:
        """Count a completion; with the ids of its prompt, for one completion of each prompt."""
        if prompt is not None:
            self.prompt += len(prompt)
            self.cached += completion.cached_tokens
        self.completion += len(completion.token_ids)

    def as_dict(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def choices_of(completions: Sequence[Completion], n: int) -> list[tuple[int, Completion]]:
    """All completions with OpenAI's index: prompt by prompt, each with its `n`."""
    return [
        (index * n + choice, each)
        for index, completion in enumerate(completions)
        for choice, each in enumerate(completion.choices or (completion,))
    ]


def chat_logprob(text: Text, item: TokenLogprob) -> dict[str, Any]:
    """A token's log-probability as chats have it."""

    def entry(token_id: int, value: float) -> dict[str, Any]:
        data = text.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": finite(value)}

    return entry(item.token_id, item.logprob) | {"top_logprobs": [entry(*each) for each in item.top]}


def finite(value: float) -> float:
    """The number, as far as JSON has one: OpenAI writes -9999 for impossible."""
    return max(value, -9999.0) if value == value else -9999.0
