"""What the persistent kernels' steps have in common: the launch, what blocks exchange, and what mends a step."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from hybridgen.device.mapped import host_mapped
from hybridgen.device.program import Kernel, Program
from hybridgen.models.decoder import Norm

_SECTOR = 32
"""Counters and parts of `words` begin this many integers apart, so that polling one does not slow another."""


class KernelStep:
    """A loaded persistent kernel with its buffers.

    Blocks wait for what other blocks exchange. One that has waited too long gives the step up, and says so in host
    memory. All that is exchanged outlives a launch, so only one launch of a step may run at a time.
    """

    _parameters: ctypes.Array[ctypes.c_char]
    """What the kernel is launched with."""

    def __init__(
        self,
        program: Program,
        code: bytes,
        shared_bytes: int,
        *,
        blocks: int,
        threads: int,
        device: torch.device,
        sizes: Mapping[str, int],
        counters: int,
    ) -> None:
        """Load the kernel.

        Args:
            code: the program compiled for the device.
            threads: of a block.
            sizes: 32-bit words of each exchange, by name.

        Raises:
            DeviceError: the driver refuses the kernel.
        """
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).synchronize()  # the driver's context exists and is current from here on
            self.kernel = Kernel(code, shared_bytes, program)
        self._blocks, self._threads, self._device = blocks, threads, device
        room = {name: -(-size // _SECTOR) * _SECTOR for name, size in sizes.items()}
        with torch.inference_mode(False):
            self.words = torch.zeros(sum(room.values()), dtype=torch.int32, device=device)
            self.counters = torch.zeros(counters * _SECTOR, dtype=torch.int32, device=device)
            self._fault, self._host_fault = host_mapped((1,), torch.int32, device)
            pieces = self.words.split(list(room.values()))
            self.parts = {name: piece[: sizes[name]] for name, piece in zip(room, pieces, strict=True)}
            """The words of each exchange, by name; views."""

    def _launch(self) -> None:
        """Launch on the current stream."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self.kernel.launch(self._blocks, self._threads, self._parameters, stream)

    @property
    def faulted(self) -> bool:
        """Whether a block gave up waiting in a step that has run; its logits, and later ones', are not usable."""
        return bool(self._host_fault[0])

    def give_up(self) -> None:
        """Let a step that runs end without numbers, and wait for nobody any more; from any thread."""
        self._host_fault[0] = 1

    def repair(self) -> None:
        """Make the buffers as new, after a step that was given up or never ended. Waits for the device."""
        torch.cuda.synchronize(self._device)
        for tensor in self._exchanged():
            tensor.zero_()
        self._host_fault[0] = 0
        torch.cuda.synchronize(self._device)

    def _exchanged(self) -> tuple[Tensor, ...]:
        """What is zero before the first step."""
        return self.words, self.counters


def address_of(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def scale_of(norm: Norm | None) -> int:
    """Where a norm's factors lie; 0 for no norm."""
    return address_of(None if norm is None else norm.scale)
