"""What HTTP costs beside the socket, and whether the door holds under clients that come, go and are killed.

python benchmarks/serving_http.py --output benchmarks/results/serving-http-cpu.json

A server of the demo model with its HTTP door, as `hybridgen serve --http` starts both, and clients in their own
processes. Added times are medians of pairs: the same request over HTTP and over the socket, in turn, on a connection
that stays open. The load is a minute of streams and whole answers; some clients hang up in the middle, and a process
with a share of the clients is killed every few seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes, and threads that wait busily for each other

from common import report
from http_clients import OUTCOMES, PROMPT, connected, post
from serving import quantiles, timed

import hybridgen

ENGINE = ["--mode", "eager", "--dtype", "float32", "--max-batch", "64", "--kv-memory", "128MiB"]
PROCESSES = 4
KILL_EVERY = 5.0


class Place(NamedTuple):
    """A server and its door."""

    socket: Path
    url: str
    server: int
    door: int


@contextmanager
def serving() -> Iterator[Place]:
    """`hybridgen serve --http` of the demo model."""
    with tempfile.TemporaryDirectory(prefix="hg-") as directory:
        path, ready = Path(directory, "s"), Path(directory, "ready")
        command = [sys.executable, "-m", "hybridgen", "serve", *ENGINE, "--socket", str(path)]
        command += ["--ready-file", str(ready), "--http", "127.0.0.1:0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit("the server did not start")
                time.sleep(0.02)
            url = json.loads(ready.read_text())["http"]
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            [door] = [int(pid) for pid in children if b"--listen" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            yield Place(path, url, process.pid, door)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


# ------------------------------------------------------------------ added time


def measure_added(place: Place, tokens: int, repeats: int) -> dict[str, Any]:
    """Requests of one token and streams, over HTTP and over the socket, in turn."""
    connection = connected(place.url)
    one = {"model": "demo", "prompt": PROMPT, "max_tokens": 1, "seed": 0, "temperature": 0}
    many = {**one, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with hybridgen.Client(place.socket) as client:
        fields: dict[str, Any] = {"seed": 0, "temperature": 0.0}
        long = {**fields, "max_new_tokens": tokens, "ignore_eos": True}
        calls = {
            "request": (
                lambda: post(connection, one).read(),
                lambda: client.generate(PROMPT, max_new_tokens=1, **fields),
                1,
            ),
            "streamed_token": (
                lambda: post(connection, many).read(),
                lambda: list(client.stream(PROMPT, **long)),
                tokens,
            ),
        }
        rows = {}
        for name, (over_http, over_socket, count) in calls.items():
            pairs = [(timed(over_http) / count, timed(over_socket) / count) for _ in range(repeats + 2)][2:]
            rows[name] = {
                "http": quantiles([first for first, _ in pairs]),
                "socket": quantiles([second for _, second in pairs]),
                "added": quantiles([first - second for first, second in pairs]),
            }
    connection.close()
    return rows


# ------------------------------------------------------------------ load


def measure_load(place: Place, clients: int, seconds: float, kill_every: float) -> dict[str, Any]:
    """All clients for so long; then what the server and its door hold, against before."""
    draw, seeds, kills = random.Random(0), itertools.count(), 0
    script = Path(__file__).with_name("http_clients.py")
    share = clients // PROCESSES

    def start(seconds: float, output: Any) -> subprocess.Popen[bytes]:
        arguments = [place.url, str(share), str(seconds), str(next(seeds))]
        return subprocess.Popen([sys.executable, str(script), *arguments], stdout=output)

    with hybridgen.Client(place.socket) as client, tempfile.TemporaryFile("a+b") as output:
        # What a first load takes for good.
        for process in [start(min(5.0, seconds), subprocess.DEVNULL) for _ in range(PROCESSES)]:
            process.wait()
        before = held(place, client)
        until = time.time() + seconds
        running = [start(seconds, output) for _ in range(PROCESSES)]
        next_kill = time.time() + kill_every
        while time.time() < until:
            time.sleep(0.1)
            if next_kill <= time.time() < until - 1:
                victim = draw.randrange(PROCESSES)
                running[victim].kill()
                running[victim].wait()
                running[victim] = start(until - time.time(), output)
                kills, next_kill = kills + 1, time.time() + kill_every
        for process in running:
            process.wait()
        after = held(place, client)
        output.seek(0)
        letters = output.read().decode()
    found = {name: letters.count(letter) for name, letter in OUTCOMES.items()}
    killed = 2 * found["started"] - len(letters)
    row = {"clients": share * PROCESSES, "seconds": seconds, "client_processes_killed": kills}
    return {**row, **found, "in_flight_when_killed": killed, "before": before, "after": after}


def held(place: Place, client: hybridgen.Client) -> dict[str, int]:
    """What both processes hold once nothing runs: pages, descriptors, bytes of memory."""
    for _ in range(300):
        stats = client.stats()
        engine, server = stats["engine"], stats["server"]
        used = engine["pages"] - engine["free_pages"]
        if not (used or engine["running"] or engine["waiting"] or server["in_flight"]):
            break
        time.sleep(0.1)
    time.sleep(1.0)  # connections that were cut are closed
    page = os.sysconf("SC_PAGE_SIZE")
    row = {"pages_in_use": used, "requests": engine["running"] + engine["waiting"], "in_flight": server["in_flight"]}
    for name, pid in (("server", place.server), ("door", place.door)):
        row[f"{name}_descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
        row[f"{name}_bytes"] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
    return row


def show(results: dict[str, Any]) -> None:
    """Print what was found."""
    print(f"{'':20} {'socket':>10} {'http':>10} {'added':>8}   (us, medians)")
    for name, row in results["added"].items():
        print(f"{name:20} " + " ".join(f"{row[key]['p50_us']:10.1f}" for key in ("socket", "http", "added")))
    load = results["load"]
    print(", ".join(f"{name}: {value}" for name, value in load.items() if name not in ("before", "after")))
    for name in load["before"]:
        print(f"{name:20} {load['before'][name]:>14,} -> {load['after'][name]:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--smoke", action="store_true", help="few clients, few seconds")
    arguments = parser.parse_args()
    small = arguments.smoke
    with serving() as place:
        added = measure_added(place, 10 if small else 60, 3 if small else 100)
        clients, seconds = (4, 3.0) if small else (arguments.clients, arguments.seconds)
        load = measure_load(place, clients, seconds, 1.0 if small else KILL_EVERY)
    results = {"cores": os.cpu_count(), "added": added, "load": load}
    show(results)
    report(results, arguments.output)


if __name__ == "__main__":
    main()
