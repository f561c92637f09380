"""What a client's call sends and how it takes the answers; the same for both clients, and free of input and output."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hybridgen.arguments import REFUSED, is_text, returns_errors, sampling_per_prompt
from hybridgen.core import Completion, FinishReason, Timing, TokenEvent
from hybridgen.errors import HybridgenError, PromptError, SamplingError, ServerBusyError, ServerError, shown
from hybridgen.params import SamplingParams, choice_seed
from hybridgen.serving.unix.frames import MAX_DEPTH, Shape, measure
from hybridgen.serving.unix.messages import error_from_wire, event_from_wire, sampling_to_wire

IN_FLIGHT = 2
"""Requests of one call at once, when its prompts are more than one request holds."""
OVERHEAD = 512
"""Bytes (and values, and objects) of a request message besides its prompts and sampling, generously."""
PROMPT_DEPTH = MAX_DEPTH - 2
"""Levels of a prompt, which is in a list in an object."""


class Call:
    """A call's arguments, checked as far as it takes no model."""

    def __init__(
        self,
        prompts: Any,
        sampling: SamplingParams | Iterable[SamplingParams] | None,
        fields: dict[str, Any],
        errors: str = "raise",
    ) -> None:
        """
        Args:
            errors: see `Engine.generate`.

        Raises:
            PromptError, SamplingError, ConfigError: a value can be no prompt, or no sampling field.
        """
        self.returns_errors = returns_errors(errors)
        self.prompts, self.single = split(prompts)
        self.sampling = sampling_per_prompt(len(self.prompts), sampling, fields)

    def check_streamer(self, streamer: Any) -> None:
        """Check that a Hugging Face streamer can be fed.

        Raises:
            SamplingError: there is not exactly one completion, or it has no `put()` and `end()`.
        """
        count = sum(params.n for params in self.sampling)
        if count != 1:
            raise SamplingError(f"streamer= takes one prompt with n=1, not {count} requests; use stream()")
        if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise SamplingError(f"streamer={shown(streamer)} has no put() and end(); give a transformers streamer")


class _Part(NamedTuple):
    """As many prompts of a call as one request holds."""

    start: int
    message: dict[str, Any]


class Exchange:
    """The requests of one call, and what has come of them."""

    def __init__(
        self,
        call: Call,
        limits: Mapping[str, Any],
        *,
        wait: float,
        stream: bool,
        echo: bool = False,
        brief: bool = False,
    ) -> None:
        """
        Args:
            limits: of the server's hello.
            wait: seconds for which a full queue is tried again.
            echo: ask for the prompt's ids with its first token.
            brief: ask for completions without the prompt's ids and the times of tokens.

        Raises:
            PromptError: a prompt is too large for a message, or cannot be sent.
        """
        self._call = call
        self.refused: list[TokenEvent] = []
        """The last events of prompts that cannot be sent, where the call wants them returned."""
        base = {"type": "request", "stream": stream}
        base |= {name: True for name, asked in (("echo", echo), ("brief", brief)) if asked}
        self._waiting = deque(_parts(call, limits, self.refused, base))
        self._active: dict[int, _Part] = {}
        self._wait = wait
        self._retry_at = -math.inf
        self._give_up_at: float | None = None

    @property
    def finished(self) -> bool:
        """Whether all has been answered."""
        return not self._waiting and not self._active

    @property
    def active(self) -> list[int]:
        """Ids in flight."""
        return list(self._active)

    def next_message(self, now: float) -> dict[str, Any] | None:
        """The next request to send; `sent()` says that it was."""
        if not self._waiting or len(self._active) >= IN_FLIGHT or now < self._retry_at:
            return None
        return self._waiting[0].message

    def sent(self, key: int) -> None:
        """What `next_message()` gave was sent with this id."""
        self._active[key] = self._waiting.popleft()

    def pause(self, now: float) -> float | None:
        """Seconds until a request is tried again; None when none is."""
        if not self._waiting or len(self._active) >= IN_FLIGHT:
            return None
        return max(0.0, self._retry_at - now)

    def drop_waiting(self) -> None:
        """Send no more requests."""
        self._waiting.clear()

    def take(self, message: Mapping[str, Any], now: float) -> TokenEvent | None:
        """The event in a message, if there is one.

        Raises:
            HybridgenError: the server answered with an error.
        """
        key = message["id"]
        part = self._active.get(key)
        if part is None:
            return None
        if message["type"] == "error":
            del self._active[key]
            return self._handle(error_from_wire(message), part, now)
        self._give_up_at = None
        if message["type"] == "token":
            event = event_from_wire(message)
        elif message["type"] == "done":
            event = event_from_wire({"token_id": None, "text": ""} | dict(message))
            if message["last"]:
                del self._active[key]
        else:
            raise ServerError(f"the server answered a request with {shown(message['type'])}; is it of another version?")
        if event.completion is not None:
            told = replace(event.completion, prompt=_told(self._call, event.index + part.start))
            event = replace(event, completion=told)
        return replace(event, index=event.index + part.start) if part.start else event

    def _handle(self, error: HybridgenError, part: _Part, now: float) -> TokenEvent | None:
        """Put a request that met a full queue back, to be tried again; raise any other error.

        A server refuses a request as a whole. Where the call wants errors returned, its halves are sent, until the
        prompt is found.
        """
        if self._call.returns_errors and _refuses(error):
            if len(part.message["prompts"]) > 1:
                self._waiting.extendleft(reversed(_halves(part)))
                return None
            text = str(error)
            if text.startswith("prompt 0 "):  # which it was alone in its request
                error.args = (f"prompt {part.start} {text.removeprefix('prompt 0 ')}", *error.args[1:])
            return _refused(self._call, part.start, error)
        if not isinstance(error, ServerBusyError):
            raise error
        if self._give_up_at is None:
            self._give_up_at = now + self._wait
        if now + error.retry_after > self._give_up_at and not self._active:
            raise error
        self._retry_at = now + error.retry_after
        self._waiting.appendleft(part)
        return None


