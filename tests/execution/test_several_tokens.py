"""Decode steps of several tokens a row: the logits of steps of one token, and what is accepted of them."""

from __future__ import annotations

from collections.abc import Iterator

import families
import pytest
import torch
from runners import free_runner, make_runner
from torch import Tensor

from hybridgen.execution import ModelRunner
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.execution.warm_up import compile_layers
from hybridgen.graphs import GraphKey, GraphSettings, StandInRecorder
from hybridgen.params import SamplingParams
from hybridgen.sampling import resolve
from hybridgen.telemetry.statistics import Counters

PROMPTS = families.prompts_of((21, 9, 30))
SLOTS = (2, 0, 3)
FORCED = torch.tensor([[5, 9, 33, 7], [8, 8, 41, 3], [60, 2, 11, 19]])
"""Tokens that are fed behind each prompt."""


def make(family: str, query_len: int, backend: str | None) -> ModelRunner:
    runner = make_runner(family, max_batch=4, pages=17, query_len=query_len, compile_backend=backend)
    with torch.inference_mode():
        compile_layers(runner)
    fill(runner)
    return runner


def fill(runner: ModelRunner) -> None:
    """The prompts are in the cache; each slot's last token is the first forced one."""
    greedy = resolve(SamplingParams(temperature=0.0), None, (), families.VOCAB)
    for index, (slot, prompt) in enumerate(zip(SLOTS, PROMPTS, strict=True)):
        runner.admit(Admission(slot, [1 + 4 * index + page for page in range(4)], greedy, prompt))
        runner.prefill([PrefillChunk(slot, prompt, 0, len(prompt), 0, True)]).read()
        runner.state.table[0, slot] = FORCED[index, 0]
        runner.state.drafts[slot] = FORCED[index, 1 : runner.state.query_len]
    runner.steps.keep_logits()


@torch.inference_mode()
def one_by_one(family: str, count: int) -> Tensor:
    """Logits behind each forced token, [rows, count, vocab], by uncompiled steps of one token."""
    runner = make(family, 1, None)
    found = []
    for place in range(count):
        for index, slot in enumerate(SLOTS):
            runner.state.table[0, slot] = FORCED[index, place]
        runner.steps.stage_decode(SLOTS)
        runner.run(GraphKey.decode(len(SLOTS), None))
        found.append(runner.steps.logits[: len(SLOTS)].clone())
        runner.state.table[1, list(SLOTS)] += 1
    free_runner(runner)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((family, None) for family in ("llama", "mistral", "gemma2", "qwen3_moe", "gpt2")),
        ("llama", "aot_eager"),
        ("gemma2", "eager"),
    ],
)
@torch.inference_mode()
def test_forced_tokens_give_the_logits_of_single_steps(family: str, backend: str | None) -> None:
    """Rows of one request see each other causally; windows, soft caps, experts and learned positions included."""
    expected = one_by_one(family, 4)
    runner = make(family, 4, backend)
    late = 0 if runner.compiled is None else runner.compiled.late_compiles
    for count in (1, 2, 3, 4):
        runner.steps.stage_decode(SLOTS)
        runner.run(GraphKey.decode(len(SLOTS), None, query_len=count))
        logits = runner.steps.logits[: len(SLOTS) * count].view(len(SLOTS), count, -1)
        torch.testing.assert_close(logits, expected[:, :count], atol=2e-4, rtol=2e-4)
    if runner.compiled is not None:
        assert runner.compiled.late_compiles == late
    free_runner(runner)


@pytest.mark.parametrize("backend", [None, "eager"])
@torch.inference_mode()
def test_recorded_and_padded_they_are_the_same(backend: str | None) -> None:
    expected = one_by_one("llama", 4)
    runner = make("llama", 4, backend)
    stand_in = StandInRecorder()
    runner.use_graphs(
        GraphSettings(decode=(4,), max_rows=4, max_padding_ratio=8),
        recorder=lambda key, lazy: stand_in,
        why_plain="",
        counters=Counters(),
    )
    runner.capture([GraphKey.decode(4, None, query_len=count) for count in (2, 3, 4)], lambda: None)
    assert runner.router.route(GraphKey.decode(3, None)).reason == "bucket 4 is not captured"  # of one token
    runner.capture([GraphKey.decode(4, None)], lambda: None)
    for count in (1, 2, 3, 4):
        route = runner.router.route(GraphKey.decode(3, None, query_len=count))
        drafts = f", {count - 1} drafts a row" if count > 1 else ""
        assert (route.kind, route.reason) == ("layers, stand-in", f"padded to bucket 4{drafts}")
        runner.steps.stage_decode(SLOTS)
        route.run()
        logits = runner.steps.logits[: 3 * count].view(3, count, -1)
        torch.testing.assert_close(logits, expected[:, :count], atol=2e-4, rtol=2e-4)
    free_runner(runner)


@pytest.fixture
def runner() -> Iterator[ModelRunner]:
    runner = make("llama", 4, None)
    yield runner
    free_runner(runner)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 11, "top_k": 20}])
@pytest.mark.parametrize("right", [0, 1, 2, 3])
@torch.inference_mode()
def test_drafts_are_accepted_while_they_are_the_rows_own_tokens(
    runner: ModelRunner, sampling: dict[str, object], right: int
) -> None:
    """Whatever is drafted, the row's tokens are those of steps of one token, and so is the state behind them."""
    params = resolve(SamplingParams(**sampling), None, (), families.VOCAB)
    slot, prompt, pages = 1, PROMPTS[0], [13, 14, 15, 16]

    def begin() -> None:
        runner.admit(Admission(slot, pages, params, prompt))
        runner.prefill([PrefillChunk(slot, prompt, 0, len(prompt), 0, True)]).read()

    begin()
    own = [runner.decode((slot,)).read().tokens[0][0] for _ in range(8)]
    end = runner.state.table[:, slot].clone()
    begin()
    found: list[int] = []
    while len(found) < 8:
        drafts = [*own[len(found) :], 0, 0, 0][:3]
        for place in range(right, 3):
            drafts[place] = (drafts[place] + 1) % families.VOCAB
        runner.state.drafts[slot] = torch.tensor(drafts)
        sampler = runner.sampler.needs((slot,))
        key = GraphKey.decode(1, sampler, query_len=4)
        runner.steps.stage_decode((slot,))
        runner.ring.reserve()
        runner.run(key)
        accepted = runner.ring.launched(1, None, "", "", 4).read().tokens[0]
        assert len(accepted) == right + 1 or len(found) + right + 1 > 8
        found += accepted
    assert found[:8] == own
    if right in (0, 1, 3):  # 8 tokens in whole steps
        assert torch.equal(runner.state.table[:, slot], end)
