"""Is another checkout of hybridgen slower or faster than this one, on one machine?

A process for each tree loads the same models; then they measure in turns, so that what the machine does meets both.
Each process imports its own tree's package and its own tree's `decode`, `replay` and `host_loop`.

| part | what is timed |
|---|---|
| decode | (a call for N new tokens, less one for a single token) / (N - 1): prompts of 512, as in `decode.py` |
| replay | host time of a step, time between steps, and the recorded step alone, as in `replay.py` |
| host | a step of the loop with a runner that does nothing, as in `host_loop.py` |
| ttft | time to the first token of a call, as in `ttft.py`: of a live module, and of the same shape from files |

    python benchmarks/two_trees.py --other path/to/checkout [--output results.json]
    python benchmarks/two_trees.py --smoke          # a tiny model and this tree twice, anywhere
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
PARTS = ("host", "decode", "replay", "ttft")
MEMORY = "6GiB"
"""Of an engine for its keys and values: several engines of two processes share the device."""

WARM_UP = {"host": 0, "decode": 2, "replay": 1, "ttft": 1}
"""How often a part is measured first in vain: what first calls record or compile is in no figure."""

Rows = dict[str, float]
"""Seconds by the name of a row."""


class Worker:
    """What measures in one tree's process."""

    def __init__(self, tree: Path, models: tuple[str, str], files: str, smoke: bool) -> None:
        import common
        import torch

        self.common = common
        self.tree = tree
        self.small, self.large = models
        self.files = files
        self.smoke = smoke
        self.device = common.this_device()
        self.options: dict[str, Any] = {"mode": "hybrid", "kv_memory": "64MiB" if smoke else MEMORY}
        if smoke:
            self.options["compile_backend"] = "eager"
        self.engines: list[Any] = []
        torch.manual_seed(0)

    def prepare(self, part: str) -> Callable[[], Rows]:
        """Load what a part needs; returns what measures it once."""
        return getattr(self, part)()  # type: ignore[no-any-return]

    def engine(self, model: Any, **options: Any) -> Any:
        import hybridgen

        engine = hybridgen.Engine.load(model, **{**self.options, **options})
        self.engines.append(engine)
        return engine

    def model(self, name: str) -> Any:
        return self.common.random_model(name, self.common.shape_dtype(name, self.device), self.device)

    def host(self) -> Callable[[], Rows]:
        import host_loop

        tokenizer = host_loop.AutoTokenizer.from_pretrained(HERE / "hybridgen" / "demo" / "model")
        host_loop.model_path = lambda: None
        host_loop.AutoTokenizer = type("Same", (), {"from_pretrained": staticmethod(lambda _: tokenizer)})
        steps = 20 if self.smoke else 300

        def measure() -> Rows:
            rows = {}
            for batch in (1, 4) if self.smoke else (1, 8, 32):
                step = functools.partial(host_loop.step_seconds, batch, steps, 1)
                rows[f"host, batch {batch}, text at the end"] = step()
                rows[f"host, batch {batch}, stop string"] = step(stop=["\n\nclass"])
                rows[f"host, batch {batch}, events"] = step(events=True)
            return rows

        return measure

    def decode(self) -> Callable[[], Rows]:
        batches, prompt, new = ((1, 2), 16, 8) if self.smoke else ((1, 8, 64), 512, 128)
        most = max(batches)
        model = self.model(self.small)
        engine = self.engine(
            model, max_batch=most, max_context=prompt + new, token_budget=most * prompt, decode_buckets=list(batches),
            prefill_buckets=[],
        )  # fmt: skip
        prompts = {
            batch: self.common.random_prompts(batch, prompt, model.config.vocab_size, batch) for batch in batches
        }

        def call(batch: int, count: int) -> float:
            self.common.synchronize(self.device)
            start = time.perf_counter()
            engine.generate(prompts[batch], max_new_tokens=count, ignore_eos=True, temperature=0)
            self.common.synchronize(self.device)
            return time.perf_counter() - start

        def measure() -> Rows:
            rows = {}
            for batch in batches:
                long = min(call(batch, new) for _ in range(2))
                short = min(call(batch, 1) for _ in range(2))
                rows[f"decode, batch {batch}"] = (long - short) / (new - 1)
            return rows

        return measure

    def replay(self) -> Callable[[], Rows]:
        import replay

        batches, steps, replays = ([1, 2], 10, 100) if self.smoke else ([1, 32], 200, 200)
        replay.show_times = lambda row: None
        engine = self.engine(
            self.model(self.small), max_batch=max(batches), max_context=1024 if self.smoke else 4096,
            decode_buckets=batches, prefill_buckets=[], run_ahead=1,
        )  # fmt: skip

        def measure() -> Rows:
            rows = {}
            for batch in batches:
                row = replay.measure(engine, batch, 16 if self.smoke else 128, steps, replays, self.device)
                found = {"host": row["host"], "wall": row["wall"], "replay on the device": row["replay"]["device"]}
                rows |= {f"replay, batch {batch}, {name}": times["p50_us"] / 1e6 for name, times in found.items()}
            return rows

        return measure

    def ttft(self) -> Callable[[], Rows]:
        import hybridgen

        lengths, new, calls = ((5, 20), 3, 2) if self.smoke else ((64, 400), 4, 8)
        # Graphs of just these lengths: nothing that is measured at a start, beside the other process, decides.
        options: dict[str, Any] = {"max_batch": 1, "max_context": 512, "decode_buckets": [1]}
        options["prefill_buckets"] = list(lengths)
        if "prefix_cache" in {field.name for field in dataclasses.fields(hybridgen.EngineConfig)}:
            options["prefix_cache"] = False
        model = self.model(self.large)
        engines = {"a live module": self.engine(model, **options), "files": self.engine(self.files, **options)}
        seeds = itertools.count()

        def measure() -> Rows:
            rows = {}
            for length in lengths:
                for name, engine in engines.items():
                    times = []
                    for _ in range(calls):
                        prompts = self.common.random_prompts(1, length, model.config.vocab_size, next(seeds))
                        times.append(self._first_token(engine, prompts, new))
                    rows[f"ttft, {length} tokens, {name}"] = statistics.median(times)
            return rows

        return measure

    @staticmethod
    def _first_token(engine: Any, prompts: list[list[int]], new: int) -> float:
        start = time.perf_counter()
        (completion,) = engine.generate(prompts, max_new_tokens=new, ignore_eos=True, temperature=0)
        whole = time.perf_counter() - start
        # From the call on, and not from the submission: what comes before that counts, too.
        return float(whole - completion.timing.total + completion.timing.ttft)


