"""What the socket costs: added time per request and per streamed token, against the same engine in this process.

python benchmarks/serving.py --output benchmarks/results/serving-cpu.json
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes, and threads that wait busily for each other

from common import report

import hybridgen
from hybridgen.core import Completion, FinishReason, Timing, TokenEvent
from hybridgen.params import SamplingParams
from hybridgen.serving.process import ServeOptions, serve, serve_model

PROMPT = "def read(path):\n"
ENGINE: dict[str, Any] = {
    "mode": "eager",
    "dtype": "float32",
    "max_batch": 32,
    "kv_memory": "64MiB",
    "prefix_cache": False,
}


CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


class Clock:
    """A `hybridgen.serving.service.adapter.Model` whose tokens' texts are the time at which they were made."""

    description: ClassVar[dict[str, Any]] = {"model": "clock", "mode": "none", "max_batch": 64, "max_context": 100_000}

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._runs: list[dict[str, Any]] = []

    def encode(self, prompt: Any, index: int) -> Any:
        return prompt

    def submit(self, prompts: list[Any], sampling: list[SamplingParams], *, events: bool) -> list[dict[str, Any]]:
        runs = [
            {"index": index, "left": params.max_new_tokens or 1, "queue": [], "events": events}
            for index, params in enumerate(sampling)
        ]
        self._runs += runs
        return runs

    def prompt_ids(self, handle: dict[str, Any]) -> tuple[int, ...]:
        return ()

    def events(self, handle: dict[str, Any]) -> Iterator[TokenEvent]:
        queue, handle["queue"] = handle["queue"], []
        yield from queue

    def step(self) -> None:
        if self._step_seconds:
            time.sleep(self._step_seconds)
        for run in self._runs:
            run["left"] -= 1
            ends = run["left"] == 0
            if run["events"] or ends:
                text = repr(time.perf_counter())
                completion = _completion() if ends else None
                run["queue"].append(TokenEvent(token_id=7, text=text, index=run["index"], completion=completion))
        self._runs = [run for run in self._runs if run["left"]]

    def cancel(self, handles: list[dict[str, Any]]) -> None:
        self._runs = [run for run in self._runs if run not in handles]

    def busy(self) -> bool:
        return bool(self._runs)

    def idle(self) -> bool:
        return False

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._runs = []


def _completion() -> Completion:
    timing = Timing(queue=0.0, ttft=0.0, total=0.0)
    return Completion(
        text="", token_ids=(), prompt_token_ids=(), finish_reason=FinishReason.LENGTH, seed=0, timing=timing
    )


def run_clock(options: ServeOptions, core: int | None, step_seconds: float) -> None:
    """The clock's server process."""
    pin(core)
    serve_model(lambda: Clock(step_seconds), options, lambda line: None)


def run_engine(options: ServeOptions, core: int | None) -> None:
    """The demo model's server process."""
    pin(core)
    serve(lambda: hybridgen.Engine.load(**ENGINE), options, lambda line: None)


def pin(core: int | None) -> None:
    """Keep this process on one core, or let it go where the system likes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES if core is None else {sorted(CORES)[core % len(CORES)]})


@contextmanager
def server(target: Callable[..., None], *arguments: Any) -> Iterator[hybridgen.Client]:
    """A server process, and a client of it."""
    with tempfile.TemporaryDirectory(prefix="hg-") as place:
        ready = Path(place, "ready")
        options = ServeOptions(socket=Path(place, "s"), ready_file=ready)
        process = multiprocessing.get_context("spawn").Process(target=target, args=(options, *arguments))
        process.start()
        while not ready.exists():
            if not process.is_alive():
                raise SystemExit("the server did not start")
            time.sleep(0.02)
        with hybridgen.Client(Path(place, "s")) as client:
            yield client
            client.shutdown()
        process.join()


def quantiles(values: list[float]) -> dict[str, float]:
    """p50 and p95, in microseconds."""
    ordered = sorted(values)
    return {"p50_us": 1e6 * statistics.median(ordered), "p95_us": 1e6 * ordered[int(0.95 * (len(ordered) - 1))]}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(there: Callable[[], Any], here: Callable[[], Any], repeats: int, count: int) -> dict[str, Any]:
    """Time two calls alternately; returns times per token or request, and the median of what each pair differs by."""
    pairs = [(timed(there) / count, timed(here) / count) for _ in range(repeats + 2)][2:]
    return {
        "socket": quantiles([first for first, _ in pairs]),
        "in_process": quantiles([second for _, second in pairs]),
        "added": quantiles([first - second for first, second in pairs]),
    }


def measure_requests(client: Any, engine: Any, repeats: int) -> dict[str, Any]:
    """One-token requests, through the socket and in this process."""
    fields: dict[str, Any] = {"max_new_tokens": 1, "seed": 0}
    return in_turn(lambda: client.generate(PROMPT, **fields), lambda: engine.generate(PROMPT, **fields), repeats, 1)


def measure_stream(client: Any, engine: Any, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Streams of a batch, through the socket and in this process: time per token."""
    prompts, fields = [PROMPT] * batch, {"max_new_tokens": tokens, "ignore_eos": True, "seed": 0}
    row = in_turn(
        lambda: list(client.stream(prompts, **fields)),
        lambda: list(engine.stream(prompts, **fields)),
        repeats,
        batch * tokens,
    )
    return {"batch": batch, "tokens": tokens, **row}


