"""How near the read ceiling is decode attention over ragged contexts, and what are its best launch options?

First each candidate is checked against the reference in float32: random ragged batches, pages and outputs that hold NaN
where nothing was written, page ids that must not be looked up, windows, chunks, sinks, soft cap, page borders, the new
K and V in their pages, and equal bits of a row beside other rows. Checks run in several processes, which also compile.
Then attention of a whole step is timed in CUDA graphs (median of replays; each layer reads another cache), the kernel
that cuts row by row ("split") beside what steps use by a schedule (`used`, without `tune`) and Triton's kernel with all
candidates, against the read ceiling of the same run.

    python benchmarks/ragged.py [--output results.json] [--part check|ragged|small|forms]
    python benchmarks/ragged.py --smoke          # tiny, in Triton's interpreter: checks the script
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from common import report
from ragged_steps import (
    COLUMNS,
    LAYERS_IN_MEMORY,
    NO_PAGE,
    SHAPES,
    Shape,
    Step,
    make_step,
    ragged,
    room,
    scheduled,
    split,
    usual,
    write,
)
from torch import Tensor

from hybridgen.device.timing import graph_seconds
from hybridgen.kernels import read_ceiling as read_ceiling_module
from hybridgen.kernels.attention import balanced, reference, streamed
from hybridgen.kernels.attention.balanced import Tuning

PARTS = ("check", "ragged", "small", "forms")
SMALL = (1, 2, 4, 8, 16, 32)
LARGE = (64, 128, 256)
"""Rows."""
CHUNKS = (512, 2048)
"""Positions of a chunk that are tried besides the usual."""
FORMS = {
    64: [streamed.Form(64, warps, resident) for warps, resident in ((4, 3), (4, 2), (2, 4), (8, 2))],
    128: [streamed.Form(32, 4, 2), streamed.Form(32, 2, 3)],
}
"""Of the streamed kernel, by head size."""
LIMIT = 8e-3
"""Relative error of bfloat16 outputs."""


ODD_SHAPES = [
    Shape("group 7, head 80", 7, 1, 80, 1, 16),
    Shape("group 12, head 256", 12, 1, 256, 1, 64),
    Shape("group 1, head 128", 8, 8, 128, 1, 32),
    Shape("head 8", 4, 2, 8, 1, 8),
    Shape("page 256", 64, 8, 64, 1, 256),
]
OPTIONS: list[dict[str, Any]] = [
    {"window": 100},
    {"chunk": 100},
    {"window": 300, "softcap": 5.0, "sinks": True},
]


def candidates(dim: int) -> list[Tuning]:
    """Launch options of Triton's kernel for a head size; other chunks, which need no other kernel, later."""
    if dim == 64:
        return [
            Tuning(64, 2, 4, 4, 1024, True),
            Tuning(64, 4, 4, 4, 1024, True),
            Tuning(64, 4, 4, 3, 1024, False),
            Tuning(128, 4, 4, 2, 1024, True),
        ]
    return [
        Tuning(64, 4, 3, 2, 1024, False),
        Tuning(64, 4, 4, 2, 1024, True),
        Tuning(64, 2, 4, 2, 1024, True),
        Tuning(32, 2, 4, 4, 1024, True),
    ]


class Check(NamedTuple):
    """One candidate under one set of options."""

    shape: Shape
    tune: Tuning | None
    """None: as steps do it."""
    options: dict[str, Any]
    rows: int
    seed: int


