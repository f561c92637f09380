"""Reads ranges of files into device memory by several threads, through pinned buffers.

What safetensors gives on a device goes from mapped pages by a copy that the driver stages on one thread. Here threads
read into pinned memory, each its part, and copies to the device run behind them.
"""

from __future__ import annotations

import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST = 2**20
"""Bytes from which on this is worth it."""
_CHUNK = 4 * 2**20
_THREADS = 4
_BUFFERS = 2 * _THREADS
"""One of each thread is read into while another is copied from."""


class ShortReadError(OSError):
    """A file ended before a range did."""


class DeviceReads:
    """Reads into one device's memory; `close()` gives its threads, buffers and files back.

    Args:
        device: CUDA; on a CPU the same without pinned memory, for tests.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._buffers: queue.SimpleQueue[tuple[Tensor, Any]] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            buffer = torch.empty(_CHUNK, dtype=torch.uint8, device="cpu", pin_memory=self._cuda)
            self._buffers.put((buffer, torch.cuda.Event() if self._cuda else None))
        self._pool = ThreadPoolExecutor(_THREADS, "hybridgen-read")

    def read(self, path: Path, begin: int, target: Tensor) -> None:
        """Fill a contiguous tensor of bytes on the device from a file; on the current stream.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = os.open(path, os.O_RDONLY)
        stream = torch.cuda.current_stream(self._device) if self._cuda else None
        parts = [
            self._pool.submit(self._part, file, begin + at, target[at : at + _CHUNK], stream)
            for at in range(0, target.numel(), _CHUNK)
        ]
        for part in parts:
            part.result()

    def _part(self, file: int, begin: int, target: Tensor, stream: Any) -> None:
        buffer, copied = self._buffers.get()
        try:
            if copied is not None:
                copied.synchronize()  # what was read into it before
            size = target.numel()
            numbers: Any = buffer.numpy()
            _fill(file, begin, memoryview(numbers)[:size])
            within: AbstractContextManager[Any] = nullcontext() if stream is None else torch.cuda.stream(stream)
            # Which the caller may be in: threads are not by themselves, and may not write to its tensors then.
            with within, torch.inference_mode():
                target.copy_(buffer[:size], non_blocking=True)
                if copied is not None:
                    copied.record(stream)
        finally:
            self._buffers.put((buffer, copied))

    def close(self) -> None:
        """Wait for the copies, and give everything back."""
        self._pool.shutdown()
        if self._cuda:
            torch.cuda.current_stream(self._device).synchronize()
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def _fill(file: int, begin: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], begin + done)
        if count == 0:
            raise ShortReadError(f"the file ends at byte {begin + done}, {len(buffer) - done} bytes early")
        done += count