def work(arguments: argparse.Namespace) -> None:
    """A tree's process: reads `prepare PART` and `measure PART`, answers each with one line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # scripts print
    worker = Worker(Path(arguments.worker), tuple(arguments.models), arguments.files, arguments.smoke)
    measures: dict[str, Callable[[], Rows]] = {}
    for line in sys.stdin:
        order, part = line.split()
        answer: dict[str, Any] = {}
        start = time.perf_counter()
        try:
            if order == "prepare":
                measures[part] = worker.prepare(part)
                for _ in range(WARM_UP[part]):
                    measures[part]()
            else:
                answer["rows"] = measures[part]()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answer["error"] = f"{type(error).__name__}: {error}"
        answer["seconds"] = time.perf_counter() - start
        print(json.dumps(answer), file=answers, flush=True)


class Tree:
    """One tree's process, seen from here."""

    def __init__(self, name: str, directory: Path, arguments: argparse.Namespace, files: Path) -> None:
        self.name = name
        paths = [str(directory), str(directory / "benchmarks")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HYBRIDGEN_COMPILE_CACHE": "0"}
        command = [sys.executable, "-P", __file__, "--worker", str(directory), "--models", *arguments.models]
        command += ["--files", str(files), *(["--smoke"] if arguments.smoke else [])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def order(self, order: str, part: str) -> None:
        assert self.process.stdin is not None
        print(order, part, file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended"}  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def rows_of(rounds: list[dict[str, Rows]]) -> list[dict[str, Any]]:
    """Medians over the rounds, and of the ratio of each round's two figures."""
    rows = []
    for name in dict.fromkeys(name for each in rounds for name in each["other"]):
        pairs = [(each["other"][name], each["this"][name]) for each in rounds if name in each["this"]]
        if not pairs:
            continue
        ratios = sorted(this / other for other, this in pairs)
        row = {"row": name, "rounds": len(pairs)}
        row |= {"other_us": 1e6 * statistics.median(other for other, _ in pairs)}
        row |= {"this_us": 1e6 * statistics.median(this for _, this in pairs)}
        row |= {"ratio": statistics.median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1]}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':<50} {'other':>10} {'this':>10} {'this / other':>12}  (us; lowest and highest ratio)")
    for row in rows:
        print(
            f"{row['row']:<50} {row['other_us']:10.1f} {row['this_us']:10.1f} {row['ratio']:12.3f}  "
            f"{row['ratio_low']:.3f} {row['ratio_high']:.3f}",
            flush=True,
        )


def compare(arguments: argparse.Namespace, files: Path, written: threading.Thread) -> dict[str, Any]:
    """All parts, in turns; `ttft` once its model's files are written."""
    from common import provenance, write

    trees = [Tree("other", arguments.other, arguments, files), Tree("this", HERE, arguments, files)]
    result: dict[str, Any] = {"benchmark": "two_trees", "other_commit": arguments.other_commit}
    result |= {"rows": [], "errors": {}}
    try:
        for part in arguments.parts:
            if part == "ttft":
                written.join()
            for tree in trees:
                tree.order("prepare", part)
            answers = {tree.name: tree.answer() for tree in trees}
            print(part, {name: round(answer.get("seconds", 0), 1) for name, answer in answers.items()}, flush=True)
            failed = {name: answer["error"] for name, answer in answers.items() if "error" in answer}
            rounds: list[dict[str, Rows]] = []
            for number in range(0 if failed else arguments.rounds):
                measured = {}
                for tree in trees if number % 2 == 0 else trees[::-1]:
                    tree.order("measure", part)
                    answer = tree.answer()
                    measured[tree.name] = answer.get("rows", {})
                    failed |= {tree.name: answer["error"]} if "error" in answer else {}
                rounds.append(measured)
            if failed:
                result["errors"][part] = failed
                print(part, failed, flush=True)
            rows = rows_of(rounds)
            show(rows)
            result["rows"] += rows
            write({"provenance": provenance(), **result}, arguments.output)
    finally:
        for tree in trees:
            tree.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, default=HERE, help="the root of the other checkout")
    parser.add_argument("--other-commit", help="which commit that is")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--models", nargs=2, default=["llama-3.2-1b", "llama-2-7b"], help="for decode and replay; ttft")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--files", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.models, arguments.rounds = ["tiny", "tiny"], 1
    if arguments.worker:
        work(arguments)
        return
    import random_weights
    from common import report, shape_dtype, this_device

    arguments.other = arguments.other.resolve()
    name = arguments.models[1]
    with tempfile.TemporaryDirectory(dir=roomy(Path("/dev/shm"))) as directory:
        files = Path(directory)
        dtype = shape_dtype(name, this_device())
        written = threading.Thread(target=random_weights.write, args=(name, dtype, files), kwargs={"values": True})
        if "ttft" in arguments.parts:
            written.start()
        result = compare(arguments, files, written)
    report(result, arguments.output)


def roomy(place: Path) -> Path | None:
    """That directory if a large model fits into it; None: where temporary files usually are."""
    return place if place.is_dir() and shutil.disk_usage(place).free > 2**35 else None


if __name__ == "__main__":
    main()
