"""Attention to latents in pages against dense float64 attention."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hybridgen.kernels.attention.latent import decode_without_host, latent_decode, latent_prefill, write_latent

HEADS, RANK, ROPE, NOPE, VALUE, PAGE = 3, 16, 8, 12, 10, 8
LENGTHS = (1, 7, 8, 9, 30)
SCALE = 0.3


class Case:
    """A cache whose pages lie in any order, with NaN wherever nobody wrote."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(0)
        columns = -(-max(LENGTHS) // PAGE)
        order = torch.randperm(len(LENGTHS) * columns, generator=self.generator) + 1
        self.table = order.view(len(LENGTHS), columns).int()
        self.pages = torch.full((len(order) + 1, 1, PAGE, RANK + ROPE), torch.nan, dtype=dtype)
        self.latents = [self.random(length, RANK + ROPE).to(dtype) for length in LENGTHS]
        self.slots = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).int()
        self.positions = torch.cat([torch.arange(length) for length in LENGTHS])
        write_latent(torch.cat(self.latents)[:, None], self.pages, self.table, self.slots, self.positions)

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)


def dense(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last tokens: q [n, H, D], keys [L, H, D], values [L, H, Dv]."""
    scores = torch.einsum("nhd,lhd->hnl", q.double(), keys.double()) * SCALE
    hidden = torch.arange(len(keys)) > torch.arange(len(keys) - len(q), len(keys))[:, None]
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values.double())


@pytest.mark.parametrize("attend", [latent_decode, decode_without_host])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_decode(attend: type[latent_decode], dtype: torch.dtype, tolerance: float) -> None:
    case = Case(dtype)
    q = case.random(len(LENGTHS), HEADS, RANK + ROPE).to(dtype)
    slots, positions = torch.arange(len(LENGTHS)).int(), torch.tensor(LENGTHS) - 1
    found = attend(q, case.pages, case.table, slots, positions, RANK, SCALE)
    for row, latents in enumerate(case.latents):
        shared = latents[:, None].expand(-1, HEADS, -1)
        wanted = dense(q[row : row + 1], shared, shared[..., :RANK])[0]
        assert (found[row].double() - wanted).abs().max() < tolerance


def test_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    q = case.random(len(LENGTHS), HEADS, RANK + ROPE)
    slots, positions = torch.arange(len(LENGTHS)).int(), torch.tensor(LENGTHS) - 1
    places = case.pages, case.table, slots, positions, RANK, SCALE
    whole = decode_without_host(q, *places)
    monkeypatch.setattr("hybridgen.kernels.attention.latent._BYTES", 1)
    torch.testing.assert_close(decode_without_host(q, *places), whole)


@pytest.mark.parametrize("parts", ["whole", "head by head"])
@pytest.mark.parametrize("fed", [(1, 7, 8, 9, 30), (1, 2, 8, 1, 11)])
def test_prefill(fed: tuple[int, ...], parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tokens of each sequence; those before lie in the cache."""
    if parts != "whole":
        monkeypatch.setattr("hybridgen.kernels.attention.latent._BYTES", 1)
    case = Case()
    weight = case.random(HEADS * (NOPE + VALUE), RANK)
    q = case.random(sum(fed), HEADS, NOPE + ROPE)
    slots = torch.repeat_interleave(torch.arange(len(fed)), torch.tensor(fed)).int()
    positions = torch.cat([torch.arange(length - n, length) for length, n in zip(LENGTHS, fed, strict=True)])
    starts = torch.tensor([0, *fed, 0]).cumsum(0).int()  # as for a run without tokens at the end
    found = latent_prefill(q, case.pages, case.table, slots, positions, starts, weight, SCALE)
    for row, latents in enumerate(case.latents):
        both = (latents[:, :RANK] @ weight.T).view(-1, HEADS, NOPE + VALUE)
        keys = torch.cat((both[..., :NOPE], latents[:, None, RANK:].expand(-1, HEADS, -1)), dim=-1)
        begin, end = int(starts[row]), int(starts[row + 1])
        wanted = dense(q[begin:end], keys, both[..., NOPE:])
        assert (found[begin:end].double() - wanted).abs().max() < 1e-4


def test_the_ops_are_traced_whole() -> None:
    case = Case()
    slots, positions = torch.arange(len(LENGTHS)).int(), torch.tensor(LENGTHS) - 1
    arguments = case.random(len(LENGTHS), HEADS, RANK + ROPE), case.pages, case.table, slots, positions, RANK, SCALE
    compiled = torch.compile(latent_decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), latent_decode(*arguments))
    utilities = ("test_schema", "test_faketensor")
    ops = torch.ops.hybridgen
    pages = torch.zeros_like(case.pages)
    places = pages, case.table, slots, positions
    torch.library.opcheck(ops.write_latent, (case.random(5, 1, RANK + ROPE), *places), test_utils=utilities)
    torch.library.opcheck(ops.latent_decode, (arguments[0], *places, RANK, SCALE), test_utils=utilities)
    weight, starts = case.random(HEADS * (NOPE + VALUE), RANK), torch.tensor([0, 1, 2, 3, 4, 5, 5]).int()
    q = case.random(5, HEADS, NOPE + ROPE)
    torch.library.opcheck(ops.latent_prefill, (q, *places, starts, weight, SCALE), test_utils=utilities)


def test_the_process_that_compiles_steps_knows_the_ops() -> None:
    names = "write_latent", "latent_decode", "latent_prefill"
    code = f"import hybridgen.compilation.worker, torch; [getattr(torch.ops.hybridgen, name) for name in {names}]"
    subprocess.run([sys.executable, "-c", code], check=True)
