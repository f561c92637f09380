"""What does a decode step cost the host in mode `hybrid`, and how steady is its replay?

The batch stays the same: requests that are past their prompt and far from their limit. Random weights, greedy.

- host: `StepLoop.step()` less what it waits in the step's event, over single steps. In a second pass its parts:
  scheduling, the launch (a replay and what is around it), reading the tokens, and the rest, which is bookkeeping.
- wall: time from one step's end to the next one's, with run-ahead.
- replay: the recorded step alone, replayed back to back on the batch's state; device time between the ends of two
  (CUDA events), and the host's time for the call. The state is put back every 100 replays, so contexts stay alike.
- calls: what `torch.profiler` sees of the CUDA runtime in these steps, per step.

    python benchmarks/replay.py [--output results.json]
    python benchmarks/replay.py --smoke          # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import (
    how_it_ran,
    quantiles,
    random_model,
    random_prompts,
    report,
    shape_dtype,
    synchronize,
    this_device,
    timing,
)
from torch.profiler import ProfilerActivity, profile, record_function

import hybridgen
from hybridgen.cache import SlotState
from hybridgen.execution.stream import on_its_stream
from hybridgen.graphs.key import GraphKey
from hybridgen.sampling import SamplerPlan

WARM_UP = 50
REPLAYS_PER_STATE = 100
PROFILED = 20
RANGE = "steady state"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Steady:
    """A batch in the steady state, to be stepped."""

    def __init__(self, engine: hybridgen.Engine, prompts: list[list[int]], new: int) -> None:
        self.engine = engine
        self.loop: Any = engine._loop
        self.runner: Any = engine._runner
        self.batch = len(prompts)
        fields = {"max_new_tokens": new, "ignore_eos": True, "temperature": 0}
        self.requests = engine.make_requests(prompts, None, fields)
        self.loop.submit(self.requests)
        for _ in range(WARM_UP):
            self.loop.step()

    def step_seconds(self, steps: int) -> tuple[list[float], list[float]]:
        """Of each step: the time inside it, and from the end of the one before to its own."""
        inside, between = [], []
        step, clock = self.loop.step, time.perf_counter
        last = clock()
        for _ in range(steps):
            start = clock()
            step()
            end = clock()
            inside.append(end - start)
            between.append(end - last)
            last = end
        return inside, between

    def end(self) -> None:
        """Cancel the requests, and check that they ran to here."""
        alive = [request for request in self.requests if request.completion is None]
        self.loop.cancel(self.requests)
        if len(alive) < self.batch:
            raise SystemExit("a request ended while it was measured: not the steady state")


def host_times(steady: Steady, steps: int) -> dict[str, Any]:
    """Host time of single steps, and its parts."""
    ring, runner, loop = steady.runner.ring, steady.runner, steady.loop
    with timing(ring, "wait") as waits:
        inside, between = steady.step_seconds(steps)
    host = [step - wait for step, wait in zip(inside, waits, strict=True)]
    with ExitStack() as stack:
        parts = {
            "wait": stack.enter_context(timing(ring, "wait")),
            "read": stack.enter_context(timing(ring, "read")),
            "launch": stack.enter_context(timing(runner, "decode")),
            "schedule": stack.enter_context(timing(loop.scheduler, "schedule")),
        }
        split, _ = steady.step_seconds(steps)
    rest = [total - sum(each) for total, *each in zip(split, *parts.values(), strict=True)]
    return {
        "host": quantiles(host),
        "wait": quantiles(waits),
        "wall": quantiles(between),
        "parts": {**{name: quantiles(times) for name, times in parts.items()}, "bookkeeping": quantiles(rest)},
    }


@torch.inference_mode()
def replay_times(steady: Steady, count: int, device: str) -> dict[str, Any]:
    """Replays of the batch's recorded step, back to back."""
    runner = steady.runner
    route = runner.router.route(GraphKey.decode(steady.batch, SamplerPlan()))
    if route.recording is None:
        raise SystemExit(f"no graph runs a batch of {steady.batch}: {route.reason}")
    replay = route.recording.recorded.replay
    table, saved = runner.state.table, runner.state.table.clone()
    calls: list[float] = []
    ends: list[float] = []
    clock = time.perf_counter
    for _ in range(-(-count // (REPLAYS_PER_STATE - 1))):
        synchronize(device)
        table.copy_(saved)
        if device == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS_PER_STATE + 1)]
            events[0].record()
            for event in events[1:]:
                start = clock()
                replay()
                calls.append(clock() - start)
                event.record()
            events[-1].synchronize()
            pairs = pairwise(events[1:])  # what the first waits for is its launch, not a step
            ends += [before.elapsed_time(after) / 1e3 for before, after in pairs]
        else:
            for _ in range(REPLAYS_PER_STATE):
                start = clock()
                replay()
                calls.append(clock() - start)
            ends = calls
    table.copy_(saved)
    runner.ring.resynchronize()
    synchronize(device)
    return {"route": route.reason, "owner": route.kind, "device": quantiles(ends), "call": quantiles(calls)}


