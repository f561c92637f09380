"""A `request` message as the service takes it."""

from __future__ import annotations

from typing import Any

from hybridgen.errors import PromptError, SamplingError, ServerError, shown
from hybridgen.params import SamplingParams
from hybridgen.serving.service.intake import Request, check_sampling
from hybridgen.serving.service.limits import Limits
from hybridgen.serving.unix.messages import sampling_from_wire

_FIELDS = {"type", "id", "prompts", "sampling", "stream", "echo", "brief"}


def read_request(message: dict[str, Any], size: int, limits: Limits) -> Request:
    """The request that a message stands for. The service checks the rest of its limits.

    Args:
        size: bytes of the message's frame.

    Raises:
        ServerError: it has an unknown field, or its sampling is over a limit.
        PromptError, SamplingError: its prompts are no list, or a sampling field is wrong.
    """
    unknown = next((name for name in message if name not in _FIELDS), None)
    if unknown is not None:
        raise ServerError(f"a request has the unknown field {shown(unknown)}", "request_message")
    for name in ("stream", "echo", "brief"):
        if not isinstance(message.get(name, False), bool):
            raise ServerError(f"{name}={shown(message[name])}; give true or false", "request_message")
    prompts = message.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        raise PromptError(f"prompts={shown(prompts)} is not a list with at least one prompt")
    if len(prompts) > limits.batch:
        raise ServerError(f"{len(prompts)} prompts are over the limit of {limits.batch}; send more requests", "limit")
    sampling = _read_sampling(message.get("sampling", {}), len(prompts), limits)
    stream, echo, brief = (message.get(name, False) for name in ("stream", "echo", "brief"))
    return Request(prompts, sampling, stream, echo, size, brief)


def _read_sampling(wire: Any, count: int, limits: Limits) -> list[SamplingParams]:
    if not isinstance(wire, list):
        check_sampling([wire] if isinstance(wire, dict) else [], limits)
        return [sampling_from_wire(wire)] * count
    if len(wire) != count:
        raise SamplingError(f"sampling has {len(wire)} entries for {count} prompt(s); give one per prompt, or one")
    check_sampling([item for item in wire if isinstance(item, dict)], limits)
    return [sampling_from_wire(item) for item in wire]
