"""The generator thread, with models that break in its hands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from waiting import HANGS

from hybridgen import SamplingParams
from hybridgen.serving.service.generator import Ended, Generator, Key, Outcome, Submit


class Broken:
    """A model whose events cannot be read; `where` says what else fails."""

    description: ClassVar[dict[str, Any]] = {"max_context": 100}

    def __init__(self, where: str = "") -> None:
        self.where = where
        self.runs = 0
        self.closed = False

    def read_grammar(self, params: Any) -> None:
        """Nothing: no grammar is asked for."""

    def encode(self, prompt: Any, index: int) -> Any:
        return prompt

    def submit(self, prompts: list[Any], sampling: list[SamplingParams], *, events: bool) -> list[int]:
        self.runs = 1
        return [1]

    def prompt_ids(self, handle: int) -> tuple[int, ...]:
        return ()

    def events(self) -> Iterator[Any]:
        if self.runs:
            raise RuntimeError("events")
        return iter(())

    def step(self) -> None:
        return

    def cancel(self, handles: list[int]) -> None:
        return

    def busy(self) -> bool:
        return bool(self.runs)

    def idle(self) -> bool:
        if self.where == "idle":
            raise RuntimeError("idle")
        return False

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True
        if self.where == "close":
            raise SystemExit  # ends a thread silently


def submit(key: int) -> Submit:
    return Submit(Key(1, key), [[1]], [SamplingParams()], True, False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["", "idle", "close"])
def test_the_end_is_told_whatever_breaks(where: str) -> None:
    model, outcomes = Broken(where), list[Outcome]()
    generator = Generator(lambda: model, outcomes.extend, lambda client, frames: None)
    generator.start()
    generator.send(submit(1))
    generator.join(HANGS)
    assert not generator.is_alive()
    assert model.closed
    assert isinstance(outcomes[-1], Ended)
    assert isinstance(outcomes[-1].error, RuntimeError)
