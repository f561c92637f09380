"""How fast are gate and up of thousands of rows by our kernel, beside cuBLAS with the kernel for SiLU behind it?

The kernel first against float32, into outputs that are poisoned and followed by a guard, at numbers of rows that fill
no tile; then repeats whose bits must not change. Then both run for a while, in turns, because the device is limited by
its power: times are of the second half of each while.

    python benchmarks/many_rows.py [--shapes llama-3.1-8b llama-3.2-1b] [--output many-rows.json]
    python benchmarks/many_rows.py --smoke          # the op's reference, anywhere
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import report, synchronize, this_device
from torch import Tensor

from hybridgen.kernels.linear.gated import by_cublas, gated_rows

SHAPES = {"llama-3.1-8b": (14336, 4096), "llama-3.2-1b": (8192, 2048), "tiny": (24, 16)}
CHECKED = [(1, 256, 64), (130, 512, 256), (129, 320, 72), (2049, 6144, 4096), (8191, 4096, 4096), (700, 14336, 4096)]


def inputs(rows: int, width: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device=device)
    return x, torch.randn(2 * width, columns, dtype=torch.bfloat16, device=device) * 0.02


def check(rows: int, width: int, columns: int, count: int) -> dict[str, Any]:
    """Errors against float32, ours and cuBLAS's; whether nothing is written beside it; repeats with other bits."""
    from hybridgen.kernels.linear.many_rows import product

    x, w = inputs(rows, width, columns, "cuda")
    room = torch.full((rows + 64, width), float("nan"), dtype=torch.bfloat16, device="cuda")
    product(x, w, room[:rows])
    gate, up = (x.float() @ w.float().T).chunk(2, dim=-1)
    exact = F.silu(gate) * up
    ours, cublas = (float((each.float() - exact).norm() / exact.norm()) for each in (room[:rows], by_cublas(x, w)))
    again = torch.empty_like(room)
    other = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(count):
        again.fill_(float("nan"))
        product(x, w, again[:rows])
        other += (again[:rows].view(torch.int16) != room[:rows].view(torch.int16)).any()
    found = {"rows": rows, "width": width, "inputs": columns, "error": ours, "cublas": cublas, "repeats": count}
    found |= {"other_bits": int(other), "guard": bool(room[rows:].isnan().all())}
    print(
        " ".join(
            f"{name} {value:.2e}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
        )
    )
    if not (ours < 1.1 * cublas + 2e-4 and found["guard"] and not found["other_bits"]):  # NaN is no less
        raise SystemExit("wrong")
    return found


def timed(call: Callable[[], object], seconds: float) -> float:
    """Seconds of a call that is repeated for a while, in its second half."""
    start = time.perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    count = max(2, int(seconds / 2 / (time.perf_counter() - start) * 3))
    for _ in range(count):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def measure(shape: str, rows: int, rounds: int, seconds: float, device: str) -> dict[str, Any]:
    x, w = inputs(rows, *SHAPES[shape], device)
    row: dict[str, Any] = {"shape": shape, "rows": rows}
    if device != "cuda":
        gated_rows(x, w)
        return row
    calls = {"cublas": partial(by_cublas, x, w), "ours": partial(gated_rows, x, w)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            times[name].append(timed(call, seconds))
    for name, each in times.items():
        row[f"{name}_us"] = statistics.median(each) * 1e6
        row[f"{name}_all_us"] = [time * 1e6 for time in each]
    print(f"{shape:<14} {rows:6} rows: cuBLAS {row['cublas_us']:8.1f} us, ours {row['ours_us']:8.1f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b", "llama-3.2-1b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1024, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the op's reference, anywhere")
    arguments = parser.parse_args()
    device = this_device()
    torch.manual_seed(0)
    shapes, numbers = (["tiny"], [3]) if arguments.smoke else (arguments.shapes, arguments.rows)
    results: dict[str, Any] = {"benchmark": "many-rows", "checks": [], "rows": []}
    if device == "cuda":
        results["checks"] = [check(*sizes, arguments.repeats) for sizes in CHECKED]
    for shape in shapes:
        for rows in numbers:
            results["rows"].append(measure(shape, rows, arguments.rounds, arguments.seconds, device))
            synchronize(device)
    report(results, arguments.output)


if __name__ == "__main__":
    main()
