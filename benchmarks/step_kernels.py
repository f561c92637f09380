"""Where does the time of a decode step go, kernel by kernel?

A model with random weights decodes in mode `hybrid`, and the profiler says which kernels ran, in which order, for how
long, and how long the device waited before each. Steps are found by the period of the kernels' names; times are medians
over whole steps. Kernels may overlap (programmatic launches), so that a wait can be negative, and the profiler makes a
step a little longer: the step without it is measured too.

    python benchmarks/step_kernels.py [--models gpt-oss-20b-mxfp4] [--rows 1] [--layers 6] [--output kernels.json]
    python benchmarks/step_kernels.py --smoke          # tiny, on the CPU: the operators instead of kernels
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import random_model, random_prompts, release, report, shape_dtype, this_device
from torch.profiler import ProfilerActivity, profile

import hybridgen
from hybridgen.kernels.read_ceiling import read_ceiling

KINDS = ("mxfp4", "fp8", "int8", "int4")
LONGEST_NAME = 96


class Kernel(NamedTuple):
    """One run of a kernel, in microseconds."""

    name: str
    begin: float
    end: float


def ran(profiled: Any, device: str) -> list[Kernel]:
    """What ran on the device in order; copies to and from the host are left out."""
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    found = [
        Kernel(event.name[:LONGEST_NAME], event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == wanted and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return sorted(found, key=lambda kernel: kernel.begin)


def period(names: list[str], least: int) -> int | None:
    """After how many kernels they repeat at the end of the list, three times at least; layers repeat too, but without
    what runs once a step."""
    for length in range(least, len(names) // 4):
        end = len(names) - length // 2  # the last step's end may look otherwise
        once = set(names[end - length : end]) >= set(names[len(names) // 2 : end])
        if once and names[end - 3 * length : end - length] == names[end - 2 * length : end]:
            return length
    return None


def of_steps(kernels: list[Kernel], length: int, steps: int) -> list[dict[str, Any]]:
    """The kernels of a step in order, each with its median time and the median wait before it."""
    end = len(kernels) - length // 2
    begin = max(1, end - steps * length)
    begin += (end - begin) % length
    rows = []
    for place in range(length):
        runs = [(kernels[at - 1], kernels[at]) for at in range(begin + place, end, length)]
        took = statistics.median(kernel.end - kernel.begin for _, kernel in runs)
        waited = statistics.median(kernel.begin - before.end for before, kernel in runs)
        rows.append({"kernel": runs[0][1].name, "us": round(took, 2), "wait_us": round(waited, 2)})
    return rows


def by_name(step: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums of a step for each kernel, the longest first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in step:
        for place, value in enumerate((row["us"], max(0.0, row["wait_us"]), 1)):
            sums[row["kernel"]][place] += value
    return [
        {"kernel": name, "us": round(us, 2), "wait_us": round(wait, 2), "launches": int(count)}
        for name, (us, wait, count) in sorted(sums.items(), key=lambda item: -item[1][0] - item[1][1])
    ]


def measure(name: str, rows: int, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """One model at one number of rows."""
    begin = time.perf_counter()
    shape, _, kind = name.rpartition("-")
    shape, kind = (shape, kind) if kind in KINDS else (name, None)
    model = random_model(shape, shape_dtype(shape, device), device, quantised=kind, layers=args.layers)
    release()
    layers = model.config.num_hidden_layers
    print(f"{name}: {layers} layers made in {time.perf_counter() - begin:.1f} s", flush=True)
    options: dict[str, Any] = {"mode": "graph" if device == "cpu" else "hybrid", "decode_buckets": [rows]}
    options |= {"max_batch": rows, "max_context": args.context + args.new + 1, "prefill_buckets": [], "progress": False}
    with hybridgen.Engine.load(model, **options) as engine:
        ids = random_prompts(rows, args.context, model.config.vocab_size)

        def generate() -> Any:
            return engine.generate(ids, max_new_tokens=args.new, ignore_eos=True, temperature=0)

        took = [statistics.median(out.timing.tpot() for out in generate()) for _ in range(4)]
        kind_of = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
        with profile(activities=[kind_of], acc_events=True) as profiled:
            generate()
        found: dict[str, Any] = {"model": name, "layers": layers, "rows": rows, "context": args.context}
        found |= {"step_us": statistics.median(took[1:]) * 1e6, "startup": engine.stats().startup}
    kernels = ran(profiled, device)
    length = period([kernel.name for kernel in kernels], layers)
    found["kernels"] = len(kernels)
    if length is None:
        sums: dict[str, list[float]] = defaultdict(list)
        for kernel in kernels:
            sums[kernel.name].append(kernel.end - kernel.begin)
        found["whole_call"] = [
            {"kernel": each, "us": sum(times), "launches": len(times)}
            for each, times in sorted(sums.items(), key=lambda item: -sum(item[1]))
        ][:60]
        print(f"{name}: no period among {len(kernels)} kernels", flush=True)
        return found
    step = of_steps(kernels, length, args.new // 2)
    found |= {"order": step, "names": by_name(step)}
    found["kernels_us"] = sum(row["us"] for row in step)
    found["waits_us"] = sum(max(0.0, row["wait_us"]) for row in step)
    print(
        f"{name}, {rows} rows, {layers} layers: a step takes {found['step_us']:.1f} us; profiled {length} kernels of "
        f"{found['kernels_us']:.1f} us with {found['waits_us']:.1f} us between them",
        flush=True,
    )
    for row in found["names"]:
        print(f"{row['us']:9.1f} us {row['wait_us']:8.1f} waits {row['launches']:5}  {row['kernel']}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt-oss-20b-mxfp4"], help="-mxfp4, -fp8, ...: quantised")
    parser.add_argument("--rows", nargs="+", type=int, default=[1])
    parser.add_argument("--layers", type=int, help="only so many of each model")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--new", type=int, default=40, help="tokens of a call")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    device = "cpu" if args.smoke else this_device()
    if args.smoke:
        args.models, args.context, args.new = ["tiny-moe-mxfp4"], 8, 12
    results: dict[str, Any] = {"benchmark": "step kernels"}
    with torch.inference_mode(False), torch.no_grad():
        ceiling = read_ceiling(torch.device(device))
        results["read_ceiling_gb_per_s"] = None if ceiling is None else ceiling / 1e9
        rows = [measure(name, count, args, device) for name in args.models for count in args.rows]
    report({**results, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
