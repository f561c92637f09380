"""Rows of tables on a device, written from the host without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def write_rows(rows: Sequence[int], *values: tuple[Tensor, Tensor]) -> None:
    """Write some rows of each table, in a number of launches that does not depend on how many rows there are.

    Args:
        rows: which ones, each once.
        values: a table [N, ...] on any device, and on the host its new rows [len(rows), ...] of the same dtype.
    """
    first, count = min(rows), len(rows)
    neighbours = list(rows) == list(range(first, first + count))
    index = None
    for table, new in values:
        # Torch's pinned allocator keeps a freed block until the copies that read it are done.
        host = new.pin_memory() if table.is_cuda and not new.is_pinned() else new
        if neighbours:
            table[first : first + count].copy_(host, non_blocking=True)
            continue
        if index is None:
            index = torch.tensor(rows, dtype=torch.int64, device="cpu")
            index = index.pin_memory().to(table.device, non_blocking=True) if table.is_cuda else index
        table.index_copy_(0, index, host.to(table.device, non_blocking=True))
