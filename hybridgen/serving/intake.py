"""A request message, checked against the limits before anything is made of it."""

from __future__ import annotations

from typing import Any

from hybridgen.errors import PromptError, SamplingError, ServerError, shown
from hybridgen.params import SamplingParams
from hybridgen.serving.generator import Key, Submit
from hybridgen.serving.limits import Limits
from hybridgen.serving.messages import sampling_from_wire

_FIELDS = {"type", "id", "prompts", "sampling", "stream", "echo"}


def read_request(key: Key, message: dict[str, Any], limits: Limits, max_context: int) -> Submit:
    """The command that a `request` message stands for. Its prompts are encoded later, by the generator.

    Args:
        max_context: tokens that the model takes at most.

    Raises:
        ServerError: it has an unknown field, or is over a limit.
        PromptError, SamplingError: a prompt or a sampling field is wrong.
    """
    unknown = sorted(message.keys() - _FIELDS)
    if unknown:
        raise ServerError(f"a request has the unknown field {shown(unknown[0])}", "request_message")
    for name in ("stream", "echo"):
        if not isinstance(message.get(name, False), bool):
            raise ServerError(f"{name}={shown(message[name])}; give true or false", "request_message")
    prompts = message.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        raise PromptError(f"prompts={shown(prompts)} is not a list with at least one prompt")
    if len(prompts) > limits.batch:
        raise ServerError(f"{len(prompts)} prompts are over the limit of {limits.batch}; send more requests", "limit")
    weight = sum(_check_prompt(index, prompt, limits, max_context) for index, prompt in enumerate(prompts))
    sampling = _read_sampling(message.get("sampling", {}), len(prompts))
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
    return Submit(key, prompts, sampling, message.get("stream", False), message.get("echo", False), weight)


def _read_sampling(wire: Any, count: int) -> list[SamplingParams]:
    if not isinstance(wire, list):
        return [sampling_from_wire(wire)] * count
    if len(wire) != count:
        raise SamplingError(f"sampling has {len(wire)} entries for {count} prompt(s); give one per prompt, or one")
    return [sampling_from_wire(item) for item in wire]


def _check_prompt(index: int, prompt: Any, limits: Limits, max_context: int) -> int:
    """About the bytes that it takes, if nothing is wrong with it."""
    if not isinstance(prompt, (str, list)):
        raise PromptError(f"prompt {index} is {shown(prompt)}; give text, a list of token ids, or chat messages")
    if isinstance(prompt, list) and len(prompt) > max_context:
        raise PromptError(f"prompt {index} has {len(prompt)} items, over the context of {max_context}; shorten it")
    chars = _chars(prompt)
    if chars > limits.prompt_chars:
        raise ServerError(
            f"prompt {index} has {chars} characters, over the limit of {limits.prompt_chars}; shorten it", "limit"
        )
    return chars + 8 * len(prompt)


def _chars(value: Any) -> int:
    """Characters of all texts in a JSON value. Its depth is limited."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _chars(item) for key, item in value.items())
    return sum(map(_chars, value)) if isinstance(value, list) else 0
