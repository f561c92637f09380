"""Where does a step of the kernel for a few columns spend its time? Clocks of each phase of a layer, by format.

A kernel is compiled with marks: the first thread of each block notes its multiprocessor's clock at each phase's
parts. The kernel without marks is compared with the float32 reference first, and one fixed step is repeated and
compared bit for bit (both as in `rows.py`); then both are timed. `--variants` compiles others, for example EARLY=0.

    python benchmarks/rows_phases.py [--models llama-3.2-1b] [--formats fp8 int4] [--output results.json]
    python benchmarks/rows_phases.py --smoke
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import rows
import torch
from common import random_decoder, release, report, shape_dtype
from torch import Tensor

MARKS = 24
PARTS = (
    "qkv: wait", "read", "products", "attention: wait", "run", "out: wait", "read", "products", "publish",
    "gate and up: wait", "read", "products", "down: wait", "products", "publish",
)  # fmt: skip
INSIDE = {4: ("attention: queries", 16, 4), 5: ("placed", 17, 16), 6: ("positions", 18, 17), 7: ("together", 5, 18)}
"""Parts of `run`: a name, and the marks at its end and before it."""
"""What lies between each mark and the next."""


def phases(trace: Tensor) -> dict[str, dict[str, float]]:
    """Cycles of each part: the mean over layers and blocks, and the mean over layers of the slowest block's.

    Args:
        trace: int64 [blocks, layers, marks]; what a block did not pass is 0.
    """
    marks = trace[:, 1:].double()
    found = {}
    for index, name in enumerate(PARTS):
        begin, end = marks[..., index], marks[..., index + 1]
        begin, passed = torch.where(begin > 0, begin, marks[..., index - 1]), end > 0
        took = torch.where(passed, end - begin, 0.0)
        mean = took.sum() / passed.sum().clamp(min=1)
        found[f"{index} {name}"] = {"mean": float(mean), "slowest": float(took.amax(0).mean())}
    for name, end, begin in INSIDE.values():
        passed = marks[..., 16] > 0
        took = torch.where(passed, marks[..., end] - marks[..., begin], 0.0)
        mean = took.sum() / passed.sum().clamp(min=1)
        found[f"4 {name}"] = {"mean": float(mean), "slowest": float(took.amax(0).mean())}
    whole = marks[:, 1:, 0] - marks[:, :-1, 0]
    return found | {"layer": {"mean": float(whole.mean()), "slowest": float(whole.amax(0).mean())}}


@dataclasses.dataclass
class Case:
    """A kernel of a model, as it is compiled."""

    line: dict[str, Any]
    cache: rows.Cache
    step: Future[Any]
    trace: Tensor | None


def cases(
    name: str, form: str, variants: list[dict[str, Any]], layers: int | None, pool: ThreadPoolExecutor
) -> list[Case]:
    """A model's kernels: one with marks, and one for each variant."""
    from hybridgen.fused.rows.shape import default_tuning
    from hybridgen.fused.rows.step import RowsStep

    whole = random_decoder(name, shape_dtype(name, "cuda"), "cuda", rows.ROOM, layers=layers)
    model = rows.in_format(whole, form)
    del whole
    release()
    cache = rows.Cache(model)
    torch.cuda.synchronize()
    blocks = torch.cuda.get_device_properties(model.device).multi_processor_count
    tunable = {field.name for field in dataclasses.fields(default_tuning(model))}

    def make(changes: dict[str, Any], trace: Tensor | None) -> Any:
        tuning = dataclasses.replace(default_tuning(model), **{k: v for k, v in changes.items() if k in tunable})
        defines = {k: v for k, v in changes.items() if k not in tunable}
        step = RowsStep(model, cache.pages, block_table=cache.block_table, tuning=tuning, trace=trace, defines=defines)
        torch.cuda.synchronize()
        return step

    found = []
    for index, changes in enumerate([{}, *variants]):
        trace = None
        if index == 0:
            trace = torch.zeros(blocks, len(model.layers), MARKS, dtype=torch.int64, device=model.device)
        line = {"model": name, "layers": len(model.layers), "format": form, "marks": index == 0, "changes": changes}
        found.append(Case(line, cache, pool.submit(make, changes, trace), trace))
    return found


