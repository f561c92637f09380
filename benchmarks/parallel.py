"""What do several GPUs bring: small sums over ranks, tensor parallel steps, replicas?

Each part runs in processes of its own, with so many seconds; what it has measured by then is kept. Weights are random.

| part | what it measures |
|---|---|
| all-reduce | microseconds of an all-reduce in a CUDA graph, by bytes: our kernel, NCCL, torch's symmetric memory |
| tensor-parallel | decode steps of the 8B over all ranks: (call for N tokens less call for one) / (N - 1) |
| large | the same of the 70B's shape; each rank makes its slices on its device |
| agree | 10,000 sampled steps of a tiny model, after which all ranks must have the same tokens |
| kernels | the persistent kernels on the ranks' shares, with variants; no engine (`rank_kernels.py`) |
| one | the 8B on one GPU: decode steps, and the mix of `throughput.py` with 256 requests |
| replicas | the mix with 256 requests for each replica; needs `one` before it |
| mix | the mix with 256 requests over all ranks |
| killed | the seconds from the end of a rank in the middle of a call to the caller's error; what is left running |

    python benchmarks/parallel.py [--gpus 2] [--parts all-reduce tensor-parallel] [--seconds 200] --output results.json
    python benchmarks/parallel.py --smoke          # tiny models, two processes on a CPU
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import how_it_ran, random_prompts, report, shape_dtype
from decode import step_seconds
from group_kernels import LARGE, SHAPE, all_reduce, kernels
from parts import Part, Process
from random_weights import install_everywhere, write
from throughput import WARM_UP, Work, requests

import hybridgen

SECONDS = {
    "all-reduce": 60,
    "tensor-parallel": 120,
    "large": 120,
    "agree": 60,
    "kernels": 150,
    "one": 110,
    "replicas": 90,
    "mix": 110,
    "killed": 60,
}
"""Of each part at most, the imports left out."""


def steps_of(part: Part, engine: hybridgen.Engine, batches: list[int], vocab: int, **facts: Any) -> None:
    """Rows of decode steps."""
    new, prompt = (12, 4) if part.smoke else (129, 32)
    for batch in batches:
        prompts = random_prompts(batch, prompt, vocab, batch)

        def generate(count: int, prompts: list[list[int]] = prompts) -> Any:
            return engine.generate(prompts, max_new_tokens=count, ignore_eos=True, temperature=0)

        generate(4)
        step = step_seconds(generate, new, part.device, 1 if part.smoke else 3)
        ran = how_it_ran(engine) if batch == batches[-1] else {}
        decoded = [f"{s['kind']} ({s['reason']})" for s in how_it_ran(engine)["steps"] if s["phase"] == "decode"]
        facts |= {"batch": batch, "step_us": step * 1e6, "tokens_per_s": batch / step, "decode": decoded}
        part.add(what="steps", **facts, ran=ran)


def sizes_for(part: Part, batches: list[int]) -> dict[str, Any]:
    """Fields of an engine for these batches."""
    most, prompt, new = batches[-1], 32, 129
    sizes: dict[str, Any] = {"kv_memory": "16MiB" if part.smoke else "8GiB"}
    sizes |= {"max_batch": most, "max_context": prompt + new + 3, "token_budget": max(64, most * prompt)}
    return {**sizes, "decode_buckets": batches, "prefill_buckets": [], "prefix_cache": False, "progress": False}


def tensor_parallel(part: Part) -> None:
    batches = [1, 2] if part.smoke else [1, 8, 64]
    name = "tiny" if part.smoke else SHAPE
    path = write(name, shape_dtype(name, part.device), part.folder / "parallel", values=False)
    install_everywhere()
    for mode in part.modes:
        fields = sizes_for(part, batches)
        try:
            with hybridgen.Engine.load(path, mode=mode, tensor_parallel=part.ranks, **fields) as engine:
                found = {"model": name, "mode": mode, "ranks": part.ranks, "notes": dict(engine.stats().fused)}
                steps_of(part, engine, batches, 500, **found)
        except hybridgen.HybridgenError as error:  # the other modes are still worth having
            traceback.print_exc()
            part.add(what="steps", model=name, mode=mode, error=f"{type(error).__name__}: {error}")


def large(part: Part) -> None:
    name = "tiny" if part.smoke else LARGE
    path = write(name, shape_dtype(name, part.device), part.folder / "large", values=False)
    install_everywhere()
    for mode in part.modes[-1:]:
        batches = [1]
        with hybridgen.Engine.load(path, mode=mode, tensor_parallel=part.ranks, **sizes_for(part, batches)) as engine:
            facts = {"model": name, "mode": mode, "ranks": part.ranks, "notes": dict(engine.stats().fused)}
            steps_of(part, engine, batches, 500, **facts)


def agree(part: Part) -> None:
    wanted, each = (40, 20) if part.smoke else (10_000, 200)
    path = write("tiny", shape_dtype("tiny", part.device), part.folder / "agree", values=True)
    fields = {"max_batch": 4, "max_context": 512, "prefill_buckets": [], "progress": False, "kv_memory": "64MiB"}
    steps = wrong = 0
    start = time.monotonic()
    with hybridgen.Engine.load(path, mode=part.modes[-1], tensor_parallel=part.ranks, **fields) as engine:
        runner: Any = engine._runner
        while steps < wanted and time.monotonic() < part.end - 3:
            sampling = {"temperature": 1.0, "seed": steps, "repetition_penalty": 1.1, "ignore_eos": True}
            engine.generate(random_prompts(3, 5, 500, steps), max_new_tokens=each, **sampling)
            steps += each
            wrong += not runner.ranks_agree()
        took = time.monotonic() - start
        part.add(what="agreement", steps=steps, calls_that_differ=wrong, seconds=took, ran=how_it_ran(engine))


def mix(count: int, smoke: bool) -> Work:
    return requests(8, 4, 12, 500) if smoke else requests(count, 100, 1024, 10000)


def timed_mix(part: Part, generate: Callable[[Work], Any], work: Work, **facts: Any) -> None:
    """A row of the mix. Beside the whole call's seconds: those from a request's submission in its engine to its end and
    to its first prefill, of the requests that took longest."""
    for _ in range(2):  # what the first of them lacks is recorded behind it
        generate(work.head(WARM_UP))
        time.sleep(0.2 if part.smoke else 1.0)
    start = time.perf_counter()
    done = generate(work)
    took = time.perf_counter() - start
    tokens = sum(len(completion.token_ids) for completion in done)
    slowest = max(completion.timing.total for completion in done)
    waited = max(completion.timing.queue or 0.0 for completion in done)
    facts |= {"requests": len(work.prompts), "slowest_request": slowest, "longest_queued": waited}
    part.add(what="mix", **facts, tokens=tokens, seconds=took, tokens_per_s=tokens / took)


def many(part: Part) -> dict[str, Any]:
    """Fields of an engine for the mix."""
    found = {"max_batch": 256, "max_context": 2048, "progress": False, "compile_cache": str(part.folder / "compiled")}
    if part.smoke:
        found |= {"max_batch": 4, "max_context": 64, "kv_memory": "16MiB"}
    return {"mode": part.modes[-1] if part.smoke else "hybrid", **found}


def samplings(work: Work) -> list[hybridgen.SamplingParams]:
    made = hybridgen.SamplingParams
    return [made(max_new_tokens=new, temperature=0, ignore_eos=True, seed=i) for i, new in enumerate(work.new)]


def one(part: Part) -> None:
    name = "tiny" if part.smoke else SHAPE
    device = "cuda:0" if part.device == "cuda" else "cpu"
    with hybridgen.Engine.load(part.whole, device=device, **many(part)) as engine:
        steps_of(part, engine, [1, 2] if part.smoke else [1, 8, 64], 500, model=name, mode=str(engine.mode), ranks=1)
        work = mix(256, part.smoke)
        timed_mix(part, lambda some: engine.generate(some.prompts, samplings(some)), work, model=name, engines=1)


def replicas(part: Part) -> None:
    name = "tiny" if part.smoke else SHAPE
    device = {} if part.device == "cuda" else {"device": "cpu"}
    with hybridgen.Replicas(part.whole, part.ranks, **many(part), **device) as both:
        work = mix(256 * part.ranks, part.smoke)
        timed_mix(part, lambda some: both.generate(some.prompts, samplings(some)), work, model=name, engines=part.ranks)


def mix_of_ranks(part: Part) -> None:
    name = "tiny" if part.smoke else SHAPE
    with hybridgen.Engine.load(part.whole, tensor_parallel=part.ranks, **many(part)) as engine:
        work = mix(256, part.smoke)
        facts = {"model": name, "engines": 1, "ranks": part.ranks}
        timed_mix(part, lambda some: engine.generate(some.prompts, samplings(some)), work, **facts)


def killed(part: Part) -> None:
    """The last rank's process is killed while a call runs."""
    name = "tiny"
    path = write(name, shape_dtype(name, part.device), part.folder / "killed", values=True)
    fields = {"max_batch": 4, "max_context": 1024, "prefill_buckets": [], "progress": False, "kv_memory": "64MiB"}
    engine = hybridgen.Engine.load(path, mode=part.modes[-1], tensor_parallel=part.ranks, **fields)
    prompts = random_prompts(3, 5, 500, 1)
    engine.generate(prompts, max_new_tokens=8, ignore_eos=True)
    pids = processes_of_ranks()
    ended: list[float] = []

    def kill() -> None:
        time.sleep(0.3)
        ended.append(time.monotonic())
        os.kill(pids[max(pids)], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    error = ""
    while not error and time.monotonic() < part.end:
        try:
            done = engine.generate(prompts, max_new_tokens=64 if part.smoke else 1000, ignore_eos=True)
            error = next((str(each.error) for each in done if each.error is not None), "")
        except hybridgen.HybridgenError as failure:
            error = str(failure)
    thread.join()
    took = time.monotonic() - ended[0]
    engine.close()
    left = [rank for rank, pid in pids.items() if processes_of_ranks().get(rank) == pid]
    facts = {"ranks": part.ranks, "seconds_to_error": took, "error": error.splitlines()[0] if error else None}
    part.add(what="killed", **facts, left_running=left)


def processes_of_ranks() -> dict[int, int]:
    """The pid of each rank but 0 that this process started and that still runs."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            _, _, fields = (place / "stat").read_text().rpartition(")")
            if int(fields.split()[1]) == os.getpid() and b"/hybridgen-ranks-" in words[-3]:
                found[int(words[-2])] = int(place.name)
    return found


PARTS: dict[str, Callable[[Part], None]] = {
    "all-reduce": all_reduce,
    "tensor-parallel": tensor_parallel,
    "large": large,
    "agree": agree,
    "kernels": kernels,
    "one": one,
    "replicas": replicas,
    "mix": mix_of_ranks,
    "killed": killed,
}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the parts one after another; the rows that they left, and what went wrong."""
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    end = time.monotonic() + arguments.seconds
    order = {"folder": str(folder), "smoke": arguments.smoke, "modes": arguments.modes, "ranks": arguments.gpus}
    needs_whole = {"one", "replicas", "mix"} & set(arguments.parts)
    before = Process({**order, "part": "whole", "seconds": 60}, 1) if needs_whole else None
    processes = {}
    for name in arguments.parts:
        limit = min(SECONDS[name], arguments.seconds)
        processes[name] = Process(
            {**order, "part": name, "seconds": limit}, arguments.gpus if name in ("all-reduce", "kernels") else 1
        )
    if before is not None:
        before.begin()
    try:
        for name, process in processes.items():
            if before is not None and name in needs_whole:
                before.finish(time.monotonic() + 60)
                before = None
            if time.monotonic() > end - 10:
                failed[name] = "no time was left"
                continue
            start = time.monotonic()
            process.begin()
            wrong = process.finish(min(end, start + process.seconds + 30))
            if wrong:
                failed[name] = wrong
            print(f"{name}: {time.monotonic() - start:.1f} s {wrong}", flush=True)
            place = folder / f"{name}.json"
            rows += json.loads(place.read_text()) if place.exists() else []
    finally:
        for process in processes.values():
            process.kill()
    return {"rows": rows, "failed": failed}


def run_part(order: dict[str, Any]) -> None:
    """In a process of its own."""
    sys.stdin.readline()
    part = Part(order)
    if part.name == "whole":
        name = "tiny" if part.smoke else SHAPE
        write(name, torch.float32 if part.device == "cpu" else torch.bfloat16, part.whole, values=True)
        print(f"{time.strftime('%X')} the checkpoint is written", flush=True)
        return
    try:
        PARTS[part.name](part)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # what NCCL does at the end of a process may wait for another
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--modes", nargs="+", choices=("eager", "graph", "jit", "hybrid"), default=["graph"])
    parser.add_argument("--gpus", type=int, default=2, help="ranks of a group, and replicas")
    parser.add_argument("--seconds", type=float, default=600, help="of all parts together")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny models, anywhere")
    parser.add_argument("--order", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.order is not None:
        run_part(json.loads(arguments.order))
        return
    with tempfile.TemporaryDirectory(prefix="parallel-") as folder:
        try:
            found = measure(arguments, Path(folder))
        finally:
            for place in Path("/dev/shm").glob(f"whole-{Path(folder).name}/*"):
                place.unlink()
            for place in Path("/dev/shm").glob(f"whole-{Path(folder).name}"):
                place.rmdir()
    report({"benchmark": "parallel", **found}, arguments.output)
    if arguments.smoke and found["failed"]:
        raise SystemExit(f"failed: {found['failed']}")


if __name__ == "__main__":
    main()
