"""Decode steps over ragged contexts with random keys and values, and decode attention of them by a schedule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.device.launcher import device_of
from hybridgen.kernels.attention import balanced, decode
from hybridgen.kernels.attention.balanced import Tuning
from hybridgen.kernels.attention.common import heads_of

NO_PAGE = 2**30
"""A page id that must never be looked up."""
COLUMNS = 72
"""Pages that a row of the block table can hold: an engine with max_context=4608."""
LAYERS_IN_MEMORY = 4


class Shape(NamedTuple):
    """The attention of a model's layer."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    layers: int
    page: int = 64


SHAPES = [
    Shape("Llama-3.1-8B", 32, 8, 128, 32),
    Shape("Llama-3.2-1B", 32, 8, 64, 16),
    Shape("Qwen3-0.6B", 16, 8, 128, 28),
]


class Step(NamedTuple):
    """What decode attention of a step over `layers` caches is given."""

    q: Tensor
    """[layers, T, Hq, D]"""
    k: Tensor
    v: Tensor
    k_pages: Tensor
    """[layers, pages, Hkv, page_size, D]"""
    v_pages: Tensor
    block_table: Tensor
    slots: Tensor
    positions: Tensor

    def take(self, rows: Tensor) -> Step:
        """Some of its rows, the caches shared."""
        q, k, v = self.q[:, rows], self.k[:, rows], self.v[:, rows]
        return self._replace(q=q, k=k, v=v, slots=self.slots[rows], positions=self.positions[rows])


def make_step(
    shape: Shape, lengths: list[int], layers: int, columns: int, device: str, dtype: torch.dtype, poison: bool = False
) -> Step:
    """Rows of these lengths, the newest position included, in shuffled pages and slots.

    With `poison`, all that is not a position before the newest is NaN, and page ids beyond are NO_PAGE.
    """
    page = shape.page
    counts = [-(-n // page) for n in lengths]
    pages = sum(counts) + 2
    table = torch.full((len(lengths) + 1, max(columns, *counts)), NO_PAGE if poison else 0, dtype=torch.int32)
    slots = torch.randperm(len(lengths) + 1)[: len(lengths)].to(torch.int32)
    order = torch.randperm(pages - 1).to(torch.int32) + 1
    begin = 0
    for slot, count in zip(slots.tolist(), counts, strict=True):
        table[slot, :count] = order[begin : begin + count]
        begin += count
    size = layers, pages, shape.kv_heads, page, shape.dim
    if poison:
        k_pages = torch.full(size, torch.nan, dtype=dtype, device=device)
        v_pages = torch.full(size, torch.nan, dtype=dtype, device=device)
        places = torch.cat([torch.arange(n - 1) for n in lengths])
        row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths) - 1)
        ids = table[slots[row].long(), places // page].long().to(device)
        lines = (places % page).to(device)
        for target in (k_pages, v_pages):
            values = torch.randn(layers, len(places), shape.kv_heads, shape.dim, device=device).to(dtype)
            for layer in range(layers):
                target[layer, ids, :, lines] = values[layer]
    else:
        k_pages = torch.empty(size, dtype=dtype, device=device).normal_()
        v_pages = torch.empty(size, dtype=dtype, device=device).normal_()
    qkv = torch.randn(layers, len(lengths), shape.heads + 2 * shape.kv_heads, shape.dim, device=device).to(dtype)
    q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=2)
    positions = torch.tensor(lengths, device=device) - 1
    return Step(q, k, v, k_pages, v_pages, table.to(device), slots.to(device), positions)


def usual(shape: Shape) -> Tuning:
    """Launch options of Triton's kernel where steps use it."""
    heads = heads_of(shape.heads, shape.kv_heads, shape.dim, shape.dim, shape.page, 2)
    return balanced.tuning(heads, device_of(torch.empty(0, device="cuda")).shared_memory)


def room(step: Step, tune: Tuning | None, window: int = 0, chunk: int = 0) -> Tensor:
    """For a schedule, filled with what no schedule holds."""
    rows, columns = len(step.positions), step.block_table.shape[1]
    pages = step.k_pages[0], step.v_pages[0]
    words = balanced.words_needed(*pages, step.q.shape[2], rows, columns, window, chunk, tune)
    return torch.full((words,), -1, dtype=torch.int32, device=step.q.device)


def write(step: Step, plan: Tensor, tune: Tuning | None, window: int = 0, chunk: int = 0) -> None:
    where = step.k_pages[0], step.v_pages[0], step.block_table, step.slots, step.positions
    balanced.write_schedule(*where, step.q.shape[2], window, chunk, plan, tune)


def scheduled(
    step: Step,
    layer: int,
    plan: Tensor,
    tune: Tuning | None,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    append: bool = True,
) -> Tensor:
    new = (step.k[layer], step.v[layer]) if append else (None, None)
    where = step.k_pages[layer], step.v_pages[layer], step.block_table, step.slots, step.positions
    options = step.q.shape[-1] ** -0.5, window, chunk, softcap, sinks
    return balanced.decode_attention(step.q[layer], *where, *options, *new, plan, tune)


def split(step: Step, layer: int) -> Tensor:
    pages = step.k_pages[layer], step.v_pages[layer]
    scale = step.q.shape[-1] ** -0.5
    where = step.block_table, step.slots, step.positions
    new = {"k": step.k[layer], "v": step.v[layer]}
    return decode.decode_attention(step.q[layer], *pages, *where, scale, 0, 0, 0.0, None, **new)


def ragged(count: int) -> list[int]:
    """Contexts from 100 to 2000."""
    return torch.randint(100, 2001, (count,), generator=torch.Generator().manual_seed(count)).tolist()
