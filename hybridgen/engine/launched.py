"""Engines in a program that torchrun runs on every rank: all make the same calls, and get the same results.

Rank 0 decides and samples; the others run its steps while they are in a call of their own, which gives what rank 0's
call gave. So host code that goes by times or by what arrives need not come out alike on all ranks.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, astuple, fields
from typing import Any, TypeVar

import torch

from hybridgen.config import EngineConfig
from hybridgen.core import Completion, FinishReason, StepSummary, Timing, TokenLogprob
from hybridgen.engine.rank import ORPHAN_SECONDS, keep_beating, make_follower
from hybridgen.engine.ready import device_of
from hybridgen.errors import EngineError, HybridgenError, Interrupted, described
from hybridgen.loading import Checkpoint
from hybridgen.parallel.group import Group
from hybridgen.parallel.launched import LaunchedRanks, Membership, Place
from hybridgen.parallel.lead import Lead
from hybridgen.parallel.progress import State
from hybridgen.parallel.ranks import STORE, error_of, kind_of
from hybridgen.parallel.start import order_of
from hybridgen.parallel.wire import Kind, pack, unpack

logger = logging.getLogger(__name__)

R = TypeVar("R")

_PART = 2**18
"""Characters of a result in one message."""
_ALWAYS = 2**62
_APART = ("prompt", "error", "choices", "timing", "steps", "finish_reason", "logprobs", "prompt_logprobs")


class Sharing:
    """Calls of rank 0, whose results the other ranks get."""

    def __init__(self, lead: Lead, ranks: LaunchedRanks) -> None:
        self._lead, self._ranks = lead, ranks

    def call(self, run: Callable[[], R]) -> R:
        """Run a call once all other ranks are in theirs, and tell them how it ended.

        Raises:
            EngineError: a rank is gone.
            Exception: what the call raises; the others raise it too.
        """
        self._lead.begin()
        try:
            result = run()
        except BaseException as error:
            self._tell({"error": _error_value(error)})
            raise
        self._tell({"value": _value(result)})
        return result

    def _tell(self, value: Mapping[str, Any]) -> None:
        text = json.dumps(value)
        with suppress(EngineError):  # the call's own end is the better news
            for start in range(0, len(text), _PART):
                self._lead.tell(pack(Kind.RESULT, [text[start : start + _PART], start + _PART < len(text)]))
        self._ranks.end_call()


class Following:
    """An engine's place on a rank above 0."""

    def __init__(self, place: Place, checkpoint: Checkpoint, config: EngineConfig) -> None:
        """Join the group, and read this rank's share of the weights.

        Raises:
            HybridgenError: rank 0 cannot be found, was asked for something else, or has failed.
        """
        self.rank = place.rank
        self._device = checkpoint.device
        self._undo = ExitStack()
        self._calls = 0
        self._ended: str | None = None
        self._membership = membership = Membership(place, order_of(checkpoint, config))
        self._channel = membership.channel
        self._progress = self._channel.progress(self.rank)
        self._progress.enter(State.LONG)
        self._group: Group | None = None
        keep_beating(self._channel, self.rank, membership.is_over, self._stop_waiting)
        try:
            if checkpoint.device.type == "cuda":
                torch.cuda.set_device(checkpoint.device)  # pinned memory belongs to the device that is current
            store = membership.directory / STORE
            self._group = Group(
                self.rank, place.size, store, checkpoint.device, checkpoint.dtype, self._channel.progress(self.rank)
            )
            self._undo.callback(self._group.close)
            with device_of(checkpoint.device):
                self._follower = make_follower(checkpoint, config, self._group, self._undo)
        except BaseException as error:
            raise self._failed(error) from error
        self._arrivals = membership.arrivals()
        self._progress.enter(State.AWAY)

    def call(self, run: object) -> Any:
        """Serve rank 0's next call; what it gave. `run` is for rank 0 to run.

        Raises:
            EngineError: rank 0 has closed its engine, or the group has ended.
            HybridgenError: what rank 0's call raised.
        """
        self._calls += 1
        text = self._serve(self._calls)
        if text is None:
            raise EngineError(f"rank {self.rank} waits for a call of rank 0: {self._ended}")
        told = json.loads(text)
        if "error" in told:
            raise _error_made(told["error"])
        return _made(told["value"])

    def follow(self) -> None:
        """Serve rank 0 until it closes its engine.

        Raises:
            EngineError: the group has ended otherwise.
        """
        while self._serve(_ALWAYS) is not None:
            pass

    def _serve(self, calls: int) -> str | None:
        """Do what rank 0 says until the end of a call: its result as JSON text; None: the group is closed."""
        if self._ended is not None:
            return None
        self._channel.serve(self.rank, calls)
        parts: list[str] = []
        try:
            with device_of(self._device):
                for _ in self._arrivals:
                    message = unpack(self._channel.read(self.rank))
                    if message.kind is Kind.RESULT:
                        part, more = message.head
                        parts.append(part)
                        if not more:
                            return "".join(parts)
                    elif not self._follower.do(message):
                        self._ended = "it has closed the engine"
                        return None
        except BaseException as error:
            raise self._failed(error) from error
        self._ended = self._membership.reason
        raise EngineError(self._ended)

    def _failed(self, error: BaseException) -> BaseException:
        """After an error here: tell rank 0, and what to raise."""
        why = described(error) if isinstance(error, Exception) else type(error).__name__
        # A collective can fail before it is seen here that rank 0 is gone, which is why.
        may_be_why = isinstance(error, Exception) and not isinstance(error, HybridgenError)
        if self._membership.is_over(ORPHAN_SECONDS if may_be_why else 0.0):
            for _ in self._membership.arrivals():
                pass
            why = self._membership.reason
        self._ended = why
        self._membership.leave(why)
        if not isinstance(error, Exception) or (isinstance(error, HybridgenError) and why != self._membership.reason):
            return error
        return EngineError(f"rank {self.rank} cannot go on: {why}")

    def _stop_waiting(self) -> None:
        """The group has ended, or is closed: let nothing wait in a step for ranks that are gone."""
        time.sleep(ORPHAN_SECONDS)
        if self._progress.state is State.AWAY or self._ended is not None:
            return
        if self._group is not None:
            self._group.abort()
        time.sleep(ORPHAN_SECONDS)
        if self._progress.state is State.AWAY or self._ended is not None:
            return
        logger.error("rank %d ends: its step waits for ranks that are gone", self.rank)
        os._exit(1)  # it cannot be called back from a collective

    def close(self) -> None:
        """Leave the group. Twice is fine."""
        self._ended = self._ended or "this rank has closed its engine"
        self._membership.leave()
        with device_of(self._device):
            self._undo.close()


