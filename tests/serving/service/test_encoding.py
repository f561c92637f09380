"""Prompts are encoded beside the steps: in turns, within a time, and not for clients that are gone."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from waiting import HANGS, until

from hybridgen import PromptError, SamplingError, SamplingParams, ServerError
from hybridgen.serving.service.encoding import LONG_CHARS, MAX_LOST, Encoder
from hybridgen.serving.service.generator import Key, Submit


class Slow:
    """An encoder whose texts take as long as a test says."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.ready: list[Submit] = []
        self.failed: list[tuple[Key, BaseException]] = []
        self.order: list[str] = []
        self.gate = threading.Event()
        failed = lambda *pair: self.failed.append(pair)  # noqa: E731
        self.encoder = Encoder(self.encode, self.read_grammar, self.ready.append, failed, seconds)

    def encode(self, prompt: Any, index: int) -> tuple[int, ...]:
        self.order.append(prompt[:1])
        if prompt[:1] == "w":
            assert self.gate.wait(HANGS)
        if prompt[:1] == "r":
            raise PromptError(f"prompt {index} is refused")
        return (len(prompt), index)

    def read_grammar(self, params: SamplingParams) -> None:
        if params.regex == "(":
            raise SamplingError("it cannot be read")
        assert self.gate.wait(HANGS)

    def put(self, client: int, key: int, *prompts: Any) -> bool:
        return self.encoder.put(Submit(Key(client, key), list(prompts), [SamplingParams()], False, False))


def test_text_becomes_ids() -> None:
    slow = Slow()
    assert not slow.put(1, 0, [1, 2], [3])  # nothing to encode
    assert slow.put(1, 1, "abc", [7, 8], "de")
    until(lambda: slow.ready)
    assert slow.ready[0].prompts == [(3, 0), [7, 8], (2, 2)]
    slow.put(1, 2, "abc", "r")
    until(lambda: slow.failed)
    assert slow.failed[0][0] == Key(1, 2)
    assert "prompt 1 is refused" in str(slow.failed[0][1])
    slow.encoder.stop()


def test_a_grammar_is_read_beside_texts_and_steps() -> None:
    slow = Slow()
    wanted = SamplingParams(regex="a+")
    assert slow.encoder.put(Submit(Key(1, 0), [[1, 2]], [wanted], False, False))
    assert slow.encoder.put(Submit(Key(1, 1), [[1, 2]], [SamplingParams(regex="(")], False, False))
    slow.put(1, 2, "abc")  # texts do not wait for it
    until(lambda: slow.ready)
    assert [one.key for one in slow.ready] == [Key(1, 2)]
    slow.gate.set()
    until(lambda: len(slow.ready) == 2 and slow.failed)
    assert slow.ready[1].sampling == [wanted]
    assert slow.failed[0][0] == Key(1, 1)
    slow.encoder.stop()


def test_clients_take_turns() -> None:
    slow = Slow()
    slow.put(1, 0, "w")
    until(lambda: slow.order)
    for key in range(1, 6):
        slow.put(1, key, "a")
    slow.put(2, 0, "b")
    slow.put(3, 0, "c")
    slow.gate.set()
    until(lambda: len(slow.ready) == 8)
    assert "".join(slow.order) == "wabcaaaa"
    slow.encoder.stop()


def test_short_texts_wait_neither_for_long_ones_nor_for_chats() -> None:
    slow = Slow()
    slow.put(1, 0, "w" * (LONG_CHARS + 1))
    slow.put(1, 1, "a")
    until(lambda: slow.ready)
    assert slow.ready[0].key == Key(1, 1)
    slow.gate.set()
    slow.encoder.stop()


def test_one_that_does_not_end_is_left_behind() -> None:
    slow = Slow(seconds=1000)
    slow.put(1, 0, "w")
    until(lambda: slow.order)
    slow.put(1, 1, "a")
    now = time.monotonic()
    slow.encoder.check(now + 500)
    assert slow.failed == []
    slow.encoder.shift(2000)  # the process stood still
    slow.encoder.check(now + 2500)
    assert slow.failed == []
    slow.encoder.check(now + 4000)
    assert {key for key, _ in slow.failed} == {Key(1, 0), Key(1, 1)}
    assert all(isinstance(error, ServerError) and error.code == "limit" for _, error in slow.failed)
    slow.put(1, 2, "b")  # another thread goes on
    until(lambda: slow.ready)
    slow.gate.set()
    time.sleep(0.05)
    assert [submit.key for submit in slow.ready] == [Key(1, 2)]  # it was answered already
    slow.encoder.stop()


def test_a_tokenizer_that_never_ends_has_few_threads() -> None:
    slow = Slow(seconds=10)
    before = threading.active_count()
    for key in range(MAX_LOST + 1):
        slow.order.clear()
        slow.put(1, key, "w")
        until(lambda: slow.order)
        slow.encoder.check(time.monotonic() + 11)
    with pytest.raises(ServerError, match="only prompts of token ids") as caught:
        slow.put(1, 99, "a")
    assert caught.value.code == "stuck"
    assert threading.active_count() <= before + MAX_LOST + 3
    slow.gate.set()  # it comes back after all
    until(lambda: _takes(slow))
    until(lambda: slow.ready)
    slow.encoder.stop()


def _takes(slow: Slow) -> bool:
    try:
        return slow.put(1, 100, "a")
    except ServerError:
        return False


def test_what_is_no_longer_wanted_is_not_encoded() -> None:
    slow = Slow()
    slow.put(1, 0, "w")
    until(lambda: slow.order)
    slow.put(1, 1, "a")
    slow.put(1, 2, "b")
    slow.put(2, 0, "c")
    slow.encoder.drop([Key(1, 1), Key(2, 0), Key(7, 7)])
    slow.gate.set()
    until(lambda: len(slow.ready) == 2)
    assert slow.order == ["w", "b"]
    slow.encoder.stop()
