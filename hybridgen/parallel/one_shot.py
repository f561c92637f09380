"""Small sums and gathers over the GPUs of a host, in one kernel of our own: `one_shot.cu` says how.

Each rank maps the memory of the others (CUDA IPC). NCCL does the same in 10 to 12 us for a few KB; on the way there are
its own barriers and rounds.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hybridgen.device.mapped import host_mapped
from hybridgen.device.program import Kernel, Program, compile_cubin
from hybridgen.parallel.memory import PeerMemory

PROGRAM = Program((__package__ or "",), "one_shot.cu", (), "one_shot")
ADDS = Program((__package__ or "",), "one_shot.cu", (), "one_shot_add")
THREADS, BLOCKS = 256, 256
_GROUP = 8
"""Bytes that one thread sends."""
MOST_BYTES = BLOCKS * THREADS * _GROUP
"""Of a tensor, at most; of a gather, what one rank has."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TRIAL_SECONDS = 5.0
_ANEW = 1 << 20
"""Above the number of any launch of a trial."""


def defines(size: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of the kernel for so many ranks."""
    return {"SIZE": size, "THREADS": THREADS, "BLOCKS": BLOCKS, "DTYPE": DTYPES[dtype]}


class OneShot:
    """The kernel and the memory of all ranks, as one of them has it."""

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
        exchange: Callable[[bytes], list[bytes]],
    ) -> None:
        """Allocate, and map what the others have.

        Args:
            dtype: of what is added up.
            exchange: gives what each rank handed in, by rank; called once, whatever happens, and empty bytes say that
                this rank has nothing.

        Raises:
            DeviceError: the kernel or the memory cannot be had, here or on another rank.
        """
        self.dtype = dtype
        self.adds = False
        """Whether `add_to_state` is used."""
        self._rank, self._size, self._device = rank, size, device

        def load() -> None:
            capability = torch.cuda.get_device_capability(device)
            architecture = f"sm_{capability[0]}{capability[1]}{'a' if capability[0] >= 9 else ''}"
            cubin = compile_cubin(defines(size, dtype), architecture, PROGRAM)
            self._kernel, self._adds = Kernel(cubin, 0, PROGRAM), Kernel(cubin, 0, ADDS)
            self._overlaps = capability[0] >= 9
            with torch.inference_mode(False):
                self._numbers = torch.zeros(BLOCKS, dtype=torch.int32, device=device)
                self._ended, self._host_ended = host_mapped((1,), torch.int32, device)

        self._memory = PeerMemory(rank, device, 2 * BLOCKS * size * THREADS * 16, exchange, load)
        inboxes = self._memory.addresses
        values = [0, 0, self._numbers.data_ptr(), self._ended.data_ptr(), 0, rank, 0, *inboxes, *[0] * 7]
        packed = struct.pack(f"<{len(values)}Q", *values)
        self._parameters = ctypes.create_string_buffer(packed, len(packed))

    def serves(self, x: Tensor) -> bool:
        """Whether it takes a tensor; goes by what is the same on all ranks."""
        size = x.numel() * x.element_size()
        return x.dtype is self.dtype and 0 < size <= MOST_BYTES and size % _GROUP == 0

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, added up in float32 in the order of the ranks; a new tensor of the same shape."""
        return self._launch(x, torch.empty_like(x, memory_format=torch.contiguous_format), gathers=False)

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks: [ranks, *x.shape]."""
        return self._launch(x, x.new_empty((self._size, *x.shape)), gathers=True)

    def parts(self, rows: int, width: int) -> int:
        """Parts of a row in `add_to_state`, or 0 if it does not take so many rows of this width."""
        if not self.adds:
            return 0
        found = -(-width * self.dtype.itemsize // (_GROUP * THREADS))
        return found if rows * found <= BLOCKS and width * self.dtype.itemsize % _GROUP == 0 else 0

    def add_to_state(
        self, product: Tensor, state: Tensor, handed: Tensor, gain: Tensor | None, squares: Tensor, factor: float
    ) -> None:
        """See `Share.add_to_state`. Added up in float32 in the order of the ranks."""
        rows, width = product.shape
        parts = self.parts(rows, width)
        groups = width * self.dtype.itemsize // _GROUP
        places = [state.data_ptr(), handed.data_ptr(), 0 if gain is None else gain.data_ptr(), squares.data_ptr()]
        struct.pack_into("<Q", self._parameters, 0, product.data_ptr())
        struct.pack_into("<6Qd", self._parameters, 8 * (7 + self._size), *places, groups, parts, factor)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        launch = self._adds.launch_early if self._overlaps else self._adds.launch_any
        launch(rows * parts, THREADS, self._parameters, stream)

    def _launch(self, x: Tensor, out: Tensor, *, gathers: bool) -> Tensor:
        x = x.contiguous()
        if x.data_ptr() % _GROUP:  # a view that begins in between
            x = x.clone()
        groups = x.numel() * x.element_size() // _GROUP
        struct.pack_into("<2Q", self._parameters, 0, x.data_ptr(), out.data_ptr())
        struct.pack_into("<3Q", self._parameters, 32, groups, self._rank, int(gathers))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._kernel.launch_any(-(-groups // THREADS), THREADS, self._parameters, stream)
        return out

    def try_out(self) -> str | None:
        """Add up and gather numbers whose result is known; why it is not to be used, or None. On all ranks at once."""
        event = torch.cuda.Event()
        wrong = torch.zeros((), dtype=torch.int64, device=self._device)
        with torch.inference_mode(), torch.cuda.device(self._device):
            for count in (4, 4 * THREADS, MOST_BYTES // 4 // 3 * 2, 4 * THREADS + 4):
                ramp = torch.arange(count, device=self._device) % 97
                mine = (ramp + self._rank).to(self.dtype)
                total, parts = self.reduce(mine), self.gather(mine)
                everybody = torch.arange(self._size, device=self._device)
                expected = ramp[None] + everybody[:, None]
                wrong += (parts != expected).sum() + (total != expected.sum(0).to(self.dtype)).sum()
            event.record()
            until = time.monotonic() + _TRIAL_SECONDS
            while not event.query() and time.monotonic() < until:
                time.sleep(0.0005)
            if not event.query():
                self.end()
                torch.cuda.synchronize(self._device)
                return f"nothing came from another rank within {_TRIAL_SECONDS:.0f} seconds"
            if int(wrong):
                return f"{int(wrong)} wrong values in a trial"
        return None

    def try_adding(self) -> str | None:
        """The same for `add_to_state`, which is not used (`adds`) unless all ranks found it right."""
        self.adds = True
        device, event = self._device, torch.cuda.Event()
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        everybody = self._size * (self._size - 1) // 2
        with torch.inference_mode(), torch.cuda.device(device):
            for rows, width, gains in ((1, 64, True), (3, 2052, False), (8, 4096, True)):
                ramp = torch.arange(rows * width, device=device).view(rows, width)
                product, state = (ramp % 13 + self._rank).to(self.dtype), (ramp % 7).float()
                gain = (torch.arange(width, device=device) % 5 / 4).float() if gains else None
                handed, squares = torch.zeros_like(product), torch.zeros(64, 16, device=device)
                expected = state + 0.5 * (self._size * (ramp % 13) + everybody).float()
                self.add_to_state(product, state, handed, gain, squares, 0.5)
                read = expected if gain is None else expected * gain
                total, sums = squares[: self.parts(rows, width), :rows].sum(0), expected.square().sum(-1)
                wrong += (state != expected).sum() + (handed != read.to(self.dtype)).sum()
                wrong += ((total - sums).abs() > 1e-4 * sums).sum()
            event.record()
            until = time.monotonic() + _TRIAL_SECONDS
            while not event.query() and time.monotonic() < until:
                time.sleep(0.0005)
            if not event.query():
                self.end()
                torch.cuda.synchronize(device)
                return f"nothing came from another rank within {_TRIAL_SECONDS:.0f} seconds"
            return f"{int(wrong)} wrong values in a trial" if int(wrong) else None

    def count_anew(self) -> None:
        """After launches that not all ranks may have made: all of them count from the same number again."""
        torch.cuda.synchronize(self._device)
        self._numbers.fill_(_ANEW)
        self._host_ended[0] = 0
        torch.cuda.synchronize(self._device)

    def end(self) -> None:
        """Let nobody wait any more: what runs ends, with values that nobody may use. From any thread."""
        self._host_ended[0] = 1

    def close(self) -> None:
        """Free the memory. Nothing may run, and no graph may hold it."""
        self._memory.close()
        with torch.cuda.device(self._device):
            self._kernel.close()
            self._adds.close()
