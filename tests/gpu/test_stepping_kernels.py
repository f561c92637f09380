"""`publish` and `advance` on a GPU against their references."""

from __future__ import annotations

import pytest
import torch

from hybridgen.execution.ring import TokenRing
from hybridgen.kernels.step.advance import REJECTED, advance, publish

pytestmark = pytest.mark.gpu


def step(device: str, rows: int, counter: int, seed: int, counted: bool) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-1, 1000, (rows,), generator=source)
    order = torch.randperm(40, generator=source)
    slots = torch.where(torch.rand(rows, generator=source) < 0.3, 40, order[:rows])
    table = torch.randint(0, 99, (3, 41), generator=source)
    table[:, 40] = 0
    ring = torch.randint(0, 99, (8, 41), generator=source)
    values = [torch.arange(rows), torch.arange(rows) * 2, torch.tensor([counter])]
    counts = [torch.randint(0, 5, (41, 1000), generator=source, dtype=torch.int32)] if counted else []
    moved = [t.to(device) for t in (tokens, slots, *values[:2], table, ring, values[2], *counts)]
    advance(*moved)
    return [t.cpu() for t in moved]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 40])
def test_advance_matches_its_reference(rows: int, counted: bool) -> None:
    for seed in range(20):
        arguments = rows, seed, seed, counted
        for ours, theirs in zip(step("cuda", *arguments), step("cpu", *arguments), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("query_len", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_advance_of_several_tokens_a_row_matches_its_reference(rows: int, query_len: int, counted: bool) -> None:
    for seed in range(20):
        source = torch.Generator().manual_seed(seed)
        tokens = torch.randint(-1, 20, (rows, query_len), generator=source)
        accepted = torch.randint(1, query_len + 1, (rows, 1), generator=source)
        tokens = torch.where(torch.arange(query_len) < accepted, tokens, REJECTED)
        found = []
        for device in ("cuda", "cpu"):
            order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:rows]
            table, ring = torch.zeros(3, 41, dtype=torch.int64), torch.zeros(8, 40 * 8 + 1, dtype=torch.int64)
            counts = [torch.zeros(41, 20, dtype=torch.int32)] if counted else []
            inputs = [
                tokens,
                order,
                torch.arange(rows) + 9,
                torch.arange(rows),
                table,
                ring,
                torch.tensor([seed]),
                *counts,
            ]
            moved = [tensor.to(device) for tensor in inputs]
            advance(*moved)
            found.append([tensor.cpu() for tensor in moved])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (5, 20), (2, 64)])
def test_publish_matches_its_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape).mul(100).to(dtype)
    for line in (0, 3, 7, 8, 8 * 10**9 + 5):
        rings = []
        for device in ("cpu", "cuda"):
            ring = torch.zeros((8, 9) if len(shape) == 1 else (8, 9, 64), dtype=dtype, device=device)
            publish(values.to(device), ring, torch.tensor([line], device=device))
            rings.append(ring.cpu())
        assert torch.equal(*rings)


def test_the_host_sees_what_the_device_writes() -> None:
    ring = TokenRing(5, torch.device("cuda", 0))
    assert ring.tokens.is_cuda
    table = torch.zeros(3, 6, dtype=torch.int64, device="cuda")
    rows = torch.arange(3, device="cuda")
    for i in range(30):
        ring.reserve()
        advance(rows + i, rows, rows, rows, table, ring.tokens, ring.counter)
        step = ring.launched(3, None, "", "")
        assert step.read().tokens == [[i], [i + 1], [i + 2]]
