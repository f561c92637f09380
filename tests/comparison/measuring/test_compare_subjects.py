"""Steps counted by the graphs that ran them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from hybridgen.comparison.measuring.subjects import GraphUse


def snapshot(steps: dict[tuple[str, str, str], int], rows: list[tuple[str, bool, int]]) -> Any:
    graphs = [
        SimpleNamespace(phase=phase, tokens=4, rows=4, sampling="greedy", owner="cuda graph", lazy=lazy, hits=hits)
        for phase, lazy, hits in rows
    ]
    return SimpleNamespace(steps=steps, graphs=SimpleNamespace(graphs=graphs))


def test_steps_are_sorted_by_the_graph_that_ran_them() -> None:
    before = snapshot({("decode", "cuda graph", "bucket 4"): 10}, [("decode", False, 10), ("prefill", True, 1)])
    after = snapshot(
        {
            ("decode", "cuda graph", "bucket 4"): 25,
            ("prefill", "cuda graph", "padded to bucket 16"): 3,
            ("prefill", "compiled", "above the largest bucket, 512"): 2,
        },
        [("decode", False, 25), ("prefill", True, 4)],
    )
    use = GraphUse()
    use.add(before, after)
    assert (use.pre_captured, use.lazy, use.padded, use.none) == (15, 3, 3, 2)
    assert use.reasons == Counter(
        {
            "decode, cuda graph: bucket 4": 15,
            "prefill, cuda graph: padded to bucket 16": 3,
            "prefill, compiled: above the largest bucket, 512": 2,
        }
    )