def _refuses(error: HybridgenError) -> bool:
    """Whether an error is of a prompt or its sampling, and not of the server."""
    return isinstance(error, REFUSED) or (isinstance(error, ServerError) and error.code == "limit")


def _halves(part: _Part) -> list[_Part]:
    message = part.message
    middle = len(message["prompts"]) // 2
    halves = []
    for part_of in (slice(middle), slice(middle, None)):
        sampling = message["sampling"]
        own = {"prompts": message["prompts"][part_of]}
        own["sampling"] = sampling[part_of] if isinstance(sampling, list) else sampling
        halves.append(_Part(part.start + (part_of.start or 0), {**message, **own}))
    return halves


def _told(call: Call, index: int) -> Any:
    """What the completion of a prompt says of it, see `Completion.prompt`."""
    prompt = call.prompts[index]
    return prompt if is_text(prompt) else None


def _refused(call: Call, index: int, error: HybridgenError) -> TokenEvent:
    completion = Completion.refused(error, _told(call, index), call.sampling[index].seed)
    return TokenEvent(token_id=None, text="", index=index, completion=completion)


class Results:
    """The completions of a call, as they come."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._choices: list[dict[int, Completion]] = [{} for _ in call.prompts]

    def add(self, event: TokenEvent) -> None:
        """Take in an event; only a last one matters."""
        if event.completion is not None:
            self._choices[event.index][event.choice] = event.completion

    def complete(self) -> list[Completion]:
        """One completion per prompt: the first choice, which holds all of them.

        Prompts without an answer (after Ctrl-C) have an empty one that says `cancelled`.
        """
        completions = []
        for params, choices in zip(self._call.sampling, self._choices, strict=True):
            if 0 in choices and choices[0].choices:  # refused as a whole
                completions.append(choices[0])
                continue
            group = tuple(choices.get(choice) or _cancelled(params, choice) for choice in range(params.n))
            completions.append(replace(group[0], choices=group))
        return completions

    @property
    def ended(self) -> int:
        """Prompts whose completions have all come."""
        return sum(
            len(c) == p.n or (0 in c and bool(c[0].choices))
            for c, p in zip(self._choices, self._call.sampling, strict=True)
        )

    def result(self) -> Completion | list[Completion]:
        """What `generate()` returns.

        Raises:
            HybridgenError: the one prompt failed while it ran.
        """
        completions = self.complete()
        if not self._call.single:
            return completions
        if completions[0].error is not None and not self._call.returns_errors:
            raise completions[0].error
        return completions[0]


def _cancelled(params: SamplingParams, choice: int) -> Completion:
    return Completion(
        text="",
        token_ids=(),
        prompt_token_ids=(),
        finish_reason=FinishReason.CANCELLED,
        seed=choice_seed(params.seed or 0, choice),
        timing=Timing(queue=None, ttft=None, total=0.0),
    )


def split(prompts: Any) -> tuple[list[Any], bool]:
    """`hybridgen.text.prompts.split_prompts`; what needs no torch is decided without importing it."""
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, (list, tuple)) and prompts:
        first = prompts[0]
        if type(first) is int or (isinstance(first, Mapping) and "role" in first):
            return [prompts], True
        if all(type(prompt) is str for prompt in prompts):
            return list(prompts), False
    from hybridgen.text.prompts import split_prompts

    return split_prompts(prompts)


def _parts(call: Call, limits: Mapping[str, Any], refused: list[TokenEvent], base: dict[str, Any]) -> Iterable[_Part]:
    """The requests that a call takes, in order.

    Args:
        refused: takes the prompts that cannot be sent, where the call wants errors returned.
        base: what every message has.
    """
    parts: list[_Part] = []
    first = call.sampling[0]
    same = all(params is first for params in call.sampling)
    shared = sampling_to_wire(first)
    size = completions = elements = containers = 0
    gap = False
    """Whether the prompt before was left out: a request's prompts follow each other."""
    for index, (prompt, params) in enumerate(zip(call.prompts, call.sampling, strict=True)):
        wire = shared if params is first else sampling_to_wire(params)
        text = "" if same and index else json.dumps(wire) + ","
        try:
            value, length, shape = _fitting(index, prompt, text, limits)
        except PromptError as error:
            if not call.returns_errors:
                raise
            refused.append(_refused(call, index, error))
            gap = True
            continue
        full = (
            not parts
            or gap
            or len(parts[-1].message["prompts"]) >= limits["batch"]
            or size + length + OVERHEAD > limits["frame"]
            or elements + shape.elements + OVERHEAD > limits["elements"]
            or containers + shape.containers + OVERHEAD > limits["containers"]
            or completions + params.n > limits["queue"]
        )
        if full:
            gap = False
            size = completions = elements = containers = 0
            parts.append(_Part(index, base | {"prompts": [], "sampling": wire if same else []}))
            size += len(json.dumps(wire)) if same else 0
        message = parts[-1].message
        message["prompts"].append(value)
        if not same:
            message["sampling"].append(wire)
        size += length
        elements += shape.elements
        containers += shape.containers
        completions += params.n
    return parts


