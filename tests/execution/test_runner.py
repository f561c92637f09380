"""Steps built by hand: what a call feeds, what it keeps, and the state it leaves."""

from __future__ import annotations

from collections.abc import Iterator

import families
import pytest
import torch

from hybridgen.core import SamplingParams
from hybridgen.execution import ModelRunner, PrefillChunk
from hybridgen.kvcache import CacheShape, allocate_pages
from hybridgen.models import bind
from hybridgen.sampling import resolve

PROMPT = families.prompts_of((21,))[0]


@pytest.fixture
def runner() -> Iterator[ModelRunner]:
    bound = bind(families.build("llama"))
    runner = ModelRunner(
        bound, vocab_size=families.VOCAB, max_batch=4, max_pages=4, token_budget=64, compile_backend=None
    )
    shape = CacheShape(bound.layer_shapes, 16, torch.float32)
    runner.attach(allocate_pages(shape, 9, torch.device("cpu")))
    yield runner
    runner.close()
    runner._bound.release()


def admit(runner: ModelRunner, slot: int, pages: list[int]) -> None:
    runner.admit(slot, pages, resolve(SamplingParams(temperature=0.0), None, (), families.VOCAB), PROMPT)


def chunk(slot: int, start: int, stop: int) -> PrefillChunk:
    return PrefillChunk(slot, PROMPT[start:stop], start, len(PROMPT), 0, stop == len(PROMPT))


@pytest.mark.parametrize("cuts", [(21,), (1, 21), (20, 21), (5, 16, 17, 21)])
def test_chunks_of_any_length_give_the_same_tokens(runner: ModelRunner, cuts: tuple[int, ...]) -> None:
    admit(runner, 2, [3, 1])
    start = 0
    for stop in cuts:
        launched = runner.prefill([chunk(2, start, stop)])
        assert launched.rows == (stop == len(PROMPT))
        start = stop
    tokens = [launched.read().tokens[0]]
    assert runner.state.table[1].tolist() == [0, 0, 21, 0, 0]
    assert runner.state.table[2].tolist() == [0, 0, 1, 0, 0]
    tokens += [runner.decode((2,)).read().tokens[0] for _ in range(8)]
    assert tokens == families.reference(families.build("llama"), PROMPT, 9)[0]
    assert runner.state.table[1, 2] == 29


def test_a_call_samples_only_for_chunks_that_end(runner: ModelRunner) -> None:
    admit(runner, 0, [1, 2])
    admit(runner, 1, [3, 4])
    launched = runner.prefill([chunk(0, 0, 10), chunk(1, 0, 21)])
    assert len(launched.read().tokens) == 1
    assert runner.state.table[1].tolist() == [0, 21, 0, 0, 0]


def test_other_slots_are_left_alone(runner: ModelRunner) -> None:
    admit(runner, 0, [1, 2])
    admit(runner, 1, [3, 4])
    runner.prefill([chunk(0, 0, 21), chunk(1, 0, 21)])
    keys = runner._bound.sites[0].module._hybridgen.keys
    before = keys[[3, 4]].clone()
    runner.decode((0,))
    assert torch.equal(keys[[3, 4]], before)
    assert runner.state.table[1].tolist() == [22, 21, 0, 0, 0]


def test_a_failed_row_leaves_a_valid_token_behind(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    admit(runner, 0, [1, 2])
    runner.prefill([chunk(0, 0, 21)])
    monkeypatch.setattr(runner._bound, "forward", lambda ids, step, keep: torch.full((1, families.VOCAB), torch.nan))
    assert runner.decode((0,)).read().tokens == [-1]
    assert runner.state.table[0, 0] == 0
