"""Decode attention of little work on a CPU, by numpy on views of the pages: nothing is gathered.

A step of a small model is dozens of such calls, and each of torch's operators costs several microseconds before it
computes; numpy's cost one or two. Scores of all pages of a row lie in one array, so that the softmax is the
reference's. One thread computes: where there are several, and work for them, `kernels.attention.cpu` takes torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridgen.kernels.attention.seeing import Seeing

_LITTLE = 2**19
"""Elements of K that are read, from which on several threads are worth their start."""


def is_for_numpy(q: Tensor, k_pages: Tensor, v_pages: Tensor, places: Sequence[int]) -> bool:
    """Whether `attend` takes this call: float32 throughout, no gradient, and too little work for several threads."""
    if not q.dtype == k_pages.dtype == v_pages.dtype == torch.float32 or q.requires_grad:
        return False
    if torch.get_num_threads() == 1:
        return True
    return k_pages.shape[1] * k_pages.shape[3] * (sum(places) + len(places)) <= _LITTLE


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    places: Sequence[int],
    see: Seeing,
    k: Tensor | None,
    v: Tensor | None,
) -> Tensor:
    """`attention.decode_attention` of float32 tensors; `places` are the positions on the host."""
    # Tensor.numpy() would end that their memory can be given back (`Engine.release_cache`).
    keys, values, queries = np.from_dlpack(k_pages), np.from_dlpack(v_pages), q.numpy()
    kv_heads, page_size = keys.shape[1:3]
    group = q.shape[1] // kv_heads
    out = q.new_empty((*q.shape[:2], v_pages.shape[3]))
    result = out.numpy().reshape(len(places), kv_heads, group, v_pages.shape[3])
    table = block_table.numpy()
    rows = [table[slot] for slot in slots.tolist()]
    if k is not None and v is not None:  # all of them first: rows can be tokens of one request
        new = k.numpy(), v.numpy()
        for token, (row, place) in enumerate(zip(rows, places, strict=True)):
            page, at = row[place // page_size], place % page_size
            keys[page, :, at] = new[0][token]
            values[page, :, at] = new[1][token]
    for token, (row, place) in enumerate(zip(rows, places, strict=True)):
        first, last, skipped = see.pages(place, page_size)
        pages = row[first : last + 1].tolist()
        query = queries[token].reshape(kv_heads, group, queries.shape[2])
        _row(query, keys, values, pages, skipped, place % page_size + 1, see, result[token])
    return out


def _row(
    query: Any, keys: Any, values: Any, pages: list[int], skipped: int, filled: int, see: Seeing, out: Any
) -> None:
    """One row's query [Hkv, G, D] over `pages`, of whose first `skipped` positions are not seen and of whose last
    `filled` are written; out [Hkv, G, Dv]."""
    page_size = keys.shape[2]
    heads, group, _ = query.shape
    length = (len(pages) - 1) * page_size + filled - skipped
    runs = []
    start = 0
    for number, page in enumerate(pages):
        low = 0 if number else skipped
        high = filled if number == len(pages) - 1 else page_size
        runs.append((page, slice(low, high), slice(start, start + high - low)))
        start += high - low
    sinks = 0 if see.sinks is None else 1
    scores = np.empty((heads, group, length + sinks), np.float32)
    scaled = query * np.float32(see.scale)
    for page, inside, where in runs:
        np.matmul(scaled, keys[page, :, inside].swapaxes(1, 2), out=scores[:, :, where])
    if see.softcap > 0:
        cap = np.float32(see.softcap)
        scores[:] = np.tanh(scores / cap) * cap
    if see.sinks is not None:
        scores[:, :, length] = see.sinks.detach().float().numpy().reshape(heads, group)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    for number, (page, inside, where) in enumerate(runs):
        if number == 0:
            np.matmul(scores[:, :, where], values[page, :, inside], out=out)
        else:
            out += np.matmul(scores[:, :, where], values[page, :, inside])
