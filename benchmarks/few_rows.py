"""Who decodes 1 to 16 rows fastest: the persistent kernels, the chain, or the model's compiled layers?

An engine of random weights is started in mode `hybrid`. Then each executor that can run a decode step of so many rows
is recorded and timed, whether the engine would use it or not: rows of padding behind 512 cached positions, which end at
the logits. Logits are compared with those of the layers first, and steps of more than 8 rows by the kernel for several
columns, which are two launches, bit for bit with its own steps of 8.

    python benchmarks/few_rows.py [--models llama-3.2-1b llama-3.1-8b] [--format none int4] [--output few-rows.json]
    python benchmarks/few_rows.py --smoke         # a tiny model and its layers alone, anywhere
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import provenance, random_model, release, report, shape_dtype, this_device, write

import hybridgen
from hybridgen.graphs import GraphKey, StandInRecorder

SIZES = (1, 2, 4, 8, 9, 12, 16)
CACHED = 512


def executors_of(engine: hybridgen.Engine) -> dict[str, Any]:
    """Those that could serve some step, by name, also those that the engine's start found slower."""
    return dict(engine._runner.executors)


def can(executor: Any, rows: int) -> bool:
    """Whether an executor has room for a step of so many rows."""
    if executor.name == "persistent":
        return rows == 1
    if executor.name == "rows":
        return rows <= executor.widest
    return executor.name != "chain" or rows <= executor.chain.max_rows


def place(engine: hybridgen.Engine, rows: int, cached: int) -> None:
    """Let a step of padding rows have so many cached positions."""
    steps, state = engine._runner.steps, engine._runner.state
    steps.stage_padding(GraphKey.decode(rows, None))
    state.table[:, -1] = 0
    state.table[0, -1] = 5
    state.table[1, -1] = cached


def logits_of(engine: hybridgen.Engine, rows: int, executor: str) -> torch.Tensor:
    runner = engine._runner
    runner.run(GraphKey.decode(rows, None, executor=executor))
    return runner.steps.logits[:rows].float()


@torch.inference_mode()
def measured(engine: hybridgen.Engine, sizes: tuple[int, ...], cached: int, device: str) -> list[dict[str, Any]]:
    """Microseconds of a step by executor, and how far its logits are from those of the layers."""
    runner, lines = engine._runner, []
    recorder: Any = StandInRecorder()
    if device == "cuda":
        from hybridgen.graphs.cuda import CudaGraphRecorder

        recorder = CudaGraphRecorder(runner.device)
    runner.steps.keep_logits()
    try:
        for rows in sizes:
            line: dict[str, Any] = {"rows": rows, "us": {}, "error": {}}
            place(engine, rows, cached)
            expected = logits_of(engine, rows, "layers")
            for name, executor in executors_of(engine).items():
                if not can(executor, rows):
                    continue
                key = GraphKey.decode(rows, None, executor=name)
                found = logits_of(engine, rows, name)
                line["error"][name] = float((found - expected).norm() / expected.norm())
                if name == "rows" and rows > executor.columns:
                    one = logits_of(engine, executor.columns, name)
                    parts = found.split(executor.columns)
                    line["equal_to_one_launch"] = all(torch.equal(part, one[: len(part)]) for part in parts)
                recorded = recorder.record(key, lambda key=key: runner.run(key), None)
                line["us"][name] = None if recorded.seconds is None else recorded.seconds * 1e6
                recorded.release()
            lines.append(line)
            times = {name: us and round(us, 1) for name, us in line["us"].items()}
            errors = {name: round(error, 4) for name, error in line["error"].items()}
            print(f"{rows:3} rows  us {times}  error {errors} {line.get('equal_to_one_launch', '')}", flush=True)
    finally:
        recorder.close()
        runner.state.table[:, -1] = 0
        runner.recover()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "qwen3-0.6b", "llama-3.1-8b"])
    parser.add_argument("--formats", nargs="+", default=["none"], choices=("none", "fp8", "int8", "int4"))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no other model after so long")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    args = parser.parse_args()
    device, begin = this_device(), time.monotonic()
    cached, backend = (20, "eager") if args.smoke else (CACHED, "inductor")
    if args.smoke:
        args.models, args.sizes = ["tiny"], (1, 2, 3)
    results: dict[str, Any] = {"benchmark": "few_rows", "cached": cached, "rows": [], "fused": {}}
    for name in args.models:
        for form in args.formats:
            if time.monotonic() - begin > args.seconds:
                continue
            head = None if form == "none" else "fp8"
            quantised = None if form == "none" else form
            dtype = shape_dtype(name, device)
            model = random_model(name, dtype, device, quantised=quantised, quantised_head=head)
            options: dict[str, Any] = {"max_batch": max(args.sizes), "max_context": 2 * cached}
            options |= {"mode": "hybrid", "compile_backend": backend, "decode_buckets": list(args.sizes)}
            options |= {"prefill_buckets": [], "token_budget": cached, "kv_memory": "64MiB" if args.smoke else "2GiB"}
            with hybridgen.Engine.load(model, **options) as engine:
                print(f"{name} {form} {dict(engine.stats().fused)} {time.monotonic() - begin:.0f} s", flush=True)
                lines = measured(engine, tuple(args.sizes), cached, device)
                results["rows"] += [{"model": name, "format": form, **line} for line in lines]
                results["fused"][f"{name} {form}"] = dict(engine.stats().fused)
            del model
            release()
            write({"provenance": provenance(), **results}, args.output)  # a run that is cut has what it found
    report(results, args.output)


if __name__ == "__main__":
    main()
