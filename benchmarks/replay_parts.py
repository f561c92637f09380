"""What does each way to prepare a replay cost, beside the way that it replaces?

The six optimisations of a replay design, each measured alone around one CUDA graph. The graph reads seven small inputs
(five vectors, a slice and a page table, as `metadata_copy.py`) and then works for about as long as a decode step of a
1B model (`--work-us`). Each row is one way to get new values into these inputs and replay, many times in a row:

- host: median time that a step keeps the host, its waits included, over single steps while the device's queue has room.
- step: wall time of `--rounds` steps with one wait at the end, over the rounds: what a steady decode loop sees.

1. side stream: copies on the replay's stream, against copies on a second one, for which the replay waits by an event.
   They may not overlap the replay before, which reads the same inputs, so they wait for its end. `unguarded` leaves
   that wait out: it can give wrong values, and is timed to show what there was to win.
2. fused copies: a `copy_` for each input, against one launch (`MetadataCopy`), and against a node of the graph.
3. constants: seven copies and one of `[0, 1, 2, ...]`, against the seven.
4. context manager: a replay inside `inference_mode()`, a stream's context and one that sets a global, against none.
5. double buffer: one pinned block, filled when its copy has ended, against two in turn. The other half of overlapping
   preparation, `run_ahead`, needs a whole engine: `ablation.py` has both switches.
6. batched updates: a pinned tensor and a copy to the device for each input, against one pinned block (`StagedBlock`).

In the engine a steady batch does none of it, because the state advances on the device: that is `replay only`.

    python benchmarks/replay_parts.py --output benchmarks/results/preparation-h200.json
    python benchmarks/replay_parts.py --smoke          # on the CPU: checks the script
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import report, synchronize, this_device
from metadata_copy import make_case
from torch import Tensor

from hybridgen.execution.staging import StagedBlock
from hybridgen.kernels.step.metadata import MetadataCopy, copy_metadata

Call = Callable[[], object]


class Way(NamedTuple):
    """One way to do a part."""

    part: str
    name: str
    step: Call
    right: bool = True
    """Whether the step is sure to read the values of its own round."""


class Work:
    """The inputs of a step, what is copied into them, and the step as something to replay."""

    def __init__(self, device: str, work_us: float, batch: int, pages: int) -> None:
        self.device = device
        self.case = make_case("seven", 5, device, batch, pages)
        self.sources, self.inputs = self.case.sources, self.case.destinations
        self.constant = torch.arange(batch, dtype=torch.int32, device=device)
        self.sum = torch.zeros((), dtype=torch.int64, device=device)
        size = 1024 if device == "cuda" else 16
        self._matrix = torch.ones(size, size, device=device) / size
        self._count = 1
        if device == "cuda":
            once = self._seconds(self.work)
            self._count = max(1, round(work_us / 1e6 / once))
        self.replay = self._recorded(self.run)
        """The step on its inputs as they are."""
        self.replay_with_copies = self._recorded(self._copy_and_run)
        """The step, whose first node brings the inputs in."""

    def work(self) -> None:
        for _ in range(self._count):
            torch.mm(self._matrix, self._matrix)

    def run(self) -> None:
        """Read all inputs, then work."""
        self.sum.copy_(sum((each.sum(dtype=torch.int64) for each in self.inputs), torch.zeros_like(self.sum)))
        self.work()

    def _copy_and_run(self) -> None:
        copy_metadata(self.sources, self.inputs)
        self.run()

    def _seconds(self, call: Call) -> float:
        times = []
        for _ in range(20):
            synchronize(self.device)
            start = time.perf_counter()
            call()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _recorded(self, step: Call) -> Call:
        step()
        step()
        synchronize(self.device)
        if self.device != "cuda":
            return step
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        synchronize(self.device)
        return graph.replay


@contextmanager
def batch_in_context(owner: dict[str, object]) -> Iterator[None]:
    """Sets a global for the time of a step, as `forward_batch()` of the design does."""
    before = owner.get("batch")
    owner["batch"] = object()
    try:
        yield
    finally:
        owner["batch"] = before


def ways_of(work: Work) -> list[Way]:
    """Every way, by part."""
    return [*_copies(work), *_side_stream(work), *_contexts(work), *_staged(work)]


def _each(pairs: list[tuple[Tensor, Tensor]], replay: Call) -> Call:
    def step() -> None:
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
        replay()

    return step


def _copies(work: Work) -> list[Way]:
    pairs = list(zip(work.sources, work.inputs, strict=True))
    copy = MetadataCopy(pairs)
    constant = torch.empty_like(work.constant)

    def one_launch() -> None:
        copy()
        work.replay()

    return [
        Way("0 steady batch", "replay only", work.replay, False),
        Way("2 fused copies", "a copy_ for each of 7", _each(pairs, work.replay)),
        Way("2 fused copies", "MetadataCopy, one launch", one_launch),
        Way("2 fused copies", "a node of the graph", work.replay_with_copies),
        Way("3 constants", "7 copies and a constant", _each([*pairs, (work.constant, constant)], work.replay)),
        Way("3 constants", "7 copies", _each(pairs, work.replay)),
    ]


def _side_stream(work: Work) -> list[Way]:
    pairs = list(zip(work.sources, work.inputs, strict=True))
    if work.device != "cuda":
        return [Way("1 side stream", "guarded", _each(pairs, work.replay))]
    side = torch.cuda.Stream()
    copied, replayed = torch.cuda.Event(), torch.cuda.Event()

    def on_side(guarded: bool) -> Call:
        def step() -> None:
            main = torch.cuda.current_stream()
            with torch.cuda.stream(side):
                if guarded:  # the replay before reads what is written here
                    side.wait_event(replayed)
                for source, target in pairs:
                    target.copy_(source, non_blocking=True)
                copied.record(side)
            main.wait_event(copied)
            work.replay()
            replayed.record(main)

        return step

    return [
        Way("1 side stream", "on the replay's stream", _each(pairs, work.replay)),
        Way("1 side stream", "guarded", on_side(True)),
        Way("1 side stream", "unguarded", on_side(False), False),
    ]


def _contexts(work: Work) -> list[Way]:
    owner: dict[str, object] = {}
    stream = torch.cuda.Stream() if work.device == "cuda" else None

    def inside() -> None:
        with (
            torch.inference_mode(),
            nullcontext() if stream is None else torch.cuda.stream(stream),
            batch_in_context(owner),
        ):
            work.replay_with_copies()

    def global_only() -> None:
        with batch_in_context(owner):
            work.replay_with_copies()

    return [
        Way("4 context manager", "inference mode, stream and batch", inside),
        Way("4 context manager", "batch alone", global_only),
        Way("4 context manager", "none", work.replay_with_copies),
    ]


def _staged(work: Work) -> list[Way]:
    pinned = work.device == "cuda"
    hosts = [torch.zeros(t.shape, dtype=t.dtype, pin_memory=pinned) for t in work.sources]
    values = [source.cpu().numpy().copy() for source in work.sources]
    done = torch.cuda.Event() if pinned else None
    fields = {f"f{i}": (t.dtype, tuple(t.shape)) for i, t in enumerate(work.sources)}

    def separately() -> None:
        if done is not None:
            done.synchronize()  # the copies of the round before still read these
        for host, value, target in zip(hosts, values, work.inputs, strict=True):
            host.numpy()[...] = value
            target.copy_(host, non_blocking=True)
        if done is not None:
            done.record()
        work.replay()

    def in_a_block(buffers: int) -> Call:
        block = StagedBlock(fields, torch.device(work.device), buffers=buffers)
        copy = MetadataCopy([(block.device[f"f{i}"], target) for i, target in enumerate(work.inputs)])

        def step() -> None:
            arrays = block.open()
            for i, value in enumerate(values):
                arrays[f"f{i}"][...] = value
            block.send()
            copy()
            work.replay()

        return step

    one, two = in_a_block(1), in_a_block(2)
    return [
        Way("6 batched updates", "a pinned copy for each of 7", separately),
        Way("6 batched updates", "one block", one),
        Way("5 double buffer", "one block", one),
        Way("5 double buffer", "two blocks in turn", two),
    ]


def check(work: Work, way: Way) -> None:
    """Refuse to time a way that does not bring in the values of its round."""
    if not way.right:
        return
    for target in work.inputs:
        target.zero_()
    way.step()
    synchronize(work.device)
    expected = sum(int(source.sum(dtype=torch.int64)) for source in work.sources)
    if int(work.sum) != expected:
        raise SystemExit(f"{way.part}, {way.name}: the step read {int(work.sum)}, not {expected}")


def measure(work: Work, way: Way, rounds: int, repeats: int) -> dict[str, Any]:
    check(work, way)
    hosts: list[float] = []
    walls: list[float] = []
    clock = time.perf_counter
    for repeat in range(repeats + 1):
        synchronize(work.device)
        begun = clock()
        for _ in range(rounds):
            way.step()
        synchronize(work.device)
        if repeat:
            walls.append((clock() - begun) / rounds)
        # Few steps in a row after a wait: the queue has room, so that the host never waits for it.
        for _ in range(8):
            start = clock()
            way.step()
            hosts.append(clock() - start)
        synchronize(work.device)
    row = {"part": way.part, "way": way.name, "right": way.right}
    row |= {"host_us": statistics.median(hosts) * 1e6, "step_us": statistics.median(walls) * 1e6}
    print(f"{way.part:<18} {way.name:<34} {row['host_us']:9.2f} {row['step_us']:9.2f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-us", type=float, default=600.0, help="how long the graph works, about")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a few rounds, anywhere")
    arguments = parser.parse_args()
    device = this_device()
    rounds, repeats, batch, pages = arguments.rounds, arguments.repeats, 32, 2048
    if arguments.smoke:
        rounds, repeats, batch, pages = 2, 1, 2, 4
    work = Work(device, arguments.work_us, batch, pages)
    print(f"{'part':<18} {'way':<34} {'host us':>9} {'step us':>9}", flush=True)
    rows = [measure(work, way, rounds, repeats) for way in ways_of(work)]
    report(
        {"benchmark": "replay_parts", "work_us": arguments.work_us, "rounds": rounds, "rows": rows}, arguments.output
    )


if __name__ == "__main__":
    main()
