"""Where a model runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hybridgen.errors import DeviceError


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` stands for; a CUDA device with its index.

    Raises:
        DeviceError: CUDA was asked for and there is none, or not that many devices.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if name == "auto":
            return torch.device("cpu")
        build = "finds no usable GPU" if torch.version.cuda else "is built without CUDA"
        raise DeviceError(
            f"device={name!r}, but PyTorch {torch.__version__} {build}; use device='cpu', or install a "
            "driver and a CUDA build of PyTorch"
        )
    count = torch.cuda.device_count()
    device = torch.device("cuda" if name == "auto" else name)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise DeviceError(f"device={name!r}, but there are {count} CUDA devices; choose cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def without_default_device() -> AbstractContextManager[Any]:
    """Inside, what names no device is made on the CPU, whatever a script has set with `torch.set_default_device`:
    transformers would load the model there.
    """
    cpu = torch.device("cpu")
    return nullcontext() if torch.get_default_device() == cpu else cpu
