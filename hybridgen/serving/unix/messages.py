"""What the messages hold: requests, events, completions and errors as JSON values, and back.

A float that JSON lacks is one of the strings `"nan"`, `"inf"` and `"-inf"`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from hybridgen import errors
from hybridgen.arguments import check_keywords
from hybridgen.core import Completion, FinishReason, StepSummary, Timing, TokenEvent, TokenLogprob
from hybridgen.errors import shown
from hybridgen.params import SamplingParams
from hybridgen.serving.unix.frames import HEADER

VERSION = 1
"""Of the protocol."""
MAX_ID = 2**53 - 1
"""Ids of requests are integers that every JSON reader keeps exact."""

CODES: dict[str, type[errors.HybridgenError]] = {
    "config": errors.ConfigError,
    "sampling": errors.SamplingError,
    "prompt": errors.PromptError,
    "tokenizer": errors.TokenizerError,
    "request": errors.RequestError,
    "out_of_memory": errors.OutOfMemoryError,
    "device": errors.DeviceError,
    "engine": errors.EngineError,
}
"""Codes that stand for an exception of the engine; the others become a `ServerError` with that code."""

_PATH = re.compile(r"(?<![\w.<])~?(?:/[^\s/'\"`:,;()\[\]{}<>]+){2,}/?")
_DEFAULTS = SamplingParams()


def number(value: float) -> float | str:
    """A float, or its name where JSON has no number for it."""
    if math.isfinite(value):
        return value
    return "nan" if value != value else "inf" if value > 0 else "-inf"


def to_float(value: Any) -> float:
    """What `number()` was given.

    Raises:
        ValueError: it is something else.
    """
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{shown(value)} is not a number")
    return value


def sampling_to_wire(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from the defaults."""
    wire: dict[str, Any] = {}
    for field in fields(SamplingParams):
        value = getattr(params, field.name)
        if value == getattr(_DEFAULTS, field.name):
            continue
        if field.metadata.get("functions"):
            raise errors.SamplingError(f"{field.name} are functions, which cannot be sent to a server; use an Engine")
        if field.name == "logit_bias":
            value = {str(token): number(bias) for token, bias in value.items()}
        elif field.name == "sequence_bias":
            value = [[list(ids), number(bias)] for ids, bias in value]
        wire[field.name] = list(value) if isinstance(value, tuple) else value
    return wire


def sampling_from_wire(wire: Any) -> SamplingParams:
    """What `sampling_to_wire()` was given.

    Raises:
        SamplingError: it is no object, a field is unknown, or a value is out of its range.
    """
    if not isinstance(wire, dict):
        raise errors.SamplingError(f"sampling={shown(wire)} is not an object; give one with SamplingParams fields")
    try:
        check_keywords(wire, SamplingParams.field_names())
    except errors.ConfigError as error:
        raise errors.SamplingError(f"sampling: {error}") from None
    values = dict(wire)
    bias = values.get("logit_bias", {})
    if isinstance(bias, dict):
        values["logit_bias"] = {_token_id(key): _bias(key, value) for key, value in bias.items()}
    pairs = values.get("sequence_bias")
    if isinstance(pairs, list):
        values["sequence_bias"] = [
            [pair[0], _bias(shown(pair[0]), pair[1], "sequence_bias")]
            if isinstance(pair, list) and len(pair) == 2
            else pair
            for pair in pairs
        ]
    return SamplingParams(**values)


def _token_id(key: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,18}", key):
        raise errors.SamplingError(f"logit_bias has the key {shown(key)}; keys are token ids, written as strings")
    return int(key)


def _bias(key: str, value: Any, name: str = "logit_bias") -> float:
    try:
        return to_float(value)
    except ValueError:
        raise errors.SamplingError(f'{name}[{key}]={shown(value)}; give a number, or "-inf" to ban it') from None


def token_frame(key: int, event: TokenEvent, prompt: tuple[int, ...] | None) -> bytes:
    """A `token` message as a frame. Written by hand: a server makes one for every token."""
    extra = "" if event.logprob is None else f',"logprob":{_json(_logprob(event.logprob))}'
    if prompt is not None:
        extra += f',"prompt_token_ids":{_json(list(prompt))}'
    token = "null" if event.token_id is None else event.token_id
    body = (
        f'{{"type":"token","id":{key},"index":{event.index},"choice":{event.choice},"token_id":{token},'
        f'"text":{quoted(event.text)}{extra}}}'
    ).encode("ascii")
    return HEADER.pack(len(body)) + body


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def event_from_wire(message: Mapping[str, Any]) -> TokenEvent:
    """The event in a `token` message, or in the `done` message of a stream."""
    logprob, completion = message.get("logprob"), message.get("completion")
    return TokenEvent(
        token_id=message["token_id"],
        text=message["text"],
        index=message["index"],
        choice=message["choice"],
        logprob=None if logprob is None else _logprob_from(logprob),
        completion=None if completion is None else completion_from_wire(completion),
    )