def try_out(case: Case, repeats: int, columns: list[int]) -> None:
    """Compare, repeat and time one kernel."""
    from hybridgen.device.timing import graph_seconds

    line, cache = case.line, case.cache
    step = case.step.result()
    line |= {n.lower(): step.kernel.attribute(n) for n in ("NUM_REGS", "LOCAL_SIZE_BYTES")}
    if case.trace is None:
        line["errors"] = rows.check(step, cache)
        line["repeats"] = {
            name: rows.repeat(step, cache, repeats, name) for name in ("eight rows", "eight tokens of one", "a mix")
        }
        errors = {name: round(error, 4) for name, error in line["errors"].items()}
        sizes = [line[each] for each in ("model", "format", "changes", "num_regs", "local_size_bytes")]
        print(*sizes, errors, "different", [each["different"] for each in line["repeats"].values()], flush=True)
    cache.fill([(row, 0) for row in range(8)], numbers=True)
    cache.positions.fill_(512)
    line["us"] = {}
    for count in columns:
        inputs = cache.ids[:count], cache.positions[:count], cache.slots[:count]
        line["us"][count] = graph_seconds(lambda inputs=inputs: step(*inputs), calls=20) * 1e6
        if case.trace is not None:
            case.trace.zero_()
            step(*inputs)
            torch.cuda.synchronize()
            line.setdefault("phases", {})[count] = phases(case.trace)
    which = "marks" if line["marks"] else line["changes"]
    print(line["model"], line["format"], which, {count: round(us, 1) for count, us in line["us"].items()}, flush=True)
    for name in line.get("phases", {}).get(columns[0], {}):
        each = [line["phases"][count][name] for count in columns]
        print(f"    {name:24}", *(f"{part['mean']:8.0f} {part['slowest']:8.0f}   " for part in each), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8", "int4"], choices=rows.FORMATS)
    parser.add_argument("--layers", type=int, help="only so many of each model")
    parser.add_argument("--columns", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=1000, help="of a fixed step, three kinds of it")
    parser.add_argument("--variants", nargs="*", default=[], help="others to try, for example piece=1024,EARLY=0")
    parser.add_argument("--only", nargs="*", default=[], help="model:format pairs instead of all of them")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so long")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--smoke", action="store_true", help="the sums over marks alone, on any machine")
    args = parser.parse_args()
    if args.smoke:
        found = phases(torch.arange(4 * 3 * MARKS).view(4, 3, MARKS))
        report({"benchmark": "rows_phases", "phases": found}, args.output)
        return
    begin = time.monotonic()
    torch.manual_seed(0)
    pairs = [pair.split(":") for pair in args.only] or [[m, f] for m in args.models for f in args.formats]
    variants = [{}, *({k: int(v) for k, v in (p.split("=") for p in text.split(","))} for text in args.variants)]
    results: dict[str, Any] = {"benchmark": "rows_phases", "parts": PARTS, "lines": []}
    with ThreadPoolExecutor(14) as pool:
        every = [case for name, form in pairs for case in cases(name, form, variants, args.layers, pool)]
        wait([case.step for case in every])  # loading a kernel disturbs a graph that is being recorded
        print(f"kernels made, {time.monotonic() - begin:.1f} s", flush=True)
        for case in sorted(every, key=lambda case: bool(case.line["changes"])):
            if time.monotonic() - begin > args.seconds:
                break
            try:
                try_out(case, args.repeats, args.columns)
            except Exception as error:
                case.line["error"] = f"{type(error).__name__}: {error}"[:500]
                print(case.line["model"], case.line["format"], case.line["error"], flush=True)
            results["lines"].append(case.line)
            print(f"    {time.monotonic() - begin:.1f} s", flush=True)
    report(results, args.output)


if __name__ == "__main__":
    main()
