"""How fast are products of thousands of rows, and what energy do they take: cuBLAS, its variants, and our kernel?

Kernels first against float32, into outputs that are poisoned and followed by a guard, at numbers of rows that fill no
tile; then repeats whose bits must not change. Then each variant runs for a while, in turns, with clocks and energy read
meanwhile: the device is limited by its power.

    python benchmarks/many_rows.py [--shapes llama-3.1-8b] [--seconds 0.35] [--output many-rows.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pynvml
import torch
import torch.nn.functional as F
from common import report
from torch import Tensor

from hybridgen.kernels.linear.many_rows import Form, product

SHAPES = {
    "llama-3.1-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama-3.2-1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
}
_LARGE: dict[str, Any] = {"blocks": 2, "wide": 192, "stages": 3, "box_wide": 32}
_ALONE: dict[str, Any] = {"consumers": 3, "producer": False, "stages": 3}
FORMS = {
    "128x256 2x1": Form(),
    "128x256 4x1": Form(down=4),
    "128x256 2x2": Form(across=2),
    "256x192 1x2": Form(**_LARGE, down=1, across=2),
    "256x192 2x2": Form(**_LARGE, across=2),
    "192x256 1x2": Form(**_ALONE, down=1, across=2),
    "192x256 2x2": Form(**_ALONE, across=2),
}
CHECKED = [(1, 256, 64), (130, 512, 256), (129, 320, 72), (2049, 6144, 4096), (8191, 4096, 4096), (700, 14336, 4096)]


def inputs(rows: int, outputs: int, columns: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(outputs, columns, dtype=torch.bfloat16, device="cuda") * 0.02
    return x, w


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


def check(form: Form, gated: bool, rows: int, outputs: int, columns: int) -> bool:
    """One product against float32, and that nothing is left out or written beside it."""
    x, w = inputs(rows, outputs * (2 if gated else 1), columns)
    room = torch.full((rows + 64, outputs), float("nan"), dtype=torch.bfloat16, device="cuda")
    out = room[:rows]
    product(x, w, out, gated, form)
    exact, usual = x.float() @ w.float().T, (x @ w.T)
    if gated:
        exact = F.silu(exact[:, :outputs]) * exact[:, outputs:]
        usual = F.silu(usual[:, :outputs].float()) * usual[:, outputs:].float()
    found, beside = error(out, exact), error(usual.bfloat16(), exact)
    whole = bool(torch.isnan(room[rows:]).all())
    good = found < 1.1 * beside + 2e-4 and whole  # NaN fails
    print(f"{'right' if good else 'WRONG'} {tuple(form)} {gated=} {rows} x {outputs} x {columns}: "
          f"{found:.2e}, cuBLAS {beside:.2e}, guard {whole}", flush=True)  # fmt: skip
    return good


def repeats(form: Form, gated: bool, rows: int, outputs: int, columns: int, count: int) -> int:
    """Of `count` repeats, those with other bits."""
    x, w = inputs(rows, outputs * (2 if gated else 1), columns)
    first, again = (torch.empty(rows, outputs, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product(x, w, first, gated, form)
    other = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(count):
        again.fill_(float("nan"))
        product(x, w, again, gated, form)
        other += (again.view(torch.int16) != first.view(torch.int16)).any()
    return int(other)


def energy(device: Any) -> float:
    """Joules since the driver was loaded."""
    try:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(device)) / 1e3
    except pynvml.NVMLError:
        return float("nan")


def timed(call: Callable[[], object], seconds: float, device: Any) -> dict[str, float]:
    """Time and energy of a call that is repeated for some seconds, and the clock of the multiprocessors."""
    begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    call()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(3):
        call()
    end.record()
    end.synchronize()
    count = max(4, int(seconds * 3e3 / begin.elapsed_time(end)))
    before = energy(device)
    start = time.perf_counter()
    begin.record()
    for index in range(count):
        if index == count // 2:
            middle.record()  # the second half is at the power's limit
        call()
    end.record()
    clocks, powers = [], []
    while not end.query():
        clocks.append(pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM))
        powers.append(pynvml.nvmlDeviceGetPowerUsage(device) / 1e3)
        time.sleep(0.02)
    took = time.perf_counter() - start
    joules = energy(device) - before
    late = len(clocks) // 2
    return {
        "us": begin.elapsed_time(end) * 1e3 / count,
        "us_late": middle.elapsed_time(end) * 1e3 / (count - count // 2),
        "watts": joules / took,
        "mhz": statistics.median(clocks[late:] or [0]),
        "watts_read": statistics.median(powers[late:] or [0]),
    }


@torch.compile(dynamic=False)
def gate(both: Tensor) -> Tensor:
    first, second = both.chunk(2, dim=-1)
    return F.silu(first) * second


def calls_of(x: Tensor, w: Tensor, gated: bool) -> dict[str, Callable[[], object]]:
    """cuBLAS and our forms."""
    both = torch.empty(len(x), len(w), dtype=torch.bfloat16, device="cuda")
    out = both.view(-1, len(w) // 2)[: len(x)] if gated else both
    usual = partial(torch.mm, x, w.T, out=both)
    calls: dict[str, Callable[[], object]] = {"cublas": usual}
    if gated:
        calls = {"cublas + silu": lambda: gate(usual())}
    return calls | {name: partial(product, x, w, out, gated, form) for name, form in FORMS.items()}


def probe(device: Any) -> list[dict[str, Any]]:
    """What the tensor cores reach with zeros, which draw little power: without copies, with some, with all."""
    rows = []
    x, w = (torch.zeros(8192, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty(8192, 8192, dtype=torch.bfloat16, device="cuda")
    for name, form in FORMS.items():
        for what, copies in (("all", 7), ("x", 5), ("w", 6), ("none", 4), ("none, no barriers", 0)):
            found = timed(partial(product, x, w, out, False, form._replace(probe=copies)), 0.1, device)
            share = 2 * 8192 * 8192 * 4096 / found["us_late"] / found["mhz"] / (4096 * 132)
            rows.append({"form": name, "copies": what, "share": share, **found})
            print(f"zeros {name:<14} copies {what:<18} {found['us_late']:7.1f} us {found['mhz']:.0f} MHz "
                  f"{found['watts_read']:.0f} W {share:.3f} of the tensor cores", flush=True)  # fmt: skip
    found = timed(partial(torch.mm, x, w.T, out=out), 0.1, device)
    share = 2 * 8192 * 8192 * 4096 / found["us_late"] / found["mhz"] / (4096 * 132)
    print(f"zeros cublas {found['us_late']:7.1f} us {found['mhz']:.0f} MHz {share:.3f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b"])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--products", nargs="*", default=["qkv", "o", "down"])
    parser.add_argument("--fewer", nargs="*", type=int, default=[1024])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    for name in set(FORMS) - set(arguments.forms):
        del FORMS[name]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    torch.zeros(1, device="cuda")
    variants = [(form, gated) for form in FORMS.values() for gated in (False, True)]
    results: dict[str, Any] = {"benchmark": "many-rows", "checks": [], "repeats": [], "rows": []}

    def take_turns(shape: str, name: str, rows: int, gated: bool, seconds: float) -> None:
        outputs, columns = SHAPES[shape][name]
        x, w = inputs(rows, outputs, columns)
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(arguments.rounds):
            for variant, call in calls_of(x, w, gated).items():
                if variant not in FORMS or good[FORMS[variant], gated]:
                    found.setdefault(variant, []).append(timed(call, seconds, device))
        work = 2 * rows * outputs * columns
        for variant, times in found.items():
            row = {key: statistics.mean(time[key] for time in times) for key in times[0]}
            row["tflops"] = work / row["us_late"] / 1e6
            facts = {"shape": shape, "product": name, "rows": rows, "gated": gated, "variant": variant}
            results["rows"].append({**facts, **row, "all": times})
            each = " ".join(f"{time['us_late']:.1f}" for time in times)
            print(
                f"{shape} {name:<8} {rows:5} {variant:<14} {row['us']:8.1f} us, late {row['us_late']:8.1f} ({each}) "
                f"{row['tflops']:6.1f} TFLOP/s {row['watts_read']:.0f} W {row['mhz']:5.0f} MHz",
                flush=True,
            )

    good: dict[tuple[Form, bool], bool] = {}
    for form, gated in variants:
        good[form, gated] = all(check(form, gated, *size) for size in CHECKED)
        if good[form, gated]:
            other = repeats(form, gated, 8191, 4096, 4096, arguments.repeats)
            print(f"{tuple(form)} {gated=}: {other} of {arguments.repeats} with other bits", flush=True)
            results["repeats"].append([list(form), gated, other, arguments.repeats])
        results["checks"].append([list(form), gated, good[form, gated]])
    if arguments.probe:
        results["probe"] = probe(device)
    for shape in arguments.shapes:
        for name in arguments.products:
            take_turns(shape, name, arguments.rows, False, arguments.seconds)
        for rows in (arguments.rows, *arguments.fewer):
            take_turns(shape, "gate_up", rows, True, arguments.seconds if rows == arguments.rows else 0.15)
    report(results, arguments.output)


if __name__ == "__main__":
    main()
