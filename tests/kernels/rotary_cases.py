"""Calls of `rotate_and_write`, for the tests on a CPU, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.kernels.attention.ops import Places
from hybridgen.kernels.attention.rotary import HeadNorms


class Case(NamedTuple):
    """Shapes and norms of a call."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    rotated: int
    page_size: int
    tokens: tuple[int, ...]
    """New tokens of each sequence."""
    norms: str = ""
    """Which heads are normalised: any of q and k."""
    shift: float = 0.0
    joined: bool = True
    """Whether q, k and v are views of one tensor, as the joined projections give them."""
    half: bool = False
    """Whether cos and sin have a column for each pair alone."""


CASES = [
    Case(4, 2, 16, 16, 16, 8, (5, 1, 13)),
    Case(7, 1, 24, 8, 16, 16, (3,), "qk"),
    Case(6, 3, 40, 40, 40, 8, (9, 2), "k", 1.0),
    Case(2, 2, 8, 8, 2, 64, (70,), "qk", 1.0, joined=False),
    Case(16, 8, 128, 128, 128, 64, (3, 4), "qk"),
    Case(5, 5, 64, 64, 32, 16, (17,), "q"),
    Case(64, 8, 64, 64, 64, 16, (1, 6), half=True),
    Case(4, 2, 24, 16, 16, 8, (9,), "qk", half=True),
]


def inputs(
    case: Case, dtype: torch.dtype, kept: torch.dtype | None = None, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, HeadNorms, Places]:
    """Arguments of a call; its pages hold -7 everywhere."""
    torch.manual_seed(seed)
    total = sum(case.tokens)
    sizes = case.heads * case.dim, case.kv_heads * case.dim, case.kv_heads * case.value_dim
    parts = list(torch.randn(total, sum(sizes), dtype=torch.float32).to(dtype).split(sizes, -1))
    if not case.joined:
        parts = [part.contiguous() for part in parts]
    q, k, v = (
        part.to(device).unflatten(-1, (-1, width))
        for part, width in zip(parts, (case.dim, case.dim, case.value_dim), strict=True)
    )
    if case.joined and device != "cpu":  # still views of one tensor
        whole = torch.cat([part.flatten(1) for part in (q, k, v)], -1)
        q, k, v = (
            part.unflatten(-1, (-1, width))
            for part, width in zip(whole.split(sizes, -1), (case.dim, case.dim, case.value_dim), strict=True)
        )
    angles = torch.randn(total, case.rotated // 2)
    angles = angles if case.half else torch.cat((angles, angles), -1)
    weights = [(torch.rand(case.dim) + 0.5).to(dtype).to(device) if name in case.norms else None for name in "qk"]
    norms = HeadNorms(*weights, 1e-6, 1e-5, case.shift, case.half)
    pages = -(-total // case.page_size) + len(case.tokens) + 1
    shape = pages, case.kv_heads, case.page_size
    ids = torch.randperm(pages - 1) + 1
    rows, first = torch.zeros(len(case.tokens) + 1, pages, dtype=torch.int32), 0
    slots, positions = [], []
    for slot, count in enumerate(case.tokens):
        start = 3 * slot  # not the first positions of its page
        needed = -(-(start + count) // case.page_size)
        rows[slot, :needed] = ids[first : first + needed]
        first += needed
        slots += [slot] * count
        positions += range(start, start + count)
    places = Places(
        torch.full((*shape, case.dim), -7.0, dtype=torch.float32).to(kept or dtype).to(device),
        torch.full((*shape, case.value_dim), -7.0, dtype=torch.float32).to(kept or dtype).to(device),
        rows.to(device),
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(positions, dtype=torch.int64, device=device),
    )
    return q, k, v, angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device), norms, places
