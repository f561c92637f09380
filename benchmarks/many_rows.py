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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pynvml
import torch
import torch.nn.functional as F
from common import report
from torch import Tensor

from hybridgen.kernels.linear import many_rows
from hybridgen.kernels.linear.many_rows import Form, product

SHAPES = {
    "llama-3.1-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama-3.2-1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
}
TALL = Form(3, 192, 4, 1)
FORMS = {"256": Form(), "192": TALL}
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


def gated_calls(x: Tensor, w: Tensor, groups: list[int]) -> dict[str, Callable[[], object]]:
    both = torch.empty(len(x), len(w), dtype=torch.bfloat16, device="cuda")
    out = torch.empty(len(x), len(w) // 2, dtype=torch.bfloat16, device="cuda")

    def usual() -> None:
        torch.mm(x, w.T, out=both)
        gate(both)

    return {"cublas + silu": usual} | {
        f"ours gated, group {group}": partial(product, x, w, out, True, Form(group=group)) for group in groups
    }


def plain_calls(x: Tensor, w: Tensor, groups: list[int], chunks: bool) -> dict[str, Callable[[], object]]:
    out = torch.empty(len(x), len(w), dtype=torch.bfloat16, device="cuda")

    def with_lt() -> None:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        torch.mm(x, w.T, out=out)
        torch.backends.cuda.preferred_blas_library("cublas")

    def in_chunks(count: int) -> None:
        for part, to in zip(x.chunk(count), out.chunk(count), strict=True):
            torch.mm(part, w.T, out=to)

    calls: dict[str, Callable[[], object]] = {"cublas": lambda: torch.mm(x, w.T, out=out), "cublaslt": with_lt}
    if chunks:
        calls["cublas, 2 chunks"] = partial(in_chunks, 2)
    for name, form in FORMS.items():
        for group in groups if form == Form() else groups[:2]:
            calls[f"ours {name}, group {group}"] = partial(product, x, w, out, False, form._replace(group=group))
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b"])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=0.35)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--groups", nargs="+", type=int, default=[8, 4, 16])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--ours-alone", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    torch.zeros(1, device="cuda")
    variants = [(FORMS["256"], False), (FORMS["256"], True), (FORMS["192"], False)]
    from hybridgen.device.program import compile_cubin

    begun = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda v: compile_cubin(many_rows.defines(*v), "sm_90a", many_rows.PROGRAM), variants))
    print(f"compiled in {time.perf_counter() - begun:.1f} s", flush=True)
    results: dict[str, Any] = {"benchmark": "many-rows", "checks": [], "repeats": [], "rows": []}

    def take_turns(shape: str, name: str, calls: dict[str, Callable[[], object]], rounds: int) -> None:
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(rounds):
            for variant, call in calls.items():
                found.setdefault(variant, []).append(timed(call, arguments.seconds, device))
        outputs, columns = SHAPES[shape][name]
        work = 2 * arguments.rows * outputs * columns
        for variant, times in found.items():
            row = {key: statistics.mean(time[key] for time in times) for key in times[0]}
            row |= {"tflops": work / row["us_late"] / 1e6, "tflop_per_joule": work / row["us"] / 1e6 / row["watts"]}
            results["rows"].append({"shape": shape, "product": name, "variant": variant, **row, "all": times})
            each = " ".join(f"{time['us_late']:.1f}" for time in times)
            print(
                f"{shape} {name:<8} {variant:<22} {row['us']:8.1f} us, late {row['us_late']:8.1f} ({each}) "
                f"{row['tflops']:6.1f} TFLOP/s {row['watts']:4.0f} W ({row['watts_read']:.0f}) {row['mhz']:5.0f} MHz "
                f"{row['tflop_per_joule']:.3f} TFLOP/J",
                flush=True,
            )

    def all_of(shape: str, ours: bool) -> None:
        for name, (outputs, columns) in SHAPES[shape].items():
            x, w = inputs(arguments.rows, outputs, columns)
            calls = plain_calls(x, w, arguments.groups, name == "gate_up")
            if name == "gate_up":
                calls |= gated_calls(x, w, arguments.groups)
            fit = {}
            for variant, call in calls.items():
                form = FORMS["192" if "192" in variant else "256"]
                if "ours" not in variant or (ours and good.get((form, "gated" in variant))):
                    fit[variant] = call
            take_turns(shape, name, fit, arguments.rounds if ours else 1)
            torch.cuda.empty_cache()

    good: dict[tuple[Form, bool], bool] = {}
    if not arguments.ours_alone:
        all_of(arguments.shapes[0], False)  # before anything of ours can go wrong
    for form, gated in variants:
        good[form, gated] = all(check(form, gated, *size) for size in CHECKED)
        if good[form, gated]:
            other = repeats(form, gated, 8191, 4096, 4096, arguments.repeats)
            print(f"{tuple(form)} {gated=}: {other} of {arguments.repeats} with other bits", flush=True)
            results["repeats"].append([list(form), gated, other, arguments.repeats])
        results["checks"].append([list(form), gated, good[form, gated]])
    for shape in arguments.shapes:
        all_of(shape, True)
    report(results, arguments.output)


if __name__ == "__main__":
    main()
