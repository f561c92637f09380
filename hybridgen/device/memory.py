"""How much memory is taken: of a CUDA device, or by this process (RSS) where the model is on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_STATM, _STATUS, _CLEAR = Path("/proc/self/statm"), Path("/proc/self/status"), Path("/proc/self/clear_refs")


def taken(device: torch.device) -> int | None:
    """Bytes that are taken now: of a CUDA device by everybody, on a CPU the resident memory of this process.

    None where the system does not say (a CPU without Linux's `/proc`).
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return _resident()


class PeakMemory:
    """What something takes at most above what was taken when this object was made, in bytes.

    On CUDA by torch's allocator, on a CPU by the process's resident memory. Linux resets the peak of that where it may
    (`/proc/self/clear_refs`); where it may not, what is resident afterwards is all that is known.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resets = False
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        self._resets = _reset_peak()
        self._before = _resident() or 0

    def growth(self) -> int:
        """Bytes of the peak above the start; 0 where nothing is known."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = (_peak_resident() if self._resets else _resident()) or 0
        return max(0, peak - self._before)


def _resident() -> int | None:
    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_resident() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _reset_peak() -> bool:
    """Whether the peak counts from now on."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
