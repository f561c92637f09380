"""Attention to latents in pages against dense float64 attention."""

from __future__ import annotations

import pytest
import torch
from latent_cases import dense, error, make_latents, mean_latents
from torch import Tensor

from hybridgen.kernels.attention.latent import (
    latent_decode,
    latent_prefill,
    through_keys,
    through_values,
    write_latent,
)

HEADS, RANK, ROPE, NOPE, VALUE, PAGE = 3, 16, 8, 12, 10, 8
LENGTHS = [1, 7, 8, 9, 30]
ONES = [1] * len(LENGTHS)
SCALE = 0.3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def queries(tokens: int, width: int = RANK, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, HEADS, width).to(dtype), torch.randn(tokens, HEADS, ROPE).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_decode(dtype: torch.dtype, tolerance: float) -> None:
    cache = make_latents(LENGTHS, RANK, ROPE, PAGE, dtype)
    q = queries(len(LENGTHS), dtype=dtype)
    wanted = mean_latents(*q, cache, ONES, SCALE)
    assert error(latent_decode(*q, cache.places(ONES), SCALE), wanted) < tolerance
    newest = cache.take_newest()
    assert error(latent_decode(*q, cache.places(ONES), SCALE, *newest), wanted) < tolerance
    assert torch.equal(cache.newest(), torch.stack([each[-1] for each in cache.sequences]))


def test_tokens_are_written_to_their_pages() -> None:
    cache = make_latents(LENGTHS, RANK, ROPE, PAGE)
    written = torch.full_like(cache.pages, torch.nan)
    both = torch.cat(cache.sequences)[:, None]
    write_latent(both[..., :RANK], both[..., RANK:], cache.places(LENGTHS)._replace(pages=written))
    assert torch.equal(written.nan_to_num(7.0), cache.pages.nan_to_num(7.0))


@pytest.mark.parametrize("parts", ["whole", "head by head"])
@pytest.mark.parametrize("fed", [[1, 7, 8, 9, 30], [1, 2, 8, 1, 11]])
def test_prefill(fed: list[int], parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tokens of each sequence; those before lie in the cache."""
    if parts != "whole":
        monkeypatch.setattr("hybridgen.kernels.attention.latent._BYTES", 1)
    cache = make_latents(LENGTHS, RANK, ROPE, PAGE)
    weight = torch.randn(HEADS * (NOPE + VALUE), RANK)
    q, q_rotary = queries(sum(fed), NOPE)
    starts = cache.starts(fed, len(fed) + 1)
    found = latent_prefill(q, q_rotary, cache.places(fed), starts, weight, SCALE)
    for row, each in enumerate(cache.sequences):
        both = (each[:, :RANK] @ weight.T).view(-1, HEADS, NOPE + VALUE)
        keys = torch.cat((both[..., :NOPE], each[:, None, RANK:].expand(-1, HEADS, -1)), dim=-1)
        here = slice(int(starts[row]), int(starts[row + 1]))
        wanted = dense(torch.cat((q[here], q_rotary[here]), dim=-1), keys, both[..., NOPE:], SCALE)
        assert error(found[here], wanted) < 1e-6
    # The way of CUDA: the projection's parts before and behind attention to latents.
    mixed = mean_latents(through_keys(q, weight), q_rotary, cache, fed, SCALE)
    assert error(found, through_values(mixed.float(), weight, NOPE).double()) < 1e-6


def test_the_ops_are_traced_whole() -> None:
    cache = make_latents(LENGTHS, RANK, ROPE, PAGE)
    cache.pages.nan_to_num_(0.0)
    cache.table.clamp_(max=len(cache.pages) - 1)
    places = cache.places(ONES)
    q = queries(len(LENGTHS))
    new = torch.randn(len(LENGTHS), 1, RANK), torch.randn(len(LENGTHS), 1, ROPE)
    compiled = torch.compile(latent_decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*q, places, SCALE, *new), latent_decode(*q, places, SCALE, *new))
    utilities = ("test_schema", "test_faketensor")
    ops = torch.ops.hybridgen
    torch.library.opcheck(ops.write_latent, (*new, *places), test_utils=utilities)
    torch.library.opcheck(ops.latent_decode, (*q, *places, SCALE, *new), test_utils=utilities)
    torch.library.opcheck(ops.latent_decode, (*q, *places, SCALE), test_utils=utilities)
    weight, starts = torch.randn(HEADS * (NOPE + VALUE), RANK), cache.starts(ONES, len(ONES) + 1)
    prefill = *queries(len(LENGTHS), NOPE), *places, starts, weight, SCALE
    torch.library.opcheck(ops.latent_prefill, prefill, test_utils=utilities)
    torch.library.opcheck(ops.latent_prefill, (*prefill, *new), test_utils=utilities)
