"""How fast the device's memory can be read: the ceiling that decode is measured against."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from hybridgen.device.capture import CAPTURING
from hybridgen.device.timing import event_seconds

_BYTES = 2 * 2**30
"""Read at once where there is room: many times what a cache holds."""
_LEAST_BYTES = 256 * 2**20
_REPEATS = 7


_measured: dict[torch.device, float] = {}


def read_ceiling(device: torch.device) -> float | None:
    """Bytes per second of a stream that is only read, measured once per process; None on a CPU.

    The best of a few block sizes, medians of 7, by device events. Takes about 50 ms and up to 2 GiB for that time; None
    too where not even 256 MiB are free.
    """
    if device.type != "cuda":
        return None
    if device in _measured:
        return _measured[device]
    free = torch.cuda.mem_get_info(device)[0]
    size = min(_BYTES, free // 2) // 2**20 * 2**20
    if size < _LEAST_BYTES:
        return None
    from hybridgen.kernels.read_ceiling_kernels import CONFIGS, read_all

    with torch.cuda.device(device), torch.inference_mode():
        values = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
        sums = torch.zeros(1, dtype=torch.int32, device=device)
        rate = max(
            size / statistics.median(event_seconds(partial(read_all, values, sums, *config), _REPEATS))
            for config in CONFIGS
        )
        del values
        with CAPTURING:  # the cache that it leaves is not for graphs, which have pools of their own
            torch.cuda.empty_cache()
    _measured[device] = rate
    return rate
