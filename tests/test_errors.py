"""Exceptions travel: between processes, and through copy."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from hybridgen import errors
from hybridgen.core import Completion, FinishReason, Timing

COMPLETION = Completion(
    text="x",
    token_ids=(1,),
    prompt_token_ids=(2,),
    finish_reason=FinishReason.ERROR,
    seed=0,
    timing=Timing(queue=0.0, ttft=1.0, total=1.0),
    error=errors.RequestError("NaN logits"),
)
MORE = {errors.ServerBusyError: (0.5,), errors.ServerError: ("stuck",), errors.Interrupted: ([COMPLETION],)}
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.HybridgenError)]


def made(kind: Any) -> errors.HybridgenError:
    error = kind("what was wrong", *MORE.get(kind, ()))
    error.add_note("a note")
    return error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_each_survives(kind: type, way: Callable[[Any], Any]) -> None:
    before = made(kind)
    after = way(before)
    assert type(after) is kind
    assert (str(after), after.args) == ("what was wrong", before.args)
    assert repr(vars(after)) == repr(vars(before))
    assert after.__notes__ == ["a note"]


class _WithFields(errors.ServerBusyError):
    """A user's own, with another signature."""

    def __init__(self, *, retry_after: float) -> None:
        super().__init__("mine", retry_after)


def test_one_of_a_users_own() -> None:
    after = pickle.loads(pickle.dumps(_WithFields(retry_after=2.0)))
    assert (type(after), str(after), after.retry_after) == (_WithFields, "mine", 2.0)


def _raise(number: int) -> None:
    raise errors.ServerBusyError("full", float(number))


def test_a_worker_sends_one() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        error = pool.submit(_raise, 3).exception(timeout=60)
    assert isinstance(error, errors.ServerBusyError)
    assert error.retry_after == 3.0