def differing_repeats(engine: hybridgen.Engine, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """How many of so many replays of one decode step leave other bits than the first: in logits or tokens, and in the
    states by slot of its rows. All that the step changes is put back before each."""
    steady = Steady(engine, prompts, WARM_UP + 20)
    try:
        return _differing_repeats(steady.runner, steady.batch, count)
    finally:
        leave(steady)


@on_its_stream
def _differing_repeats(runner: Any, batch: int, count: int) -> dict[str, Any]:
    route = runner.router.route(GraphKey.decode(batch, SamplerPlan()))
    if route.recording is None:
        raise SystemExit(f"no graph runs a batch of {batch}: {route.reason}")
    states = [state for state in runner.states if isinstance(state, SlotState)]
    slots = runner.steps.inputs().slots[:batch]
    places = [(state, torch.cat(state.places(slots))) for state in states]  # those that are read, too
    mutable = runner.steps.mutable()
    before = [tensor.clone() for tensor in mutable]

    def left_behind() -> list[torch.Tensor]:
        for tensor, value in zip(mutable, before, strict=True):
            tensor.copy_(value)
        route.recording.recorded.replay()
        pools = [(tensor, at) for state, at in places for mixer in state.mixers for tensor in mixer]
        kept = [tensor.index_select(0, at) for tensor, at in pools if tensor is not None]
        return [tensor.view(_BITS[tensor.element_size()]) for tensor in (*mutable, *kept)]

    first = [tensor.clone() for tensor in left_behind()]
    different = torch.zeros((), dtype=torch.int64, device=slots.device)
    for _ in range(count):
        found = [(ours != theirs).any() for ours, theirs in zip(left_behind(), first, strict=True)]
        different += torch.stack(found).any()
    for tensor, value in zip(mutable, before, strict=True):
        tensor.copy_(value)
    runner.ring.resynchronize()
    compared = sum(tensor.numel() * tensor.element_size() for tensor in first)
    return {"repeats": count, "repeats_that_differ": int(different), "compared_bytes": compared}


def runtime_calls(steady: Steady, device: str) -> dict[str, Any]:
    """Calls of the CUDA runtime and work on the device, per step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler, record_function(RANGE):
        for _ in range(PROFILED):
            steady.loop.step()
    events = list(profiler.events() or ())
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    window = next(event.time_range for event in on_host if event.name == RANGE)
    calls = Counter(
        event.name
        for event in on_host
        if event.name.startswith("cu") and window.start <= event.time_range.start <= window.end
    )
    work = Counter(
        event.name if event.name.startswith("Mem") else "kernels"
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name != RANGE
    )
    waits = sum(calls[name] for name in ("cudaDeviceSynchronize", "cudaStreamSynchronize"))
    return {
        "steps": PROFILED,
        "runtime_calls": {name: count / PROFILED for name, count in calls.most_common()},
        "device_work": {name: count / PROFILED for name, count in work.most_common()},
        "copies_to_device": sum(count for name, count in work.items() if "HtoD" in name) / PROFILED,
        "device_or_stream_waits": waits / PROFILED,
    }


def measure(engine: hybridgen.Engine, batch: int, prompt: int, steps: int, replays: int, device: str) -> dict[str, Any]:
    new = WARM_UP + 2 * steps + 2 * PROFILED + REPLAYS_PER_STATE + 10
    prompts = random_prompts(batch, prompt, engine.checkpoint.vocab_size, batch)
    steady = Steady(engine, prompts, new)
    row = {"batch": batch, "prompt": prompt, "steps": steps, **host_times(steady, steps)}
    row["replay"] = replay_times(steady, replays, device)
    show_times(row)
    leave(steady)
    return row


def leave(steady: Steady) -> None:
    steady.end()
    steady.engine.generate([[5, 6, 7]], max_new_tokens=1)  # reads what was in flight


def trace(engine: hybridgen.Engine, row: dict[str, Any], device: str) -> None:
    """Count runtime calls. After all times were taken: once the profiler has run, a graph's launch takes ten times as
    long in that process."""
    prompts = random_prompts(row["batch"], row["prompt"], engine.checkpoint.vocab_size, row["batch"])
    steady = Steady(engine, prompts, WARM_UP + 2 * PROFILED + 10)
    row["profile"] = runtime_calls(steady, device)
    show_calls(row)
    leave(steady)


def show_times(row: dict[str, Any]) -> None:
    def line(name: str, times: dict[str, float]) -> None:
        print(
            f"{row['batch']:>5} {name:<22} {times['p50_us']:9.1f} {times['p99_us']:9.1f} {times['max_us']:9.1f}",
            flush=True,
        )

    line("host", row["host"])
    for name in ("schedule", "launch", "read", "bookkeeping"):
        line(f"  {name}", row["parts"][name])
    line("wait", row["wait"])
    line("wall", row["wall"])
    line("replay on the device", row["replay"]["device"])
    line("replay's call", row["replay"]["call"])


def show_calls(row: dict[str, Any]) -> None:
    profile_ = row["profile"]
    if not profile_["runtime_calls"]:
        print(f"{row['batch']:>5} the profiler saw no CUDA call", flush=True)
        return
    calls = ", ".join(f"{count:g} {name}" for name, count in profile_["runtime_calls"].items())
    print(f"{row['batch']:>5} per step: {calls}", flush=True)
    print(
        f"{row['batch']:>5} per step: {profile_['copies_to_device']:g} copies to the device, "
        f"{profile_['device_or_stream_waits']:g} waits for the device or a stream",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of common.shape_config")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--mode", default="hybrid", help="hybrid or graph")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    device = this_device()
    name, batches, steps, replays = arguments.model, arguments.batches, arguments.steps, arguments.replays
    options: dict[str, Any] = {"max_context": 4096}
    if arguments.smoke:
        name, batches, steps, replays = "tiny", [1, 2], 10, 100
        options = {"max_context": 1024, "compile_backend": "eager", "run_ahead": 1}
    model = random_model(name, shape_dtype(name, device), device)
    print(f"{'batch':>5} {'us':<22} {'p50':>9} {'p99':>9} {'largest':>9}")
    rows = []
    with hybridgen.Engine.load(
        model, mode=arguments.mode, max_batch=max(batches), decode_buckets=batches, prefill_buckets=[], **options
    ) as engine:
        for batch in batches:
            rows.append(measure(engine, batch, arguments.prompt, steps, replays, device))
        for row in rows:
            trace(engine, row, device)
        ran = how_it_ran(engine)
    result = {"benchmark": "replay", "model": name, "mode": arguments.mode, "rows": rows, "engine": ran}
    report(result, arguments.output)


if __name__ == "__main__":
    main()
