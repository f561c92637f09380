"""Launches of Triton kernels: facts about the device, and the shortest way to launch one kernel again.

Imports Triton; only the CUDA implementations import this module.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Device(NamedTuple):
    """What a launch depends on."""

    processors: int
    """Multiprocessors."""
    shared_memory: int
    """Bytes that one program can have."""
    overlap: bool
    """Programmatic dependent launch: a kernel may start while the one before it ends (compute capability 9)."""
    ordinal: int = 0


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", 96 * 2**10),
        properties.major >= 9,
        index,
    )


def device_of(tensor: Tensor) -> Device:
    """Facts about the tensor's device; a CPU tensor means Triton's interpreter."""
    if tensor.is_cuda:
        return _cuda_device(tensor.device.index)
    return Device(processors=4, shared_memory=64 * 2**10, overlap=False)


class Launcher:
    """Runs one kernel with fixed constants; the first call compiles, later ones take the shortest way.

    Triton's own launch binds and specialises every argument anew, most of the 35 us of host time that it took in a
    trial on an H200's host. That is skipped here, so a launcher serves only calls that are alike in all that Triton
    specialises on: device, dtypes, and the integers that it was not told to leave alone. A tensor that does not start
    at a multiple of 16 bytes goes Triton's way, unless the kernel does not specialise on its alignment.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self._kernel = kernel
        self._constants = constants
        self._aligned: list[int] | None = None
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        """Launch on the current stream of the first argument's device, which must be the current device."""
        if self._compiled is None or self._is_misaligned(args):
            self._launch_by_triton(grid, args)
            return
        if triton.knobs.runtime.launch_enter_hook is not None:  # a profiler listens
            self._compiled[grid](*args, *self._tail)
            return
        stream = torch._C._cuda_getCurrentRawStream(args[0].device.index)
        self._run(*grid, stream, self._function, self._metadata, None, None, None, *args, *self._tail)

    def _is_misaligned(self, args: tuple[Any, ...]) -> bool:
        return any(args[i].data_ptr() % 16 for i in self._aligned or ())

    def _launch_by_triton(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        compiled = self._kernel[grid](*args, **self._constants)
        if not args[0].is_cuda:  # the interpreter
            return
        if self._aligned is None:
            parameters = self._kernel.params
            self._aligned = [
                i
                for i, arg in enumerate(args)
                if isinstance(arg, Tensor) and not parameters[i].do_not_specialize_on_alignment
            ]
        if not self._is_misaligned(args):
            self._compiled = compiled
            self._tail = tuple(self._constants[name] for name in self._kernel.arg_names[len(args) :])
            self._run, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata


def power_of_two(size: int) -> int:
    """The next power of two, at least 16: what `tl.dot` takes for a head size."""
    return max(16, triton.next_power_of_2(size))
