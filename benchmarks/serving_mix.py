"""How much of the in-process rate of a large batch comes through HTTP, with a connection for each request?

The requests of `throughput.py`: 256 prompts of ids with 100 to 1024 tokens and as many new ones each, end-of-sequence
ignored, weights random. First one `generate()` call of an engine in this process; then the same requests at once
through `hybridgen serve --http`, each on a connection of its own, from processes of their own: whole answers, as a
batch client asks, and streams. Both load the same checkpoint, which this script writes; its tokenizer has a text for
each id. Generated tokens over the time from the first request to the last answer; the median of the runs. No run finds
pages of an earlier one in the prefix cache (`cache_salt`).

    python benchmarks/serving_mix.py [--model llama-3.2-1b] [--runs 3] [--output results.json]
    python benchmarks/serving_mix.py --smoke      # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import write_checkpoint
from common import how_it_ran, release, report, shape_dtype, synchronize, this_device
from throughput import WARM_UP, Work, requests

import hybridgen

PROCESSES = 4
TICK = os.sysconf("SC_CLK_TCK")


class Case(NamedTuple):
    """What is measured on both sides."""

    path: Path
    work: Work
    options: dict[str, Any]
    """Of the engine."""
    runs: int


def in_process(case: Case, device: str) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each run in an engine of this process, and how it ran."""
    with hybridgen.Engine.load(case.path, **case.options, progress=False) as engine:

        def generate(work: Work, salt: str) -> None:
            sampling = [
                hybridgen.SamplingParams(
                    max_new_tokens=new, temperature=0.0, ignore_eos=True, seed=index, cache_salt=salt
                )
                for index, new in enumerate(work.new)
            ]
            outs = engine.generate(work.prompts, sampling)
            if sum(len(out.token_ids) for out in outs) != work.tokens:
                raise SystemExit("an engine made fewer tokens than were asked for")

        for turn in range(2):  # what this sampling lacks is captured at the end of a call
            generate(case.work.head(WARM_UP), f"warm {turn}")
            while engine.idle():
                pass
        seconds = []
        for run in range(case.runs):
            synchronize(device)
            start = time.perf_counter()
            generate(case.work, f"run {run}")
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        return seconds, how_it_ran(engine)


class Place(NamedTuple):
    """A server and its door."""

    socket: Path
    url: str
    pids: dict[str, int]


@contextmanager
def serving(case: Case) -> Iterator[Place]:
    """`hybridgen serve --http` of the checkpoint."""
    with tempfile.TemporaryDirectory(prefix="hg-") as directory:
        path, ready, log = Path(directory, "s"), Path(directory, "ready"), Path(directory, "log")
        command = [sys.executable, "-m", "hybridgen", "serve", str(case.path), "--socket", str(path)]
        for name, value in case.options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        command += ["--ready-file", str(ready), "--http", "127.0.0.1:0"]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")
                time.sleep(0.05)
            url = json.loads(ready.read_text())["http"]
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            [door] = [int(pid) for pid in children if b"--listen" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            yield Place(path, url, {"server": process.pid, "door": door})
        finally:
            process.terminate()
            process.wait()


def cpu_seconds(pid: int) -> float:
    """Of a process so far, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def ask(place: Place, work: Work, salt: str, *, stream: bool) -> dict[str, Any]:
    """All requests at once; what it took, and seconds of CPU by process."""
    script = Path(__file__).with_name("http_load.py")
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for index, (prompt, new) in enumerate(zip(*work, strict=True)):
            body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "seed": index}
            file.write(json.dumps(body | {"cache_salt": salt} | more) + "\n")
        file.flush()
        count = min(PROCESSES, len(work.prompts))
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        clients = [
            subprocess.Popen([sys.executable, str(script), place.url, file.name, str(first), str(count)], **pipes)
            for first in range(count)
        ]
        for client in clients:
            assert client.stdout is not None
            if client.stdout.readline().strip() != "connected":
                raise SystemExit("a client did not connect")
        before = {name: cpu_seconds(pid) for name, pid in place.pids.items()}
        start = time.monotonic()
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("go\n")
            client.stdin.flush()
        found = [json.loads(client.communicate()[0]) for client in clients]
        spent = {name: cpu_seconds(pid) - before[name] for name, pid in place.pids.items()}
    failed, tokens = sum(row["failed"] for row in found), sum(row["tokens"] for row in found)
    if failed or tokens != work.tokens:
        raise SystemExit(f"{failed} requests failed, and {tokens} tokens came where {work.tokens} were asked for")
    spent["clients"] = sum(row["cpu_seconds"] for row in found)
    return {"seconds": max(row["end"] for row in found) - start, "cpu_seconds": spent}


def settle(place: Place) -> None:
    """Wait until the server has recorded what was wanted."""
    with hybridgen.Client(place.socket) as client:
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < 1.0:
            held = len(client.stats()["engine"]["graphs"]["graphs"])
            if held != seen:
                seen, since = held, time.monotonic()
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of common.shape_config")
    parser.add_argument("--mode", default="hybrid")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    name, runs, device = arguments.model, arguments.runs, this_device()
    work, options = requests(arguments.requests, 100, 1024, 10000), {"mode": arguments.mode}
    if arguments.smoke:
        name, runs, work = "tiny", 1, requests(6, 4, 12, 500)
        options = {"mode": "eager", "kv_memory": "16MiB"}
    options |= {
        "max_batch": len(work.prompts),
        "max_context": max(len(prompt) + new for prompt, new in zip(*work, strict=True)),
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_checkpoint(name, path, shape_dtype(name, device), device)
        release()
        case = Case(path, work, options, runs)
        seconds, ran = in_process(case, device)
        release()
        rows: list[dict[str, Any]] = [{"how": "in process", "runs": [{"seconds": each} for each in seconds]}]
        with serving(case) as place:
            for turn in range(2):
                ask(place, work.head(WARM_UP), f"warm {turn}", stream=bool(turn))
                settle(place)
            for how, stream in (("http", False), ("http, streams", True)):
                measured = [ask(place, work, f"{how} {run}", stream=stream) for run in range(runs)]
                rows.append({"how": how, "runs": measured})
    for row in rows:
        row["tokens_per_s"] = work.tokens / statistics.median(run["seconds"] for run in row["runs"])
        row["of_in_process"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        spent = row["runs"][-1].get("cpu_seconds", {})
        print(f"{row['how']:<14} {row['tokens_per_s']:>10,.0f} tokens/s {row['of_in_process']:.3f}  {spent}")
    report(
        {
            "benchmark": "serving mix",
            "model": name,
            "options": options,
            "connections": len(work.prompts),
            "cores": os.cpu_count(),
            "generated_tokens": work.tokens,
            "rows": rows,
            "ran": ran,
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
