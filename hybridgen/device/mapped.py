"""Host memory that the device addresses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hybridgen.errors import DeviceError


class _HostMapped:
    """Pinned host memory as the device sees it: under unified addressing the address is the same on both sides."""

    def __init__(self, host: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "typestr": host.numpy().dtype.str,
            "data": (host.data_ptr(), False),
            "version": 2,
        }


def host_mapped(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """Zeros in host memory, as the device's tensor and as the host's array; on CUDA pinned.

    Raises:
        DeviceError: the device does not address pinned host memory where the host does.
    """
    host = torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    if device.type != "cuda":
        return host, host.numpy()
    mapped = torch.as_tensor(_HostMapped(host), device=device)
    if mapped.data_ptr() != host.data_ptr():
        raise DeviceError(f"{device} does not address pinned host memory where the host does; use another device")
    # The array keeps the pinned tensor alive; whoever has the mapped one keeps the array.
    return mapped, host.numpy()
