"""Decode steps of several tokens a row on a GPU, recorded and not: the logits of single steps."""

from __future__ import annotations

import families
import pytest
import torch

import hybridgen
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.graphs import GraphKey, GraphSettings
from hybridgen.graphs.cuda import CudaGraphRecorder
from hybridgen.params import SamplingParams
from hybridgen.sampling import resolve
from hybridgen.telemetry.statistics import Counters

pytestmark = pytest.mark.gpu

PROMPTS = families.prompts_of((21, 9, 30))
SLOTS = (2, 0, 3)
FORCED = torch.tensor([[5, 9, 33, 7], [8, 8, 41, 3], [60, 2, 11, 19]])


def make(family: str, query_len: int, backend: str | None, *, prompts=PROMPTS, slots=SLOTS):  # type: ignore[no-untyped-def]
    from hybridgen.cache import allocate
    from hybridgen.execution import ModelRunner
    from hybridgen.execution.warm_up import compile_layers
    from hybridgen.models import bind

    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda", 0)
    bound = bind(families.build(family).to(device))
    rows = max(4, len(slots))
    runner = ModelRunner(
        bound, vocab_size=families.VOCAB, max_batch=rows, max_pages=4, token_budget=64, query_len=query_len,
        compile_backend=backend,
    )  # fmt: skip
    states = bound.layer_states(16, torch.float32)
    allocate(states, 1 + 4 * rows, 1 + rows, device)
    runner.attach(states)
    compile_layers(runner)
    greedy = resolve(SamplingParams(temperature=0.0), None, (), families.VOCAB)
    for index, (slot, prompt) in enumerate(zip(slots, prompts, strict=True)):
        runner.admit(Admission(slot, [1 + 4 * index + page for page in range(4)], greedy, prompt))
        runner.prefill([PrefillChunk(slot, prompt, 0, len(prompt), 0, True)]).read()
        runner.state.table[0, slot] = int(FORCED[index % 3, 0])
        runner.state.drafts[slot] = FORCED[index % 3, 1:query_len].to(device)
    runner.steps.keep_logits()
    return runner


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("backend", [None, "inductor"])
@torch.inference_mode()
def test_forced_tokens_give_the_logits_of_single_steps(family: str, backend: str | None) -> None:
    runner = make(family, 1, backend)
    expected = []
    for place in range(4):
        for index, slot in enumerate(SLOTS):
            runner.state.table[0, slot] = int(FORCED[index, place])
        runner.steps.stage_decode(SLOTS)
        runner.run(GraphKey.decode(3, None))
        expected.append(runner.steps.logits[:3].clone())
        runner.state.table[1, list(SLOTS)] += 1
    singles = torch.stack(expected, dim=1)
    runner.close()

    runner = make(family, 4, backend)
    recorder = CudaGraphRecorder(runner.device)
    runner.use_graphs(
        GraphSettings(decode=(4,), max_rows=4, max_padding_ratio=8),
        recorder=lambda key, lazy: recorder,
        why_plain="",
        counters=Counters(),
    )
    runner.capture([GraphKey.decode(4, None, query_len=count) for count in (2, 3, 4)], lambda: None)
    for count in (2, 3, 4):
        runner.steps.stage_decode(SLOTS)
        runner.run(GraphKey.decode(3, None, query_len=count))
        plain = runner.steps.logits[: 3 * count].view(3, count, -1).clone()
        torch.testing.assert_close(plain, singles[:, :count], atol=1e-3, rtol=1e-3)
        route = runner.router.route(GraphKey.decode(3, None, query_len=count))
        assert (route.kind, route.reason) == ("layers, cuda graph", f"padded to bucket 4, {count - 1} drafts a row")
        for _ in range(3):
            route.run()
        replayed = runner.steps.logits[: 3 * count].view(3, count, -1)
        torch.testing.assert_close(replayed, singles[:, :count], atol=1e-3, rtol=1e-3)
    runner.close()


def test_recorded_steps_have_the_registered_op_in_them() -> None:
    """A captured step calls `hybridgen::copy_metadata`; without a recording a step launches prepared copies."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if torch.cuda.is_current_stream_capturing():
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    model = families.build("llama").to("cuda")
    with Seen(), hybridgen.Engine.load(
        model, mode="graph", max_batch=2, page_size=16, kv_memory="16MiB", token_budget=64, decode_buckets=[1, 2],
        prefill_buckets=[],
    ) as engine:  # fmt: skip
        assert engine.stats().graphs.graphs
    assert "hybridgen.copy_metadata.default" in seen


@torch.inference_mode()
def test_many_rows_of_several_tokens_attend_by_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows at once, 16 of 4 tokens, give the logits of the same rows in steps of few rows."""
    from hybridgen.kernels.attention import balanced

    found: list[int] = []
    attend = balanced.decode_attention
    monkeypatch.setattr(balanced, "decode_attention", lambda q, *rest: found.append(len(q)) or attend(q, *rest))
    prompts = families.prompts_of(tuple(3 + 3 * i for i in range(16)))
    runner = make("gemma2", 4, None, prompts=prompts, slots=tuple(range(16)))
    runner.steps.stage_decode(tuple(range(16)))
    runner.run(GraphKey.decode(16, None, query_len=4))
    together = runner.steps.logits[:64].view(16, 4, -1).clone()
    assert set(found) == {64}
    for first in range(0, 16, 4):
        runner.steps.stage_decode(tuple(range(first, first + 4)))
        runner.run(GraphKey.decode(4, None, query_len=4))
        part = runner.steps.logits[:16].view(4, 4, -1)
        torch.testing.assert_close(part, together[first : first + 4], atol=1e-3, rtol=1e-3)
    assert set(found) == {64}
    runner.close()
