"""Rows of tables on a device, written from the host without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class SentRows:
    """A table on a device that the host alone writes. Rows that have the wanted values already are not sent again:
    calls one after another mostly want in a slot what the last one wanted."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._sent = np.array(tensor.cpu().numpy())

    def write(self, rows: Sequence[int], values: np.ndarray) -> None:
        """Give some rows, each once, these values [len(rows), ...], of the table's dtype.

        Waits for nothing, in a number of launches that does not depend on how many rows there are.
        """
        rows, table = list(rows), self.tensor
        if np.array_equal(self._sent[rows], values):
            return
        # Torch's pinned allocator keeps a freed block until the copies that read it are done.
        host = torch.from_numpy(values).pin_memory() if table.is_cuda else torch.from_numpy(values)
        first, count = min(rows), len(rows)
        if rows == list(range(first, first + count)):
            table[first : first + count].copy_(host, non_blocking=True)
        else:
            index = torch.tensor(rows, dtype=torch.int64, device="cpu")
            index = index.pin_memory().to(table.device, non_blocking=True) if table.is_cuda else index
            table.index_copy_(0, index, host.to(table.device, non_blocking=True))
        self._sent[rows] = values
