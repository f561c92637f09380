"""How fast can this device read, copy and multiply at all? What every other figure is held against.

- read: the library's own ceiling (`hybridgen.kernels.read_ceiling`), a kernel that only reads; CUDA alone. MBU is held
  against this one.
- matrix times vector: torch's product over as many bytes as no cache holds; the bytes of the matrix over its time.
- copy: a copy of one tensor to another; bytes read and bytes written over its time.
- matmul: a square matrix product of random values; two operations per multiply-add over its time.

Medians and bests of single calls: on a GPU between two events on the device, else wall time.

    python benchmarks/ceilings.py [--gigabytes 6] [--size 8192] [--output results.json]
    python benchmarks/ceilings.py --smoke          # small, anywhere
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import report, this_device

from hybridgen.kernels.read_ceiling import read_ceiling

COLUMNS = 8192
WARM_UP = 3


def call_seconds(call: Callable[[], Any], device: str, repeats: int) -> list[float]:
    """Of single calls, after a few that are not counted."""
    times = []
    for _ in range(repeats + WARM_UP):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return times[WARM_UP:]


def row(what: str, unit: str, amount: float, times: list[float], **sizes: Any) -> dict[str, Any]:
    """A rate: `amount` is in bytes or operations, the unit in 10^9 or 10^12 of them."""
    scale = 1e12 if unit == "TFLOP/s" else 1e9
    median, best = statistics.median(times), min(times)
    found = {"what": what, "unit": unit, "rate": amount / median / scale, "best": amount / best / scale}
    print(f"{what:<24} {found['rate']:12,.1f} {found['best']:12,.1f} {unit:<8} {median * 1e6:12,.1f} us", flush=True)
    return {**found, "us": median * 1e6, **sizes}


@torch.inference_mode()
def measure(device: str, bytes_: int, size: int, repeats: int) -> list[dict[str, Any]]:
    return [*streams(device, bytes_, repeats), product(device, size, repeats)]


def streams(device: str, bytes_: int, repeats: int) -> list[dict[str, Any]]:
    """Reading, and copying."""
    rows = max(1, bytes_ // COLUMNS // torch.bfloat16.itemsize)
    matrix = torch.ones(rows, COLUMNS, dtype=torch.bfloat16, device=device)
    vector = torch.ones(COLUMNS, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(matrix)
    multiplied = call_seconds(lambda: matrix @ vector, device, repeats)
    copied = call_seconds(lambda: target.copy_(matrix), device, repeats)
    moved = 2 * matrix.nbytes
    return [
        *read(device),
        row("matrix times vector", "GB/s", matrix.nbytes, multiplied, bytes=matrix.nbytes),
        row("copy", "GB/s", moved, copied, bytes=moved),
    ]


def read(device: str) -> list[dict[str, Any]]:
    """A stream that is only read; the library says a rate, a median of its own."""
    rate = read_ceiling(torch.device(device))
    if rate is None:
        return []
    print(f"{'read':<24} {rate / 1e9:12,.1f} {'':12} GB/s", flush=True)
    return [{"what": "read", "unit": "GB/s", "rate": rate / 1e9, "best": None, "us": None, "bytes": None}]


def product(device: str, size: int, repeats: int) -> dict[str, Any]:
    """A square matrix product."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return row("matmul, bfloat16", "TFLOP/s", 2 * size**3, call_seconds(lambda: a @ b, device, repeats), size=size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.4, help="what a read goes over")
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrix product")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small, anywhere")
    arguments = parser.parse_args()
    device = this_device()
    bytes_, size, repeats = int(arguments.gigabytes * 1e9), arguments.size, arguments.repeats
    if arguments.smoke:
        bytes_, size, repeats = 2**22, 128, 3
    print(f"{'':<24} {'median':>12} {'best':>12} {'unit':<8} {'median time':>15}", flush=True)
    report({"benchmark": "ceilings", "rows": measure(device, bytes_, size, repeats)}, arguments.output)


if __name__ == "__main__":
    main()
