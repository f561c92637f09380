"""How much of the in-process rate of a large batch comes through HTTP, with a connection for each request?

The requests of `throughput.py`: 256 prompts of ids with 100 to 1024 tokens and as many new ones each, end-of-sequence
ignored, weights random. First one `generate()` call of an engine in this process; then the same requests at once
through `hybridgen serve --http`, each on a connection of its own, from processes of their own: whole answers, as a
batch client asks, and streams. Both load the same checkpoint, which this script writes (to memory, /dev/shm, where
there is room); its tokenizer has a text for each id. The server finds in the compile cache what the engine before it
compiled, and answers the whole mix once before it is measured, so that it has recorded what the mix needs. Generated
tokens over the time from the first request to the last answer; the median of the runs. No run finds pages of an earlier
one in the prefix cache (`cache_salt`).

Each phase is told on stderr with the seconds since the imports. A phase that takes longer than `--limit` ends the
script, with the last lines of the server's log. Both sides run with the clocks of `clocks.py`, so that each run also
says when requests reached the engine and what its steps took. The output is written after each run.

    python benchmarks/serving_mix.py [--model llama-3.2-1b] [--runs 3] [--output results.json]
    python benchmarks/serving_mix.py --smoke      # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import clocks
from checkpoints import write_checkpoint
from common import how_it_ran, release, report, shape_dtype, synchronize, this_device
from shapes import shape_config
from throughput import WARM_UP, Work, requests

import hybridgen

STARTED = time.monotonic()
PROCESSES = 4
TICK = os.sysconf("SC_CLK_TCK")
SHARED = Path("/dev/shm")
CHECKPOINT_BYTES = 2**33
"""Of free memory there that a checkpoint and a compile cache may need."""
TOLD = 3000
"""Characters of a log that are shown."""


def note(text: str) -> None:
    """Say on stderr what happens, with the seconds since the imports."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


class Case(NamedTuple):
    """What is measured on both sides."""

    path: Path
    work: Work
    options: dict[str, Any]
    """Of the engine."""
    runs: int
    limit: float
    """Seconds that a phase may take."""
    cache: Path
    """Where both sides keep what they compile."""


def in_process(case: Case, device: str, told: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """How an engine of this process ran the requests; `told` has the seconds and clocks of each run."""
    note("loading the engine of this process")
    watch = clocks.Clocks()
    with hybridgen.Engine.load(case.path, **case.options, compile_cache=str(case.cache), progress=False) as engine:
        note("the engine is loaded; warm-up")

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
        for run in range(case.runs):
            synchronize(device)
            watch.take()
            start = time.monotonic()
            generate(case.work, f"run {run}")
            synchronize(device)
            seconds = time.monotonic() - start
            told({"seconds": seconds, "clocks": clocks.summary(watch.take(), start)})
            note(f"in process, run {run}: {seconds:.2f} s")
        return how_it_ran(engine)


class Place(NamedTuple):
    """A server and its door."""

    socket: Path
    url: str
    pids: dict[str, int]
    log: Path
    clocks: Path
    """What the server writes of its steps."""


def failed(why: str, log: Path | None = None) -> SystemExit:
    """The end of the script, with the last of what the server said."""
    told = "" if log is None else f"; the server's log ends with:\n{log.read_text(errors='replace')[-TOLD:]}"
    return SystemExit(why + told)


@contextmanager
def serving(case: Case) -> Iterator[Place]:
    """`hybridgen serve --http` of the checkpoint."""
    with tempfile.TemporaryDirectory(prefix="hg-") as directory:
        path, ready, log = Path(directory, "s"), Path(directory, "ready"), Path(directory, "log")
        seen, script = Path(directory, "clocks"), Path(__file__).with_name("clocks.py")
        command = [sys.executable, str(script), str(seen), "serve", str(case.path), "--socket", str(path)]
        for name, value in case.options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        command += ["--ready-file", str(ready), "--http", "127.0.0.1:0"]
        environment = os.environ | {"HYBRIDGEN_CACHE_DIR": str(case.cache), "HYBRIDGEN_COMPILE_CACHE": "1"}
        note("starting the server")
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            since = time.monotonic()
            while not ready.exists():
                if process.poll() is not None:
                    raise failed(f"the server ended with status {process.returncode} before it was ready", log)
                if time.monotonic() - since > case.limit:
                    raise failed(f"the server was not ready within {case.limit:g} s", log)
                time.sleep(0.05)
            url = json.loads(ready.read_text())["http"]
            note(f"the server is ready at {url}")
            yield Place(path, url, pids_of(process.pid), log, seen)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


def pids_of(server: int) -> dict[str, int]:
    """The server and its HTTP door, as far as the system tells who belongs to whom."""
    found = {"server": server}
    with suppress(OSError):
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError, ValueError):
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == server and b"--listen" in (place / "cmdline").read_bytes():
                    found["door"] = int(place.name)
    return found