def error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||, infinite where out has a value that is not finite."""
    if not out.isfinite().all():
        return float("inf")
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def poison_free_memory(device: str) -> None:
    """Fill freed memory with NaN, so that an output element which nobody writes shows."""
    blocks = [torch.full((2**22 if device == "cuda" else 2**12,), torch.nan, device=device) for _ in range(8)]
    del blocks


def run_check(check: Check, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What is wrong with a candidate (`wrong` is empty where nothing is)."""
    torch.manual_seed(check.seed)
    shape, tune, options = check.shape, check.tune, dict(check.options)
    window, chunk, softcap = options.get("window", 0), options.get("chunk", 0), options.get("softcap", 0.0)
    sinks = torch.randn(shape.heads, device=device).to(dtype) if options.get("sinks") else None
    borders = [1, 2, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513, 4000]
    top = 3000 if device == "cuda" else 150
    lengths = [n for n in borders if n <= top or device == "cuda"][: check.rows]
    lengths += torch.randint(1, top, (check.rows - len(lengths),)).tolist()
    step = make_step(shape, lengths, 1, COLUMNS if device == "cuda" else 4, device, dtype, poison=True)
    if window or chunk:  # pages that no row of the window will see again are given back
        for slot, length in zip(step.slots.tolist(), lengths, strict=True):
            low = max(0, length - window) if window else (length - 1) // chunk * chunk
            step.block_table[slot, : low // shape.page] = NO_PAGE
    single = step._replace(
        k_pages=step.k_pages.float(), v_pages=step.v_pages.float(), q=step.q.float(), k=step.k.float(), v=step.v.float()
    )
    scale = shape.dim**-0.5
    where = step.block_table, step.slots, step.positions
    expected = reference.decode_attention(
        single.q[0], single.k_pages[0], single.v_pages[0], *where, scale, window, chunk, softcap,
        None if sinks is None else sinks.float(), single.k[0], single.v[0],
    )  # fmt: skip

    def run(part: Step, append: bool) -> Tensor:
        plan = room(part, tune, window, chunk)
        write(part, plan, tune, window, chunk)
        poison_free_memory(device)
        return scheduled(part, 0, plan, tune, window, chunk, softcap, sinks, append)

    wrong = []
    out = run(step, append=True)
    found = error(out, expected)
    if not found < (LIMIT if dtype == torch.bfloat16 else 1e-5):
        wrong.append(f"error {found}")
    page = step.block_table[step.slots.long(), step.positions // shape.page].long()
    at = step.positions % shape.page
    if not (
        torch.equal(step.k_pages[0, page, :, at], step.k[0]) and torch.equal(step.v_pages[0, page, :, at], step.v[0])
    ):
        wrong.append("the new K and V are not in the pages")
    # The same rows beside others, some of them twice: a batch of the same size.
    order = torch.randint(0, check.rows, (check.rows,), device=device)
    if not torch.equal(run(step.take(order), append=True), out[order]):
        wrong.append("bits depend on neighbours")
    if not torch.equal(run(step, append=True), out):
        wrong.append("another run has other bits")
    found_written = error(run(step, append=False), expected)
    if not found_written < (LIMIT if dtype == torch.bfloat16 else 1e-5):
        wrong.append(f"error {found_written} with all K and V in the pages")
    return {"shape": shape.name, "tune": as_dict(tune), "options": check.options, "error": found, "wrong": wrong}


def guarded(check: Check) -> dict[str, Any]:
    """`run_check` in a process of its own; what it raises is what is wrong."""
    try:
        with torch.inference_mode():
            return run_check(check, "cuda", torch.bfloat16)
    except Exception:
        wrong = [traceback.format_exc()[-1500:]]
        return {"shape": check.shape.name, "tune": as_dict(check.tune), "options": check.options, "wrong": wrong}


def compile_rest(shape: Shape, rows: int) -> None:
    """In a process of its own, for its compiled kernels: what checks do not run."""
    with torch.inference_mode():
        step = make_step(shape, [100] * rows, 1, COLUMNS, "cuda", torch.bfloat16)
        split(step, 0)
        for tune in (None, *{tune.block: tune for tune in candidates(shape.dim)}.values()):
            write(step, room(step, tune), tune)
        torch.cuda.synchronize()


def checks(only_used: bool) -> list[Check]:
    """What steps use, all candidates of the models' shapes, and other options and shapes with a few."""
    found = [Check(s, None, {}, rows, 4) for s in SHAPES for rows in (1, 2, 40, 256)]
    found += [Check(s, None, options, 30, 2) for s in SHAPES[:2] for options in OPTIONS]
    if only_used:
        return found
    found += [Check(s, tune, {}, 40, 1) for s in SHAPES for tune in candidates(s.dim)]
    few = [Tuning(64, 4, 3, 2, 256, False), Tuning(32, 4, 3, 2, 128, True)]
    found += [Check(SHAPES[0], tune, options, 30, 2) for tune in few for options in OPTIONS]
    found += [Check(s, Tuning(32, 4, 3, 2, 256, True), {}, 25, 3) for s in ODD_SHAPES]
    found += [Check(SHAPES[1], candidates(64)[0], {}, rows, 4) for rows in (1, 2, 256)]
    return found


def run_checks(processes: int, only_used: bool) -> list[dict[str, Any]]:
    rows = []
    begin = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(guarded, check) for check in checks(only_used)]
        counts = () if only_used else (*SMALL, *LARGE)
        rest = [pool.submit(compile_rest, shape, count) for count in counts for shape in SHAPES]
        for done in as_completed(tasks):
            row = done.result()
            rows.append(row)
            if row["wrong"]:
                print(f"WRONG   {row['shape']} {row['options']} {short(row['tune'])}: {'; '.join(row['wrong'])}")
        for compiled in rest:
            compiled.result()
    worst = max((row.get("error", 0.0) for row in rows if not row["wrong"]), default=0.0)
    bad = sum(bool(row["wrong"]) for row in rows)
    took = time.perf_counter() - begin
    print(f"checks  {len(rows)} in {took:.0f} s, {bad} wrong, largest error of the others {worst:.1e}", flush=True)
    return rows


def as_dict(tune: Tuning | None) -> dict[str, Any] | None:
    return None if tune is None else tune._asdict()


def short(tune: dict[str, Any] | None) -> str:
    if tune is None:
        return "as steps do"
    text = "block {block} warps {warps} stages {stages} programs {programs} chunk {chunk}".format(**tune)
    return text + " carry_query" * tune["carry_query"]


def time_split(shape: Shape, step: Step) -> float:
    """Seconds of a layer's attention by the kernel that cuts row by row: all layers of a step in a graph."""

    def whole() -> None:
        for layer in range(shape.layers):
            split(step, layer % LAYERS_IN_MEMORY)

    return graph_seconds(whole, 7, 1) / shape.layers


def time_step(shape: Shape, step: Step, tune: Tuning | None) -> float:
    """The same by a schedule, with its share of that."""
    plan = room(step, tune)

    def whole() -> None:
        write(step, plan, tune)
        for layer in range(shape.layers):
            scheduled(step, layer % LAYERS_IN_MEMORY, plan, tune)

    return graph_seconds(whole, 7, 1) / shape.layers


def time_schedule(step: Step, tune: Tuning | None) -> float:
    plan = room(step, tune)
    return graph_seconds(lambda: write(step, plan, tune), 7, 20)


def run_case(
    shape: Shape, name: str, lengths: list[int], tunes: list[Tuning], ceiling: float, chunks: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """The split kernel, what steps use, then each of the candidates; and the best two of these with other chunks."""
    step = make_step(shape, lengths, LAYERS_IN_MEMORY, COLUMNS, "cuda", torch.bfloat16)
    bytes_read = sum(lengths) * shape.kv_heads * shape.dim * 2 * step.q.element_size()
    case = {"model": shape.name, "batch": len(lengths), "contexts": name}
    old = time_split(shape, step)
    rows: list[dict[str, Any]] = [{**case, "by": "row", "tune": None, "used": False} | shares(old, bytes_read, ceiling)]

    def measure(tune: Tuning | None) -> None:
        row: dict[str, Any] = {**case, "by": "schedule", "tune": as_dict(tune), "used": tune is None}
        try:
            row |= shares(time_step(shape, step, tune), bytes_read, ceiling)
        except Exception as error:  # one candidate that cannot run (registers, shared memory) must not end the rest
            row["failed"] = str(error)[:300]
            print(f"FAILED  {shape.name} {short(row['tune'])}: {row['failed']}", flush=True)
        rows.append(row)

    for tune in (None, *tunes):
        measure(tune)
    tried = sorted((row for row in rows if row["tune"] and "us" in row), key=lambda row: row["us"])
    for row in tried[:2]:
        for chunk in chunks:
            if chunk >= row["tune"]["block"]:
                measure(Tuning(**row["tune"] | {"chunk": chunk}))
    rows[1]["schedule_us"] = time_schedule(step, None) * 1e6
    print(f"{shape.name:13} {len(lengths):3} rows {name:9} by row {old * 1e6:7.1f} us", flush=True)
    for row in sorted((row for row in rows[1:] if "us" in row), key=lambda row: row["us"])[:6]:
        print(f"{'':29} {row['us']:13.1f} us {row['percent_of_ceiling']:5.1f} %  {short(row['tune'])}")
    print(f"{'':29} the schedule {rows[1]['schedule_us']:.1f} us a step", flush=True)
    return rows


def shares(took: float, bytes_read: int, ceiling: float) -> dict[str, float]:
    return {"us": took * 1e6, "percent_of_ceiling": bytes_read / took / ceiling * 100}


def run_ragged(ceiling: float, only_used: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        tunes, chunks = ([], ()) if only_used else (candidates(shape.dim), CHUNKS)
        for count in LARGE:
            rows += run_case(shape, "100-2000", ragged(count), tunes, ceiling, chunks)
    for shape in SHAPES[:2]:  # long and equal, where nothing is to be balanced
        rows += run_case(shape, "4096", [4096] * 64, [] if only_used else [usual(shape)], ceiling)
    for count in (24, 32, 48, 128, 256):
        rows += run_case(SHAPES[0], "530", [530] * count, [] if only_used else [usual(SHAPES[0])], ceiling)
    return rows


def run_forms(ceiling: float) -> list[dict[str, Any]]:
    """The streamed kernel with other launch options and chunks, in two rounds."""
    rows = []
    for turn in range(2):
        for shape in SHAPES:
            for count in (*LARGE, 530):
                lengths = ragged(count) if count in LARGE else [530] * 256
                step = make_step(shape, lengths, LAYERS_IN_MEMORY, COLUMNS, "cuda", torch.bfloat16)
                bytes_read = sum(lengths) * shape.kv_heads * shape.dim * 2 * step.q.element_size()
                for form, chunk in itertools.product(FORMS[shape.dim], (1024, 1536, 2048) if turn == 0 else (2048,)):
                    forget()
                    options = {
                        "form_of": lambda heads, few, form=form: form,
                        "chunk_of": lambda few, chunk=chunk: chunk,
                    }
                    with mock.patch.multiple(streamed, **options):
                        took, plan = time_step(shape, step, None), time_schedule(step, None)
                    case = {
                        "model": shape.name,
                        "batch": len(lengths),
                        "contexts": "530" if count == 530 else "100-2000",
                    }
                    rows.append(case | form._asdict() | {"chunk": chunk, "turn": turn, "schedule_us": plan * 1e6})
                    rows[-1] |= shares(took, bytes_read, ceiling)
                    print(
                        *case.values(), *form, chunk, f"{took * 1e6:.1f} us", rows[-1]["percent_of_ceiling"], flush=True
                    )
    forget()
    return rows


def forget() -> None:
    """What was chosen for these heads before."""
    balanced._calls.clear()
    balanced.shares_of.cache_clear()


def run_small(ceiling: float) -> list[dict[str, Any]]:
    """Few rows, where a launch and the combination of chunks are most of the time."""
    rows = []
    for shape in SHAPES:
        for count in SMALL:
            for name, lengths in (("512", [512] * count), ("100-2000", ragged(count)), ("4096", [4096] * count)):
                tunes = [usual(shape)._replace(chunk=chunk) for chunk in (64, 128, 512)]
                rows += run_case(shape, name, lengths, tunes, ceiling)
    return rows


def ceilings(times: int) -> list[float]:
    """The read ceiling, measured several times: a device that was idle can read more slowly at first."""
    found = []
    for _ in range(times):
        read_ceiling_module._measured.clear()
        ceiling = read_ceiling_module.read_ceiling(torch.device("cuda", 0))
        if ceiling is None:
            raise SystemExit("no memory is free to measure the read ceiling with")
        found.append(ceiling)
    return found


def smoke() -> dict[str, Any]:
    """Two candidates, tiny, in Triton's interpreter, for which TRITON_INTERPRET is set before Triton is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, __file__, "--smoke"]
        done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(done.stdout.strip().splitlines()[-1])
    shape = Shape("tiny", 4, 2, 16, 2, 16)
    rows = []
    for options in ({}, {"window": 20, "sinks": True}):
        for tune in (Tuning(32, 4, 2, 1, 64, True), Tuning(16, 4, 2, 2, 32, False)):
            rows.append(run_check(Check(shape, tune, options, 6, 0), "cpu", torch.float32))
            if rows[-1]["wrong"]:
                raise SystemExit(f"wrong: {rows[-1]['wrong']}")
    return {"benchmark": "ragged", "check": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes in Triton's interpreter")
    parser.add_argument("--part", action="append", choices=PARTS, help="all but forms, if left out")
    parser.add_argument("--only-used", action="store_true", help="parts check and ragged: what steps use alone")
    parser.add_argument("--processes", type=int, default=12, help="that check and compile")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if args.smoke:
        report(smoke(), args.output)
        return
    parts = args.part or PARTS[:3]
    results: dict[str, Any] = {"benchmark": "ragged"}
    if "check" in parts:  # before this process holds memory
        results["check"] = run_checks(args.processes, args.only_used)
        report(results, args.output)
    torch.manual_seed(0)
    measured = ceilings(5)
    ceiling = max(measured)
    print(f"read ceiling {ceiling / 1e9:.0f} GB/s", flush=True)
    results |= {"read_ceiling_gb_per_s": ceiling / 1e9, "read_ceilings_gb_per_s": [each / 1e9 for each in measured]}
    with torch.inference_mode():
        if "ragged" in parts:
            results["ragged"] = run_ragged(ceiling, args.only_used)
        if "small" in parts:
            results["small"] = run_small(ceiling)
        if "forms" in parts:
            results["forms"] = run_forms(ceiling)
    report(results, args.output)


if __name__ == "__main__":
    main()
