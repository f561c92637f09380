"""How fast this device reads its memory: what a decode step is held against (MBU)."""

from __future__ import annotations

import torch

_BYTES = 4 * 2**30
_REPEATS = 10


def read_ceiling(device: torch.device) -> float | None:
    """Bytes per second of the fastest of a few kernels that only read; None on a CPU.

    Matrix-vector products over up to 4 GiB (a quarter of what is free, at most), by events on the device; the best of
    10 calls each. On a CPU, whose caches a benchmark of this size would measure as much as its memory, nothing is
    measured.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    columns = 8192
    rows = max(1, min(_BYTES, free // 4) // (2 * columns))
    with torch.cuda.device(device), torch.inference_mode():
        matrix = torch.ones(rows, columns, dtype=torch.bfloat16, device=device)
        vector = torch.ones(columns, dtype=torch.bfloat16, device=device)
        best = 0.0
        for parts in (1, 2, 4):
            part = matrix[: max(1, rows // parts)]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(_REPEATS):
                begin.record()
                part @ vector
                end.record()
                end.synchronize()
                best = max(best, part.nbytes / (begin.elapsed_time(end) / 1e3))
        del matrix, part
        torch.cuda.empty_cache()
    return best
