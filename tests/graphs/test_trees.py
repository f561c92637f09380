"""The compile unit of cudagraph trees, compiled without trees: how often, and whether its tokens are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import families
import pytest
import torch
from runners import make_runner
from torch._dynamo.utils import counters

from hybridgen.execution import ModelRunner
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.trees import TreeRecorder
from hybridgen.models.attention import Phase
from hybridgen.params import SamplingParams
from hybridgen.sampling import resolve

MAX_BATCH, BUDGET = 8, 64
PROMPTS = families.prompts_of((3, 9, 1, 7, 12, 5, 4, 8))
Kind = dict[str, object]


def make() -> ModelRunner:
    return make_runner(max_batch=MAX_BATCH, token_budget=BUDGET, pages=40, num_hidden_layers=1)


@pytest.fixture
def runner() -> Iterator[ModelRunner]:
    torch._dynamo.reset()
    runner = make()
    yield runner
    runner.close()
    runner.bound.release()


def admit(runner: ModelRunner, fields: Kind) -> None:
    for slot in range(MAX_BATCH):
        params = resolve(SamplingParams(seed=slot, **fields), None, (), families.VOCAB)
        runner.admit(Admission(slot, [1 + 4 * slot, 2 + 4 * slot], params, PROMPTS[slot]))


def chunks(slots: range) -> list[PrefillChunk]:
    return [PrefillChunk(slot, PROMPTS[slot], 0, len(PROMPTS[slot]), 0, True) for slot in slots]


def through(runner: ModelRunner, recorder: TreeRecorder | None) -> Callable[[GraphKey], list[int]]:
    """Run a staged step, by its compiled form if there is a recorder; its tokens."""

    def run(key: GraphKey) -> list[int]:
        runner.ring.reserve()
        with torch.inference_mode():
            if recorder is None:
                runner.steps.run(key)
            else:
                recorder.replay_of(key)()
        return runner.ring.launched(key.rows, None, "", "").read().tokens

    return run


def compiles() -> int:
    return counters["stats"]["unique_graphs"]


def decode_sizes(runner: ModelRunner, run: Callable[[GraphKey], list[int]], order: tuple[int, ...]) -> list[list[int]]:
    plan = runner.sampler.needs(range(MAX_BATCH))
    found = []
    for size in order:
        with torch.inference_mode():
            runner.steps.stage_decode(tuple(range(size)))
        found.append(run(GraphKey.decode(size, plan)))
    return found


@pytest.mark.parametrize(
    ("order", "fields"),
    [
        ((1, 2, 3, 4, 5, 6, 7, 8), {"temperature": 0.0}),
        (
            (8, 3, 1, 5, 2),
            {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 2},
        ),
    ],
    ids=["greedy", "sampled"],
)
def test_decode_of_any_size_is_compiled_twice(runner: ModelRunner, order: tuple[int, ...], fields: Kind) -> None:
    other = make()
    for one in (runner, other):
        admit(one, fields)
        for slot in range(MAX_BATCH):
            one.prefill(chunks(range(slot, slot + 1)))
    expected = decode_sizes(other, through(other, None), order * 2)
    other.bound.release()
    recorder = TreeRecorder(runner.steps, max_batch=MAX_BATCH, token_budget=BUDGET, backend="aot_eager")
    before = compiles()
    assert decode_sizes(runner, through(runner, recorder), order * 2) == expected
    assert compiles() - before == 2


def test_prefill_of_any_size_is_compiled_once_for_one_prompt_and_once_for_several(runner: ModelRunner) -> None:
    other = make()
    calls = [(slice(i, i + 1), tokens) for i, tokens in ((0, 16), (1, 9), (3, 32), (4, 16))]
    calls += [(slice(0, 2), 16), (slice(1, 4), 32), (slice(4, 8), 64)]
    found = []
    before = compiles()
    for one, compiled in ((other, False), (runner, True)):
        recorder = TreeRecorder(one.steps, max_batch=MAX_BATCH, token_budget=BUDGET, backend="aot_eager")
        run = through(one, recorder if compiled else None)
        admit(one, {"temperature": 0.0})
        tokens_of = []
        for part, tokens in calls:
            slots = range(MAX_BATCH)[part]
            key = GraphKey.prefill(tokens, len(slots), one.sampler.needs(slots))
            with torch.inference_mode():
                one.steps.stage_prefill(chunks(slots), tokens, len(slots))
            tokens_of.append(run(key))
        found.append(tokens_of)
    other.bound.release()
    assert found[1] == found[0]
    assert compiles() - before == 2


def test_what_is_known(runner: ModelRunner) -> None:
    recorder = TreeRecorder(runner.steps, max_batch=MAX_BATCH, token_budget=BUDGET, backend="aot_eager")
    admit(runner, {"temperature": 0.0})
    plan = runner.sampler.needs((0,))
    keys = {size: GraphKey.decode(size, plan) for size in (1, 2, 8)}
    assert not recorder.knows(keys[2])
    recorder.replay_of(keys[2])
    assert recorder.knows(keys[8])
    assert not recorder.knows(keys[1])
    assert not recorder.knows(keys[8]._replace(sampler=plan._replace(sample=True)))
    assert not recorder.knows(keys[8]._replace(phase=Phase.PREFILL))
