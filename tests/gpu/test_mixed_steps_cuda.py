"""Prompts fed beside decode on a GPU: their keys are written before they are read, and no token changes."""

from __future__ import annotations

import random
from pathlib import Path

import families
import pytest
import torch

import hybridgen
from hybridgen.engine.mixing import RUN, Mixing
from hybridgen.kernels.attention import reference
from hybridgen.kernels.attention.ops import Options, Places, decode_attention, make_schedule, schedule_attention
from hybridgen.kernels.attention.rotary import HeadNorms, rotate_and_write, turned

pytestmark = pytest.mark.gpu

PAGE, LENGTH = 64, 1280
REPEATS = 1000
HEADS = [(32, 8, 128), (32, 8, 64), (16, 8, 128)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_reads_what_the_step_wrote(heads: tuple[int, int, int]) -> None:
    """Runs of `RUN` tokens that begin anywhere in a page, beside rows that decode. What a run is to write holds NaN
    before each repeat, and a read that comes too early is seen in it."""
    query_heads, kv_heads, dim = heads
    draw = random.Random(dim + query_heads)
    slots, positions = [], []
    for slot in range(32):  # decode
        slots.append(slot)
        positions.append(draw.randint(0, LENGTH - 1))
    for slot, start in zip(range(32, 35), (37, 640, 1000), strict=True):
        slots += [slot] * RUN
        positions += range(start, start + RUN)
    count = len(slots)
    torch.manual_seed(dim)
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    per_row = LENGTH // PAGE
    table = torch.arange(1, 35 * per_row + 1, dtype=torch.int32, device="cuda").view(35, per_row)
    pages = [torch.randn(35 * per_row + 1, kv_heads, PAGE, dim, **bf16) for _ in range(2)]
    places = Places(
        *pages,
        table,
        torch.tensor(slots, dtype=torch.int32, device="cuda"),
        torch.tensor(positions, dtype=torch.int64, device="cuda"),
    )
    q = torch.randn(count, query_heads, dim, **bf16)
    k, v = (torch.randn(count, kv_heads, dim, **bf16) for _ in range(2))
    angles = torch.randn(count, dim // 2, device="cuda").repeat(1, 2)
    cos, sin = (each.to(torch.bfloat16) for each in (angles.cos(), angles.sin()))
    at = table[places.slots.long(), places.positions // PAGE].long(), places.positions % PAGE
    schedule = make_schedule(*places[:3], query_heads, count, 0, 0)
    out = torch.empty(count, query_heads, dim, **bf16)
    poison = torch.full((), torch.nan, **bf16)  # a Python number would be copied from the CPU, which a capture refuses

    def step() -> None:
        for each in pages:
            each[at[0], :, at[1]] = poison
        schedule_attention(places, query_heads, 0, 0, schedule)
        for _ in range(2):  # the second as in the next layer: the kernel in front is the first one's attention
            turned_q = rotate_and_write(q, k, v, cos, sin, HeadNorms(), places)
            out.copy_(decode_attention(turned_q, places, Options(dim**-0.5), schedule=schedule))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    first = out.clone()
    exact = [each.float() for each in pages]
    expected = reference.decode_attention(
        turned(q, cos, sin, None, 0.0, 0.0).float(), *exact, *places[2:], *Options(dim**-0.5)
    )
    error = (first.float() - expected).norm() / expected.norm()
    assert error < 5e-3
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        graph.replay()
        wrong += (out.view(torch.int16) != first.view(torch.int16)).any()
    assert int(wrong) == 0


@pytest.mark.parametrize("mode", ["jit", "hybrid"])
def test_the_tokens_are_those_of_prefill_calls(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    draw = random.Random(1)
    prompts = families.prompts_of([draw.randint(1, 200) for _ in range(60)])
    params = [
        hybridgen.SamplingParams(
            max_new_tokens=draw.choice((5, 20, 60, 100)), temperature=i % 2, seed=i, ignore_eos=True
        )
        for i in range(60)
    ]
    settings = {"device": "cuda", "max_batch": 64, "kv_memory": "64MiB", "max_context": 352, "mode": mode}
    with hybridgen.Engine.load(families.write("llama", tmp_path), mixed_steps=True, **settings) as engine:
        scheduler = engine._loop.scheduler
        assert scheduler.mixing is not None
        scheduler.mixing = None
        expected = [out.token_ids for out in engine.generate(prompts, params)]
        scheduler.pages.clear()
        scheduler.mixing = Mixing(scheduler.pages, 64, least_rows=8)  # all 60 are admitted at once: 15 decode
        for _ in range(2):
            assert [out.token_ids for out in engine.generate(prompts, params)] == expected
            scheduler.pages.clear()
        steps = engine.stats().steps
        assert sum(count for (*_, reason), count in steps.items() if "prompts beside" in reason) > 20