def cpu_seconds(pid: int) -> float:
    """Of a process so far, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def line_of(client: subprocess.Popen[str], until: float) -> str:
    """The next line that a client writes; empty where none comes in time."""
    assert client.stdout is not None
    readable, _, _ = select.select([client.stdout], [], [], max(0.0, until - time.monotonic()))
    return client.stdout.readline().strip() if readable else ""


def ask(place: Place, work: Work, salt: str, limit: float, *, stream: bool) -> dict[str, Any]:
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
        try:
            until = time.monotonic() + limit
            for client in clients:
                if line_of(client, until) != "connected":
                    raise failed(f"a client did not connect within {limit:g} s", place.log)
            clocks.read(place.clocks, 0, 0.0)
            before = {name: cpu_seconds(pid) for name, pid in place.pids.items()}
            start = time.monotonic()
            for client in clients:
                assert client.stdin is not None
                client.stdin.write("go\n")
                client.stdin.flush()
            answers = [line_of(client, start + limit) for client in clients]
            if not all(answers):
                raise failed(f"{answers.count('')} client processes had no end within {limit:g} s", place.log)
            found = [json.loads(answer) for answer in answers]
            spent = {name: cpu_seconds(pid) - before[name] for name, pid in place.pids.items()}
        finally:
            for client in clients:
                client.kill()
                client.wait()
    bad, tokens = sum(row["failed"] for row in found), sum(row["tokens"] for row in found)
    if bad or tokens != work.tokens:
        why = f"{bad} requests failed, and {tokens} tokens came where {work.tokens} were asked for"
        raise failed(why, place.log)
    spent["clients"] = sum(row["cpu_seconds"] for row in found)
    seconds = max(row["end"] for row in found) - start
    seen = clocks.summary(clocks.read(place.clocks, len(work.prompts), 5.0), start)
    seen["last_sent"] = max(row["sent"] for row in found) - start
    return {"seconds": seconds, "cpu_seconds": spent, "clocks": seen}


def settle(place: Place, limit: float) -> None:
    """Wait until the server has recorded what was wanted."""
    until = time.monotonic() + limit
    with hybridgen.Client(place.socket) as client:
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < 1.0:
            if time.monotonic() > until:
                raise failed(f"the server still recorded after {limit:g} s", place.log)
            held = len(client.stats()["engine"]["graphs"]["graphs"])
            if held != seen:
                seen, since = held, time.monotonic()
            time.sleep(0.1)


def phases(stats: dict[str, Any]) -> str:
    """What starting an engine took, in words."""
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stats["startup"].items() if seconds >= 0.05)


def directory_of(wanted: Path | None) -> Path | None:
    """Where the checkpoint goes: memory where there is room, else where temporary files go (None)."""
    if wanted is None and SHARED.is_dir() and shutil.disk_usage(SHARED).free >= CHECKPOINT_BYTES:
        return SHARED
    return wanted


class Results:
    """What was measured so far, written after each run: a run that is cut off leaves those before it."""

    def __init__(self, work: Work, output: Path | None) -> None:
        self.facts: dict[str, Any] = {"connections": len(work.prompts), "cores": os.cpu_count()}
        self.facts["generated_tokens"] = work.tokens
        self._output = output
        self._rows: dict[str, dict[str, Any]] = {}

    def add(self, how: str, run: dict[str, Any]) -> None:
        """One more run."""
        row = self._rows.setdefault(how, {"how": how, "runs": []})
        row["runs"].append(run)
        seconds = statistics.median(each["seconds"] for each in row["runs"])
        row["tokens_per_s"] = self.facts["generated_tokens"] / seconds
        row["of_in_process"] = row["tokens_per_s"] / self._rows["in process"]["tokens_per_s"]
        told = " ".join(f"{name}={value:.4g}" for name, value in run["clocks"].items())
        print(f"{how:<14} {run['seconds']:.3f} s  {told}  {run.get('cpu_seconds', '')}", flush=True)
        if self._output is not None:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._output.write_text(json.dumps(self._all(), indent=1) + "\n")

    def _all(self) -> dict[str, Any]:
        return {"benchmark": "serving mix", **self.facts, "rows": list(self._rows.values())}

    def show(self) -> None:
        """The end: a table and all of it."""
        for row in self._rows.values():
            print(f"{row['how']:<14} {row['tokens_per_s']:>10,.0f} tokens/s {row['of_in_process']:.3f}")
        report(self._all(), self._output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of common.shape_config")
    parser.add_argument("--mode", default="hybrid")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", nargs=2, type=int, default=[100, 1024], help="of a prompt, and of an output")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that a phase may take")
    parser.add_argument("--directory", type=Path, help="where the checkpoint goes meanwhile (default: memory)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    name, runs, device = arguments.model, arguments.runs, this_device()
    ids = min(10000, shape_config(name).vocab_size - 1)
    work, options = requests(arguments.requests, *arguments.tokens, ids), {"mode": arguments.mode}
    if arguments.smoke:
        name, runs, work = "tiny", 1, requests(6, 4, 12, 500)
        options = {"mode": "eager", "kv_memory": "16MiB"}
    limit = arguments.limit
    options |= {
        "max_batch": len(work.prompts),
        "max_context": max(len(prompt) + new for prompt, new in zip(*work, strict=True)),
    }
    with tempfile.TemporaryDirectory(prefix="hg-", dir=directory_of(arguments.directory)) as directory:
        path, cache = Path(directory, "model"), Path(directory, "cache")
        path.mkdir()
        note(f"writing the checkpoint of {name} to {path.parent.parent}")
        write_checkpoint(name, path, shape_dtype(name, device), device)
        release()
        case = Case(path, work, options, runs, limit, cache)
        results = Results(work, arguments.output)
        results.facts |= {"model": name, "options": options}
        results.facts["ran"] = in_process(case, device, lambda run: results.add("in process", run))
        release()
        note(f"started in {phases(results.facts['ran'])}")
        with serving(case) as place:
            with hybridgen.Client(place.socket) as client:
                started = client.stats()["engine"]
            results.facts["server"] = {name: started[name] for name in ("startup", "artifacts", "fallbacks")}
            note(f"started in {phases(started)}; compile cache: {started['artifacts']}")
            for turn in range(2):
                ask(place, work.head(WARM_UP), f"warm {turn}", limit, stream=bool(turn))
                settle(place, limit)
                note(f"warm-up {turn} of the server is done")
            first = ask(place, work, "unmeasured", limit, stream=False)
            settle(place, limit)
            note(f"the mix once, not measured: {first['seconds']:.2f} s")
            for how, stream in (("http", False), ("http, streams", True)):
                for run in range(runs):
                    found = ask(place, work, f"{how} {run}", limit, stream=stream)
                    results.add(how, found)
                    note(f"{how}, run {run}: {found['seconds']:.2f} s")
        note("the server has ended")
    results.show()


if __name__ == "__main__":
    main()
