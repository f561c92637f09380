"""A recording's first replay against the step itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import families
import pytest
import torch
from runners import free_runner, make_runner

from hybridgen.execution import ModelRunner, validation
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.graphs import GraphSettings, Recorded
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.report import graph_stats
from hybridgen.params import SamplingParams
from hybridgen.sampling import SamplerPlan, resolve
from hybridgen.telemetry.statistics import Counters

PROMPT = families.prompts_of((21,))[0]
PENALTIES = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.2, logprobs=2)
Damage = Callable[[ModelRunner], None]


class Replays:
    """Records a step as itself, with damage done after each replay."""

    owner = "replays"

    def __init__(self, damage: Damage, runner: ModelRunner) -> None:
        self._damage = damage
        self._runner = runner

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        def replay() -> None:
            step()
            self._damage(self._runner)

        return Recorded(replay, lambda: None, self.owner, 1.0, 1.0, 0)

    def close(self) -> None:
        return None


@pytest.fixture
def runner() -> Iterator[ModelRunner]:
    runner = make_runner()
    yield runner
    free_runner(runner)


def record(runner: ModelRunner, damage: Damage, *keys: GraphKey) -> None:
    recorder = Replays(damage, runner)
    runner.use_graphs(
        GraphSettings(decode=(4,), prefill=(32,), max_rows=4),
        recorder=lambda key, lazy: recorder,
        why_plain="",
        counters=Counters(),
        validates=True,
    )
    runner.capture(keys, lambda: None)


def run(runner: ModelRunner) -> list[tuple[int, float]]:
    """A prefill and four decode steps of one request: tokens, and what is close enough of their log-probabilities."""
    runner.admit(Admission(2, [3, 1], resolve(PENALTIES, None, (), families.VOCAB), PROMPT))
    steps = [runner.prefill([PrefillChunk(2, PROMPT, 0, len(PROMPT), 0, True)])]
    outputs = [steps[0].read(), *(runner.decode((2,)).read() for _ in range(4))]
    return [(output.tokens[0][0], pytest.approx(output.logprobs[0][0].logprob, abs=1e-4)) for output in outputs]


def keys_for(outside: bool) -> list[GraphKey]:
    plan = None if outside else SamplerPlan(sample=True, penalties=True, logprobs=2)
    return [GraphKey.decode(4, plan), GraphKey.prefill(32, 1, plan)]


@pytest.mark.parametrize("outside", [False, True])
def test_a_right_recording_stays(runner: ModelRunner, outside: bool) -> None:
    expected = run(runner)
    runner.sampler.output_counts.zero_()
    record(runner, lambda runner: None, *keys_for(outside))
    assert run(runner) == expected
    assert all(recording.checked for recording in runner.graphs.recordings)
    assert graph_stats(runner.graphs).hits == 5
    assert runner.sampler.output_counts[2].sum() == 5  # each token counted once


DAMAGE: dict[str, Damage] = {
    "token": lambda runner: runner.ring.tokens.add_(1),
    "state": lambda runner: runner.state.table[1].add_(1),
    "counter": lambda runner: runner.ring.counter.add_(1),
    "counts": lambda runner: runner.sampler.output_counts.add_(1),
    "logits": lambda runner: runner.steps.logits[0, 5].add_(2.0),
    "one bit": lambda runner: runner.steps.logits[0].copy_(
        torch.nextafter(runner.steps.logits[0], torch.tensor(torch.inf))
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_recording_that_leaves_something_else_is_dropped(runner: ModelRunner, what: str) -> None:
    expected = run(runner)
    record(runner, DAMAGE[what], *keys_for(False))
    with pytest.warns(RuntimeWarning, match="its first replay gave other values"):
        assert run(runner) == expected
    assert runner.graphs.recordings == ()
    assert len(graph_stats(runner.graphs).failures) == 2
    assert runner.sampler.output_counts[2].sum() == 5
    assert runner.ring.counter.item() == runner.ring._launched


def test_a_recording_up_to_the_logits_with_other_logits_is_dropped(runner: ModelRunner) -> None:
    expected = run(runner)
    record(runner, DAMAGE["logits"], *keys_for(True))
    with pytest.warns(RuntimeWarning, match="its first replay gave other values"):
        assert run(runner) == expected
    assert runner.graphs.recordings == ()


def test_nan_is_equal_to_nan(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose logits are NaN fails, and its graph is not to blame."""
    record(runner, lambda runner: None, *keys_for(False))
    forward = runner.bound.forward
    monkeypatch.setattr(runner.bound, "forward", lambda *args: forward(*args) * torch.nan)
    assert [token for token, _ in run(runner)] == [-1] * 5
    assert len(runner.graphs.recordings) == 2


def test_each_recording_is_compared_once(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    compare = validation.compare_first_replay

    def counted(*args: object, **tolerance: float) -> str | None:
        compared.append(1)
        return compare(*args, **tolerance)

    monkeypatch.setattr("hybridgen.execution.validation.compare_first_replay", counted)
    record(runner, lambda runner: None, *keys_for(False))
    run(runner)
    run(runner)
    assert len(compared) == 2
