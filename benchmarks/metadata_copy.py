"""What does it cost to bring a step's metadata up to date: with a torch copy each, or with one launch?

Copies of int32 between tensors of the device, made beforehand, views included. The first case is a decode step of
batch 32: five vectors, a vector from its second element on, and 32 x 2048 page ids into a wider page table. Medians:

- launch: host time of a call while the device's queue has room, over 30 calls.
- synchronised: of a call and a wait for the device.
- stream: time per call of 1000 calls and a wait for the device.
- graph: device time per call of 200 calls in a CUDA graph, by events around a replay. The data stays in the L2 cache,
  and on compute capability 9 a call's launch overlaps with the end of the one before.

    python benchmarks/metadata_copy.py [--output results.json]
    python benchmarks/metadata_copy.py --smoke          # on the CPU: checks the script
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from common import report, synchronize
from torch import Tensor

from hybridgen.device.timing import graph_seconds
from hybridgen.kernels.step import metadata
from hybridgen.kernels.step.metadata import MetadataCopy, copy_metadata

Call = Callable[[], None]
Row = dict[str, str | int | float | None]


class Case(NamedTuple):
    name: str
    sources: list[Tensor]
    destinations: list[Tensor]


def make_case(name: str, vectors: int, device: str, batch: int = 32, pages: int = 2048) -> Case:
    """So many vectors, a slice and a page table."""

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, 2**31 - 1, shape, dtype=torch.int32, device=device)

    pairs = [(ids(batch), ids(batch)) for _ in range(vectors)]
    pairs.append((ids(batch + 1)[1:], ids(batch + 1)[1:]))
    pairs.append((ids(batch, pages), ids(2 * batch, 2 * pages)[:batch, :pages]))
    return Case(name, [s for s, _ in pairs], [d for _, d in pairs])


def ways(case: Case) -> dict[str, Call]:
    """The ways to copy, by name."""
    sources, destinations = case.sources, case.destinations

    def copies() -> None:
        for source, destination in zip(sources, destinations, strict=True):
            destination.copy_(source)

    def foreach() -> None:
        torch._foreach_copy_(destinations, sources)

    def op() -> None:
        copy_metadata(sources, destinations)

    return {
        "torch copy_ each": copies,
        "torch._foreach_copy_": foreach,
        "copy_metadata": op,
        "MetadataCopy": MetadataCopy(zip(sources, destinations, strict=True)),
    }


def check(case: Case, call: Call) -> None:
    """Refuse to time what does not copy."""
    for destination in case.destinations:
        destination.zero_()
    call()
    for source, destination in zip(case.sources, case.destinations, strict=True):
        if not torch.equal(source, destination):
            raise SystemExit(f"{case.name}: wrong copies")


def launch_seconds(call: Call, device: str, repeats: int, calls: int = 30) -> float:
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def synchronised_seconds(call: Call, device: str, repeats: int, calls: int = 1) -> float:
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def measure(case: Case, device: str, repeats: int) -> list[Row]:
    rows: list[Row] = []
    for name, call in ways(case).items():
        check(case, call)
        rows.append(
            {
                "case": case.name,
                "pairs": len(case.sources),
                "way": name,
                "launch_us": launch_seconds(call, device, repeats) * 1e6,
                "synchronised_us": synchronised_seconds(call, device, 10 * repeats) * 1e6,
                "stream_us": synchronised_seconds(call, device, max(3, repeats // 10), 1000) * 1e6,
                "graph_us": graph_seconds(call, repeats, 200) * 1e6 if device == "cuda" else None,
            }
        )
    return rows


def table(rows: list[Row]) -> None:
    print(f"{'case':<8} {'way':<21} {'launch us':>10} {'synchronised us':>16} {'stream us':>10} {'graph us':>9}")
    for row in rows:
        graph = "-" if row["graph_us"] is None else f"{row['graph_us']:.2f}"
        print(
            f"{row['case']:<8} {row['way']:<21} {row['launch_us']:10.2f} {row['synchronised_us']:16.2f} "
            f"{row['stream_us']:10.2f} {graph:>9}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, few repeats")
    arguments = parser.parse_args()
    device = "cpu" if arguments.smoke else "cuda"
    rows = []
    for name, vectors in (("seven", 5), ("32", 30)):
        rows += measure(make_case(name, vectors, device), device, 2 if arguments.smoke else 100)
    table(rows)
    report({"benchmark": "metadata_copy", "fallbacks": metadata.fallbacks(), "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