def done_message(key: int, event: TokenEvent, *, stream: bool, last: bool, brief: bool = False) -> dict[str, Any]:
    """The message that ends one completion of a request.

    Args:
        last: it is the request's last one.
        brief: leave out the ids of the prompt and the times of tokens, which are most of a message.
    """
    if event.completion is None:
        raise ValueError("a done message needs a completion")
    message: dict[str, Any] = {"type": "done", "id": key, "index": event.index, "choice": event.choice, "last": last}
    if stream:
        message |= {"token_id": event.token_id, "text": event.text}
        if event.logprob is not None:
            message["logprob"] = _logprob(event.logprob)
    message["completion"] = completion_to_wire(event.completion, brief=brief)
    return message


def completion_to_wire(completion: Completion, *, brief: bool = False) -> dict[str, Any]:
    """A completion of one choice as JSON values; see `done_message`."""
    timing = completion.timing
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "prompt_token_ids": [] if brief else list(completion.prompt_token_ids),
        "finish_reason": str(completion.finish_reason),
        "seed": completion.seed,
        "timing": {
            "queue": timing.queue,
            "ttft": timing.ttft,
            "total": timing.total,
            "token_times": [] if brief else list(timing.token_times),
        },
        "steps": [asdict(step) for step in completion.steps],
        "logprobs": None if completion.logprobs is None else [_logprob(item) for item in completion.logprobs],
        "prompt_logprobs": None
        if completion.prompt_logprobs is None
        else [None if item is None else _logprob(item) for item in completion.prompt_logprobs],
        "stop_match": completion.stop_match,
        "cached_tokens": completion.cached_tokens,
        "drafted_tokens": completion.drafted_tokens,
        "accepted_tokens": completion.accepted_tokens,
        "weights_version": completion.weights_version,
        "truncated_tokens": completion.truncated_tokens,
        "error": None if completion.error is None else error_to_wire(completion.error),
    }


def completion_from_wire(wire: Mapping[str, Any]) -> Completion:
    """What `completion_to_wire()` was given. Its error is of the same class, with the same message."""
    timing = wire["timing"]
    logprobs, error, prompt = wire["logprobs"], wire["error"], wire.get("prompt_logprobs")
    return Completion(
        text=wire["text"],
        token_ids=tuple(wire["token_ids"]),
        prompt_token_ids=tuple(wire["prompt_token_ids"]),
        finish_reason=FinishReason(wire["finish_reason"]),
        seed=wire["seed"],
        timing=Timing(
            queue=timing["queue"],
            ttft=timing["ttft"],
            total=timing["total"],
            token_times=tuple(timing["token_times"]),
        ),
        steps=tuple(StepSummary(**step) for step in wire["steps"]),
        logprobs=None if logprobs is None else tuple(map(_logprob_from, logprobs)),
        prompt_logprobs=None
        if prompt is None
        else tuple(None if item is None else _logprob_from(item) for item in prompt),
        stop_match=wire["stop_match"],
        cached_tokens=wire.get("cached_tokens", 0),
        drafted_tokens=wire.get("drafted_tokens", 0),
        accepted_tokens=wire.get("accepted_tokens", 0),
        weights_version=wire.get("weights_version", 0),
        truncated_tokens=wire.get("truncated_tokens", 0),
        error=None if error is None else error_from_wire(error),
    )


def _logprob(item: TokenLogprob) -> list[Any]:
    return [item.token_id, number(item.logprob), [[token, number(value)] for token, value in item.top]]


def _logprob_from(wire: Any) -> TokenLogprob:
    token, value, top = wire
    return TokenLogprob(token, to_float(value), tuple((other, to_float(score)) for other, score in top))


def error_to_wire(error: BaseException) -> dict[str, Any]:
    """An exception's code and message, without paths of the server's machine.

    Exceptions that are not ours are `internal`; their message stays in the server's log.
    """
    if isinstance(error, errors.ServerError) and error.code is not None:
        wire: dict[str, Any] = {"code": error.code, "message": without_paths(str(error))}
        return wire | {"retry_after": error.retry_after} if isinstance(error, errors.ServerBusyError) else wire
    code = next((code for code, kind in CODES.items() if isinstance(error, kind)), "internal")
    if code == "internal" and not isinstance(error, errors.HybridgenError):
        return {"code": code, "message": "the server failed at this request; its log says why"}
    return {"code": code, "message": without_paths(str(error))}


def error_from_wire(wire: Mapping[str, Any]) -> errors.HybridgenError:
    """The exception that an error message stands for."""
    code, message = str(wire["code"]), str(wire["message"])
    if code == "busy":
        return errors.ServerBusyError(message, to_float(wire.get("retry_after", 1.0)))
    kind = CODES.get(code)
    return errors.ServerError(message, code) if kind is None else kind(message)


def without_paths(text: str) -> str:
    """The text with absolute paths replaced."""
    return _PATH.sub("<path>", text)