def measure_streaming(client: Any, tokens: int, repeats: int) -> dict[str, Any]:
    """One stream, and the same request without streaming, in turn, on one server: what sending a token adds to it.

    The client's time from token to token, less the server's without streaming; medians of each.
    """
    fields: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True, "seed": 0}
    added = []
    for _ in range(repeats + 2):
        whole = client.generate(PROMPT, **fields).timing.tpot_p50
        times = [time.perf_counter() for _ in client.stream(PROMPT, **fields)]
        seen = statistics.median(b - a for a, b in itertools.pairwise(times))
        added.append(seen - whole)
    return quantiles(added[2:])


def measure_clock(client: hybridgen.Client, batch: int, tokens: int) -> dict[str, Any]:
    """From the making of a token in the server to its event in the client."""
    delays = []
    for event in client.stream([[1]] * batch, max_new_tokens=tokens):
        delays.append(time.perf_counter() - float(event.text))
    return {"batch": batch, "delivery": quantiles(delays)}


def measure_throughput(client: hybridgen.Client, batch: int, tokens: int) -> dict[str, Any]:
    """A model that takes no time: what a token costs when only the socket limits."""
    seconds = timed(lambda: list(client.stream([[1]] * batch, max_new_tokens=tokens)))
    return {"batch": batch, "per_token_us": 1e6 * seconds / (batch * tokens)}


def show(name: str, rows: dict[str, Any]) -> None:
    """Print a table."""
    print(f"server and client: {name}")
    print(f"{'':32} {'in process':>12} {'socket':>12} {'added':>8}   (us, medians)")
    request = rows["request"]
    print(
        f"{'request of one token':32} {request['in_process']['p50_us']:12.1f} {request['socket']['p50_us']:12.1f} "
        f"{request['added']['p50_us']:8.1f}"
    )
    for row in rows["stream"]:
        print(
            f"{'streamed token, batch ' + str(row['batch']):32} {row['in_process']['p50_us']:12.1f} "
            f"{row['socket']['p50_us']:12.1f} {row['added']['p50_us']:8.1f}"
        )
    print(f"{'streamed or not, batch 1':32} {'':12} {'':12} {rows['streaming']['p50_us']:8.1f}")
    for row in rows["delivery"]:
        print(f"{'from server to client, batch ' + str(row['batch']):32} {'':12} {row['delivery']['p50_us']:12.1f}")
    for row in rows["throughput"]:
        print(f"{'no model, batch ' + str(row['batch']):32} {'':12} {row['per_token_us']:12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="few repeats")
    arguments = parser.parse_args()
    small = arguments.smoke
    batches = (1, 8) if small else (1, 8, 32)
    results: dict[str, Any] = {"cores": len(CORES)}
    # Where the system may put both on one core, a client that is woken takes time from the server there; the rows with
    # a core for each tell what the socket costs without that.
    places: list[tuple[str, tuple[Any, Any]]] = [("own cores", (0, 1)), ("anywhere", (None, None))]
    for name, cores in places[:1] if small else places:
        pin(cores[1])
        rows = results[name] = {}
        with server(run_engine, cores[0]) as client, hybridgen.Engine.load(**ENGINE) as engine:
            rows["request"] = measure_requests(client, engine, 5 if small else 300)
            rows["stream"] = [
                measure_stream(client, engine, batch, 20 if small else 60, 1 if small else 25) for batch in batches
            ]
            rows["streaming"] = measure_streaming(client, 20 if small else 60, 1 if small else 40)
        with server(run_clock, cores[0], 0.002) as client:
            rows["delivery"] = [measure_clock(client, batch, 20 if small else 1000) for batch in batches]
        with server(run_clock, cores[0], 0.0) as client:
            rows["throughput"] = [measure_throughput(client, batch, 100 if small else 5000) for batch in batches]
        show(name, rows)
    pin(None)
    report(results, arguments.output)


if __name__ == "__main__":
    main()