def _fitting(index: int, prompt: Any, sampling: str, limits: Mapping[str, Any]) -> tuple[Any, int, Shape]:
    """A prompt as JSON values, and what it takes of a message together with its sampling.

    Raises:
        PromptError: it cannot be sent, or is more than a message holds.
    """
    value, length, shape = _sendable(index, prompt)
    length += len(sampling)
    extra = measure(sampling.encode("ascii"))
    shape = Shape(shape.elements + extra.elements, shape.containers + extra.containers, False)
    for name, count in (("elements", shape.elements), ("containers", shape.containers)):
        if count + OVERHEAD > limits[name]:
            raise PromptError(
                f"prompt {index} takes {count} {name} with its sampling, and the server's messages hold "
                f"{limits[name]}; shorten it"
            )
    if length + OVERHEAD > limits["frame"]:
        raise PromptError(
            f"prompt {index} takes {length} bytes with its sampling, and the server's messages hold "
            f"{limits['frame']}; shorten it or raise the server's limit"
        )
    return value, length, shape


def _sendable(index: int, prompt: Any) -> tuple[Any, int, Shape]:
    """A prompt as JSON values, its bytes in a message, and how many values it has."""
    if getattr(prompt, "ndim", 0) == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    try:
        text = json.dumps(prompt, default=_plain, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"prompt {index} ({shown(prompt)}) cannot be sent as JSON: {error}") from None
    if isinstance(prompt, str):
        return prompt, len(text) + 1, Shape(1, 0, False)
    shape = measure(text.encode("ascii"), PROMPT_DEPTH)
    if shape.too_deep:
        raise PromptError(f"prompt {index} nests more than {PROMPT_DEPTH} levels of objects and lists; make it flatter")
    return json.loads(text), len(text) + 1, shape


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"{type(value).__name__} is not text; decode it first")
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