def _error_value(error: BaseException) -> dict[str, Any]:
    if not isinstance(error, HybridgenError):
        return {"kind": "EngineError", "message": f"rank 0: {described(error)}"}
    value: dict[str, Any] = {"kind": kind_of(error), "message": str(error)}
    if isinstance(error, Interrupted):
        value["completions"] = _value(error.completions)
    return value


def _error_made(value: dict[str, Any]) -> HybridgenError:
    """What `_error_value` was given."""
    if value["kind"] == "Interrupted":
        return Interrupted(value["message"], _made(value["completions"]))
    return error_of(value)


def _value(result: Any) -> Any:
    """Completions, in lists and beside truth values, as JSON values."""
    if isinstance(result, (list, tuple)):
        return [_value(each) for each in result]
    return result if isinstance(result, bool) else _completion(result)


def _completion(completion: Completion, whole: bool = True) -> dict[str, Any]:
    values = {each.name: getattr(completion, each.name) for each in fields(completion) if each.name not in _APART}
    for name in ("logprobs", "prompt_logprobs"):
        items = getattr(completion, name)
        values[name] = None if items is None else [None if item is None else list(astuple(item)) for item in items]
    values["timing"] = asdict(completion.timing)
    values["steps"] = [asdict(step) for step in completion.steps]
    values["finish_reason"] = str(completion.finish_reason)
    values["error"] = None if completion.error is None else _error_value(completion.error)
    with suppress(TypeError, ValueError):
        json.dumps(completion.prompt)
        values["prompt"] = completion.prompt
    if whole:
        values["choices"] = [_completion(each, whole=False) for each in completion.choices]
    return values


def _made(value: Any) -> Any:
    """What `_value` was given."""
    if isinstance(value, list):
        return [_made(each) for each in value]
    if isinstance(value, bool):
        return value
    choices = value.pop("choices", [])
    error = value.pop("error")
    for name in ("logprobs", "prompt_logprobs"):
        if value[name] is not None:
            value[name] = tuple(None if item is None else _logprob(item) for item in value[name])
    timing = value.pop("timing")
    timing["token_times"] = tuple(timing["token_times"])
    value |= {name: tuple(value[name]) for name in ("token_ids", "prompt_token_ids")}
    value["timing"] = Timing(**timing)
    value["steps"] = tuple(StepSummary(**step) for step in value["steps"])
    value["finish_reason"] = FinishReason(value["finish_reason"])
    value["error"] = None if error is None else error_of(error)
    return Completion(**value, choices=tuple(map(_made, choices)))


def _logprob(item: list[Any]) -> TokenLogprob:
    token, value, top = item
    return TokenLogprob(token, value, tuple((other, score) for other, score in top))
