"""A request, checked against the limits before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from hybridgen.errors import PromptError, SamplingError, ServerError, shown
from hybridgen.params import SamplingParams
from hybridgen.serving.service.limits import Limits

STOP_CHAR_BYTES = 256
"""Memory that one character of a stop string takes, about: the search for it has a state per character."""

_LONGEST_NAME = 100


class Request(NamedTuple):
    """What a client asks for, as its door read it."""

    prompts: list[Any]
    """Of JSON values."""
    sampling: list[SamplingParams]
    """One for each prompt."""
    stream: bool
    echo: bool
    """Whether the first token of each completion brings the prompt's ids."""
    size: int
    """Bytes that it had when it came; what it takes of the limit `held` while it waits."""
    brief: bool = False
    """Whether completions come without the prompt's ids and the times of tokens."""


def check_request(request: Request, limits: Limits, max_context: int) -> int:
    """Check a request; returns about how many bytes it takes.

    Args:
        max_context: tokens that the model takes at most.

    Raises:
        ServerError: it is over a limit.
        PromptError: something is no prompt.
    """
    prompts, sampling = request.prompts, request.sampling
    if len(prompts) > limits.batch:
        raise ServerError(f"{len(prompts)} prompts are over the limit of {limits.batch}; send more requests", "limit")
    for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        _check_prompt(index, prompt, limits, max_context if params.truncate_prompt is None else None)
    stop_chars = check_sampling(map(vars, _distinct(sampling)), limits)
    for params in sampling:
        if params.n > limits.n:
            raise ServerError(f"n={params.n} is over the limit of {limits.n}; send more requests", "limit")
    total = sum(params.n for params in sampling)
    if total > limits.queue:
        raise ServerError(
            f"{total} completions are over the limit of {limits.queue}, so that they never fit the queue; send less at "
            "once",
            "limit",
        )
    return request.size + sum(8 * _length(prompt) for prompt in prompts) + STOP_CHAR_BYTES * stop_chars


def check_sampling(sampling: Iterable[Mapping[str, Any]], limits: Limits) -> int:
    """Check how much the sampling fields of a request hold, all together; returns the characters of its strings.

    It looks at any field, so that one that comes later is limited too. A door calls it before it makes
    `SamplingParams` of what came.

    Args:
        sampling: fields by their names, once for each that differs.

    Raises:
        ServerError: strings or ids are over a limit.
        SamplingError: a name is longer than that of any field.
    """
    strings: set[str] = set()
    chars = ids = 0
    for fields in sampling:
        for name, value in fields.items():
            if len(name) > _LONGEST_NAME:
                raise SamplingError(f"sampling: unknown keyword {shown(name)}")
            for item in _leaves(value):
                ids += 1
                if isinstance(item, str) and item not in strings:
                    strings.add(item)
                    chars += len(item)
                if len(strings) > limits.stop_strings:
                    raise ServerError(
                        f"the stop strings of a request are over the limit of {limits.stop_strings}; give fewer",
                        "limit",
                    )
                if chars > limits.stop_chars:
                    raise ServerError(
                        f"the stop strings of a request have over {limits.stop_chars} characters, the limit; give "
                        "shorter ones",
                        "limit",
                    )
                if ids > limits.sampling_ids:
                    raise ServerError(
                        f"the sampling of a request has over {limits.sampling_ids} ids and biases, the limit; give "
                        "fewer",
                        "limit",
                    )
    return chars


def _leaves(value: Any) -> Iterator[Any]:
    """Strings, and one item for each member of a list or an object. A number alone is none: it takes no room."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield None
            yield from _leaves(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            if not isinstance(item, str):
                yield None
            yield from _leaves(item)


def _distinct(sampling: list[SamplingParams]) -> Iterable[SamplingParams]:
    return {id(params): params for params in sampling}.values()


def _check_prompt(index: int, prompt: Any, limits: Limits, max_context: int | None) -> None:
    parts = list(prompt.values()) if isinstance(prompt, dict) and "completion" in prompt else [prompt]
    for part in parts:
        if not isinstance(part, (str, list, dict)):
            raise PromptError(f"prompt {index} is {shown(prompt)}; give text, a list of token ids, or a chat")
        if isinstance(part, list) and max_context is not None and len(part) > max_context:
            raise PromptError(f"prompt {index} has {len(part)} items, over the context of {max_context}; shorten it")
    chars = _chars(prompt)
    if chars > limits.prompt_chars:
        raise ServerError(
            f"prompt {index} has {chars} characters, over the limit of {limits.prompt_chars}; shorten it", "limit"
        )


def _length(prompt: Any) -> int:
    """Characters, ids or messages; of a prompt and its completion together."""
    return sum(map(len, prompt.values())) if isinstance(prompt, dict) else len(prompt)


def _chars(value: Any) -> int:
    """Characters of all texts in a JSON value. Its depth is limited."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _chars(item) for key, item in value.items())
    return sum(map(_chars, value)) if isinstance(value, list) else 0
