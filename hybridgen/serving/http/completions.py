"""`/v1/completions`: text goes on from a prompt."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias

from hybridgen.core import Completion, TokenEvent, TokenLogprob
from hybridgen.errors import shown
from hybridgen.serving.http.errors import ApiError
from hybridgen.serving.http.fields import GRAMMARS, Body
from hybridgen.serving.http.jobs import (
    MOST_TOP,
    Served,
    Usage,
    choices_of,
    finite,
    most_tokens,
    new_id,
    reason,
    sampling_for,
)
from hybridgen.serving.http.text import Text

FIELDS = frozenset({"prompt", "max_tokens", "logprobs", "echo", "stream", "stream_options", "add_special_tokens"})
DEFAULT_TOKENS = 16
"""OpenAI's."""
BRIEF_CHARS = 2000
"""Text that is encoded in less than a millisecond."""
_LONG = (
    "echo",
    "logprobs",
    "structured_outputs",
    *(f"guided_{name}" for name in GRAMMARS),
)
_Entry: TypeAlias = "tuple[int, TokenLogprob | None]"
"""A token and its log-probability."""


class TextJob:
    """A request to `/v1/completions`."""

    ends_with_done = True

    def __init__(self, served: Served, body: Body) -> None:
        """Check a request and encode its prompts.

        Raises:
            ApiError: a field is wrong.
        """
        served.check_model(body)
        body.check_known(FIELDS, served.ignored)
        self._served = served
        self.stream = body.switch("stream")
        self._usage_asked = bool(body.table("stream_options").get("include_usage"))
        self._echo = body.switch("echo")
        logprobs = body.number("logprobs", 0, MOST_TOP, whole=True)
        self._scored = self._echo and logprobs is not None
        if self._scored and self.stream:
            raise ApiError(
                "echo with logprobs comes whole; leave stream out", param="stream", code="unsupported_parameter"
            )
        special = body.switch("add_special_tokens", True)
        self._texts = list(prompts_of(body))
        self.prompts = [
            served.text.encode(each, special=special) if isinstance(each, str) else each for each in self._texts
        ]
        for index, prompt in enumerate(self.prompts):
            if not prompt:
                raise ApiError(f"prompt {index} has no tokens; send at least one", param="prompt")
        wanted = most_tokens(body, "max_tokens", least=int(not self._scored))
        wanted = DEFAULT_TOKENS if wanted is None else wanted
        self.sampling = sampling_for(
            served,
            body,
            self.prompts,
            wanted,
            "max_tokens",
            logprobs=logprobs,
            prompt_logprobs=logprobs if self._scored else None,
        )
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    @staticmethod
    def brief(body: Body) -> bool:
        """Ids and short texts, with nothing asked for that reads or writes the text of single tokens, or a grammar."""
        if any(name in body.values for name in _LONG):
            return False
        prompt = body.values.get("prompt")
        items = prompt if isinstance(prompt, list) else [prompt]
        return sum(len(each) for each in items if isinstance(each, str)) <= BRIEF_CHARS

    def _prompt_text(self, index: int) -> str:
        """What `echo` puts before the text."""
        prompt = self._texts[index]
        return prompt if isinstance(prompt, str) else self._served.text.decode(prompt)

    def _entries(self, prompt: Sequence[int], completion: Completion) -> list[_Entry]:
        """Each token with its log-probability; with `echo`, those of the prompt come first."""
        entries: list[_Entry] = []
        if self._scored:
            entries += zip(prompt, completion.prompt_logprobs or (), strict=True)
        return entries + [(item.token_id, item) for item in completion.logprobs or ()]

    def result(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The whole answer."""
        usage, choices, n = Usage(), [], self.sampling.n
        for index, completion in choices_of(completions, n):
            prompt = self.prompts[index // n]
            before = self._prompt_text(index // n) if self._echo else ""
            logprobs = None
            if self.sampling.logprobs is not None:
                logprobs = legacy_logprobs(self._served.text, self._entries(prompt, completion), 0)
            choices.append(
                {
                    "index": index,
                    "text": before + completion.text,
                    "logprobs": logprobs,
                    "finish_reason": reason(completion),
                }
            )
            usage.add(completion, None if index % n else prompt)
        return self._head | {"choices": choices, "usage": usage.as_dict()}

    async def chunks(self, events: AsyncIterator[TokenEvent]) -> AsyncIterator[tuple[str | None, dict[str, Any]]]:
        """The answer in parts."""
        n, usage = self.sampling.n, Usage()
        offsets: dict[int, int] = {}
        more: dict[str, Any] = {"usage": None} if self._usage_asked else {}
        async for event in events:
            index = event.index * n + event.choice
            text = event.text
            if index not in offsets:
                offsets[index] = 0
                if self._echo:
                    text = self._prompt_text(event.index) + text
            logprobs = None
            if event.logprob is not None:
                logprobs = legacy_logprobs(self._served.text, [(event.logprob.token_id, event.logprob)], offsets[index])
                offsets[index] += len(logprobs["tokens"][0])
            if text or logprobs is not None:
                choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
                yield None, self._head | {"choices": [choice]} | more
            if event.completion is not None:
                usage.add(event.completion, None if event.choice else self.prompts[event.index])
                choice = {"index": index, "text": "", "logprobs": None, "finish_reason": reason(event.completion)}
                yield None, self._head | {"choices": [choice]} | more
        if self._usage_asked:
            yield None, self._head | {"choices": [], "usage": usage.as_dict()}


def prompts_of(body: Body) -> list[str | list[int]]:
    """The prompts: a text, a list of texts, a list of ids, or a list of these.

    Raises:
        ApiError: it is something else.
    """
    prompt = body.values.get("prompt")
    items: list[Any] = prompt if isinstance(prompt, list) else [prompt]
    if items and all(type(each) is int for each in items):
        items = [items]
    if not items:
        raise ApiError("prompt is an empty list; send at least one prompt", param="prompt")
    for each in items:
        if isinstance(each, str) or (isinstance(each, list) and all(type(token) is int for token in each)):
            continue
        raise ApiError(
            f"prompt={shown(prompt)}; give a string, a list of strings, token ids or a list of those", param="prompt"
        )
    return items


def legacy_logprobs(text: Text, entries: Sequence[_Entry], offset: int) -> dict[str, Any]:
    """Log-probabilities as this route has them; a prompt's first token has none.

    Args:
        offset: characters of the tokens before.
    """
    tokens = [text.token(token) for token, _ in entries]
    items = [item for _, item in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if item is None else finite(item.logprob) for item in items],
        "top_logprobs": [None if item is None else _likely(text, item) for item in items],
        "text_offset": offsets,
    }


def _likely(text: Text, item: TokenLogprob) -> dict[str, float]:
    """The most likely tokens, and the chosen one, as OpenAI has it: it may be one more than was asked for."""
    return {text.token(token): finite(value) for token, value in (*item.top, (item.token_id, item.logprob))}
