"""Blocks of metadata on their way to the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes; fields begin at multiples of it."""


class StagedBlock:
    """Named arrays that the host fills and one copy brings to the device.

    The copy is asynchronous and in the order of the stream, so it cannot overtake a step that still reads what the
    device has. The host's side is pinned, and there are two of it (or one): the next block is filled while the last
    one is copied, and an event guards each.
    """

    def __init__(
        self, fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device, *, buffers: int = 2
    ) -> None:
        """Fields by name, with dtype and shape; all zero at first."""
        places: dict[str, tuple[int, int]] = {}
        size = 0
        for name, (dtype, shape) in fields.items():
            bytes_ = dtype.itemsize * math.prod(shape)
            places[name] = size, size + bytes_
            size += -(-bytes_ // _ALIGNMENT) * _ALIGNMENT
        on_cuda = device.type == "cuda"
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._hosts = [torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=on_cuda) for _ in range(buffers)]
        self._events = [torch.cuda.Event() for _ in range(buffers)] if on_cuda else None
        self._turn = 0

        def views(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[slice(*places[name])].view(dtype).view(shape) for name, (dtype, shape) in fields.items()
            }

        self.device: dict[str, Tensor] = views(self._device)
        """The fields as the device has them."""
        self._arrays: list[dict[str, np.ndarray[Any, Any]]] = [
            {name: view.numpy() for name, view in views(host).items()} for host in self._hosts
        ]

    def open(self) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays to fill for the next `send()`; waits while they are still being copied.

        They hold what an earlier turn left.
        """
        if self._events is not None:
            self._events[self._turn].synchronize()
        return self._arrays[self._turn]

    def send(self) -> None:
        """Copy what was filled to the device, on the current stream."""
        self._device.copy_(self._hosts[self._turn], non_blocking=True)
        if self._events is not None:
            self._events[self._turn].record()
        self._turn = (self._turn + 1) % len(self._hosts)
