"""Kernels in CUDA C++ for compute capability 9.0. Where one cannot be had, a slower one serves."""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable

import torch

from hybridgen.device.program import Kernel, Program, Unfit, machine_code
from hybridgen.errors import DeviceError

logger = logging.getLogger(__name__)
OF_ONE_TOKEN = "experts_one"
OF_FEW_ROWS = "int4_few"
_refused: set[tuple[str, int]] = set()
_slower: set[tuple[str, int, Hashable]] = set()


def refuse(kernel: str, device: torch.device) -> bool:
    """Leave to slower kernels from now on, on this device, what this one is for; whether it was used until now."""
    key = kernel, device.index or 0
    was_used = device.type == "cuda" and is_hopper(key[1]) and key not in _refused
    _refused.add(key)
    return was_used


def prefer(kernel: str, device: torch.device, sizes: Hashable, preferred: bool) -> None:
    """Whether calls of these sizes go by a kernel on this device, where it serves. They do until that is said."""
    key = kernel, device.index or 0, sizes
    (_slower.discard if preferred else _slower.add)(key)


def prefers(kernel: str, device: torch.device, sizes: Hashable) -> bool:
    """What was said to `prefer`."""
    return (kernel, device.index or 0, sizes) not in _slower


def serves(kernel: str, device: torch.device) -> bool:
    """Whether a kernel may be used on a device: compute capability 9.0, and nobody has refused it there."""
    ordinal = device.index or 0
    return device.type == "cuda" and is_hopper(ordinal) and (kernel, ordinal) not in _refused


@functools.cache
def is_hopper(ordinal: int) -> bool:
    """Whether the device has compute capability 9.0."""
    return torch.cuda.get_device_capability(ordinal) == (9, 0)


@functools.cache
def loaded(
    program: Program, constants: tuple[tuple[str, str | int], ...], shared_bytes: int, ordinal: int, serves: str
) -> Kernel | None:
    """The kernel in the device's context; None where it cannot be had, which is said once.

    Args:
        constants: names and values that it is compiled with.
        serves: what takes a slower kernel then, for the message.
    """
    try:
        with torch.cuda.device(ordinal):
            torch.cuda.synchronize()  # this thread has the device's context then
            return Kernel(machine_code(dict(constants), (9, 0), program), shared_bytes, program)
    except (Unfit, DeviceError) as error:
        logger.warning("%s take a slower kernel: %s", serves, error)
        return None
