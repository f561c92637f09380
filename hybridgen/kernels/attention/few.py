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

from hybridgen.kernels.attention.reference import Seeing


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
    count, heads, dim = queries.shape
    result = np.empty((count, kv_heads, heads // kv_heads, values.shape[3]), np.float32)
    table = block_table.numpy()
    rows = [table[slot] for slot in slots.tolist()]
    if k is not None and v is not None:  # all of them first: rows can be tokens of one request
        new_keys, new_values = k.numpy(), v.numpy()
        for token, place in enumerate(places):
            page, at = rows[token][place // page_size], place % page_size
            keys[page, :, at] = new_keys[token]
            values[page, :, at] = new_values[token]
    for token, place in enumerate(places):
        first, last, skipped = see.pages(place, page_size)
        pages = rows[token][first : last + 1].tolist()
        query = queries[token].reshape(kv_heads, heads // kv_heads, dim)
        _row(query, keys, values, pages, skipped, place % page_size + 1, see, result[token])
    return torch.from_numpy(result.reshape(count, heads, values.shape[3]))


def _row(
    query: Any, keys: Any, values: Any, pages: list[int], skipped: int, filled: int, see: Seeing, out: Any
) -> None:
    """One row's query [Hkv, G, D] over `pages`, of whose first `skipped` positions are not seen and of whose last
    `filled` are written; out [Hkv, G, Dv]."""
    page_size = keys.shape[2]
    heads, group, _ = query.shape
    last = len(pages) - 1
    length = last * page_size + filled - skipped
    sinks = 0 if see.sinks is None else 1
    scores = np.empty((heads, group, length + sinks), np.float32)
    scaled = query * np.float32(see.scale)
    start = 0
    for number, page in enumerate(pages):
        seen = keys[page, :, 0 if number else skipped : filled if number == last else page_size]
        end = start + seen.shape[1]
        np.matmul(scaled, seen.swapaxes(1, 2), out=scores[:, :, start:end])
        start = end
    if see.softcap > 0:
        cap = np.float32(see.softcap)
        scores[:] = np.tanh(scores / cap) * cap
    if see.sinks is not None:
        scores[:, :, length] = see.sinks.detach().float().numpy().reshape(heads, group)
    # The ufuncs' own reductions: `max()` and `sum()` go through two functions of Python.
    scores -= np.maximum.reduce(scores, axis=2, keepdims=True)
    np.exp(scores, out=scores)
    scores /= np.add.reduce(scores, axis=2, keepdims=True)
    start = 0
    for number, page in enumerate(pages):
        seen = values[page, :, 0 if number else skipped : filled if number == last else page_size]
        end = start + seen.shape[1]
        if number == 0:
            np.matmul(scores[:, :, :end], seen, out=out)
        else:
            out += np.matmul(scores[:, :, start:end], seen)
        start = end
