"""Attention to latents on a GPU: Triton's kernels against dense float64 attention, and a model's tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import families
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from latent_cases import dense, error, make_latents, mean_latents

import hybridgen
from hybridgen.kernels.attention.latent import latent_decode, latent_prefill, write_latent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

LIMITS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [  # heads, rank, rope, page size, dtype
    (16, 512, 64, 64, BF16),
    (16, 512, 64, 16, BF16),
    (16, 512, 64, 256, FP16),
    (128, 512, 64, 64, BF16),
    (20, 512, 64, 64, BF16),
    (40, 256, 32, 64, BF16),
    (40, 256, 32, 32, FP32),
    (3, 24, 8, 8, BF16),
    (5, 40, 24, 16, FP16),
    (16, 512, 64, 64, FP32),
]
LENGTHS = {"one": [5000], "few": [1, 64, 65, 700, 2100], "many": [1 + 37 * i for i in range(70)]}
EACH = pytest.mark.parametrize("shape", SHAPES, ids=str)
SCALE = 0.1


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _queries(tokens: int, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """As a product by heads leaves it."""
    return torch.randn(heads, tokens, width, device="cuda").to(dtype).transpose(0, 1)


def _poison() -> None:
    """Fill freed memory with NaN, so that an output element which nobody writes shows."""
    blocks = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(16)]
    del blocks


@EACH
@pytest.mark.parametrize("rows", LENGTHS)
def test_decode(shape: tuple, rows: str) -> None:
    heads, rank, rope, page_size, dtype = shape
    lengths = LENGTHS[rows]
    ones = [1] * len(lengths)
    cache = make_latents(lengths, rank, rope, page_size, dtype, "cuda")
    q, q_rotary = _queries(len(lengths), heads, rank, dtype), _queries(len(lengths), heads, rope, dtype)
    wanted = mean_latents(q, q_rotary, cache, ones, SCALE)
    _poison()
    found = latent_decode(q, q_rotary, cache.places(ones), SCALE)
    assert error(found, wanted) < LIMITS[dtype]
    new = cache.take_newest()
    _poison()
    again = latent_decode(q, q_rotary, cache.places(ones), SCALE, *new)
    assert torch.equal(again, found)  # what is appended is read as later steps read it
    assert torch.equal(cache.newest(), torch.stack([each[-1] for each in cache.sequences]))


@EACH
def test_prefill(shape: tuple) -> None:
    heads, rank, rope, page_size, dtype = shape
    nope, value_dim = 24, 40
    lengths, fed = [1, 70, 300, 900, 64], [1, 70, 1, 130, 64]
    cache = make_latents(lengths, rank, rope, page_size, dtype, "cuda")
    weight = (torch.randn(heads * (nope + value_dim), rank, device="cuda") * rank**-0.5).to(dtype)
    q, q_rotary = _queries(sum(fed), heads, nope, dtype), _queries(sum(fed), heads, rope, dtype)
    starts = cache.starts(fed, len(fed) + 3)
    new = torch.cat([each[-count:] for each, count in zip(cache.sequences, fed, strict=True)])[:, None]
    new = new[..., :rank], new[..., rank:]
    _poison()
    by_latents = latent_prefill(q, q_rotary, cache.places(fed), starts, weight, SCALE)
    _poison()
    found = latent_prefill(q, q_rotary, cache.places(fed), starts, weight, SCALE, *new)
    for row, each in enumerate(cache.sequences):
        both = (each[:, :rank].double() @ weight.double().T).view(-1, heads, nope + value_dim)
        keys = torch.cat((both[..., :nope], each[:, None, rank:].double().expand(-1, heads, -1)), dim=-1)
        here = slice(int(starts[row]), int(starts[row + 1]))
        wanted = dense(torch.cat((q[here], q_rotary[here]), dim=-1), keys, both[..., nope:], SCALE)
        assert error(found[here], wanted) < max(2 * LIMITS[dtype], 1e-5)
        assert error(by_latents[here], wanted) < max(2 * LIMITS[dtype], 1e-5)


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    heads, rank, rope, page_size, dtype = SHAPES[0]
    lengths = LENGTHS["many"]
    ones = [1] * len(lengths)
    cache = make_latents(lengths, rank, rope, page_size, dtype, "cuda")
    q, q_rotary = _queries(len(lengths), heads, rank, dtype), _queries(len(lengths), heads, rope, dtype)
    places = cache.places(ones)
    found = latent_decode(q, q_rotary, places, SCALE)
    for row in (0, 33, 69):
        same = torch.full_like(places.slots, row).long()
        there = places._replace(slots=places.slots[same], positions=places.positions[same])
        other = latent_decode(q[same], q_rotary[same], there, SCALE)
        assert torch.equal(other, found[same])


def test_a_recorded_step_reads_what_was_changed() -> None:
    heads, rank, rope, page_size, dtype = SHAPES[0]
    cache = make_latents([3000, 900, 130], rank, rope, page_size, dtype, "cuda")
    q, q_rotary = _queries(3, heads, rank, dtype), _queries(3, heads, rope, dtype)
    places = cache.places([1, 1, 1])
    for _ in range(2):
        latent_decode(q, q_rotary, places, SCALE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = latent_decode(q, q_rotary, places, SCALE)
    places.positions.sub_(torch.tensor([2500, 0, 77], device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, latent_decode(q, q_rotary, places, SCALE))


def test_tokens_are_written_to_their_pages() -> None:
    cache = make_latents([1, 300, 77], 512, 64, 64, BF16, "cuda")
    written = torch.full_like(cache.pages, torch.nan)
    both = torch.cat(cache.sequences)[:, None]
    write_latent(both[..., :512], both[..., 512:], cache.places(cache.lengths)._replace(pages=written))
    assert torch.equal(written.nan_to_num(7.0), cache.pages.nan_to_num(7.0))


# Experts in float32 wait for the device, so they cannot be recorded.
MODELS = [*(("minicpm3", mode) for mode in ("eager", "jit", "graph", "hybrid")), ("deepseek_v2", "jit")]


@pytest.mark.parametrize(("family", "mode"), MODELS)
def test_a_models_tokens(family: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's, over pages and chunks; the second call finds prompts in the prefix cache."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model = families.build(family).cuda()
    prompts = families.prompts_of((7, 300, 1, 33, 64, 130))
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    settings = {"max_batch": 8, "page_size": 16, "token_budget": 96, "kv_memory": "64MiB", "max_context": 352}
    settings |= {"prefill_buckets": (16, 96)} if mode in ("graph", "hybrid") else {}
    with hybridgen.Engine.load(families.write(family, tmp_path), mode=mode, device="cuda", **settings) as engine:
        for _ in range(2):
            outs = engine.generate(prompts, max_new_tokens=24)
            assert [list(out.token_ids) for out in outs] == expected
        stats = engine.stats()
        assert not stats.fallbacks
        if mode in ("graph", "hybrid"):
            assert [kind for phase, kind, _ in stats.steps if phase == "prefill" and kind != "eager"]
