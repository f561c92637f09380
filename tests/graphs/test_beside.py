"""Which memsets of a captured graph run beside kernels, and after what."""

from __future__ import annotations

import pytest

from hybridgen.graphs.beside import KERNEL, MEMSET, Edge, Node, plan

COUNTERS = {"target": 4096, "bytes": 64}


def chain(*names: str) -> tuple[dict[int, Node], list[Edge]]:
    """Nodes 1, 2, ... each waiting for the one before; `memset` is one of cuBLAS's counters."""
    nodes = {
        i: Node(MEMSET, **COUNTERS) if name == "memset" else Node(KERNEL, name) for i, name in enumerate(names, start=1)
    }
    return nodes, [Edge(i, i + 1) for i in range(1, len(names))]


def test_a_memset_waits_for_the_product_before_and_the_next_one_for_both() -> None:
    nodes, edges = chain("memset", "nvjet_a", "triton_poi_add", "rows", "memset", "nvjet_b")
    changes = plan(nodes, edges, own={"rows"})
    assert changes.removed == (Edge(4, 5),)
    assert set(changes.added) == {Edge(4, 6), Edge(2, 5)}


def test_the_first_memset_waits_for_nothing() -> None:
    nodes, edges = chain("triton_red_norm", "memset", "nvjet_a", "triton_poi_add", "memset", "nvjet_b")
    changes = plan(nodes, edges)
    assert changes.removed == (Edge(1, 2), Edge(4, 5))
    assert set(changes.added) == {Edge(1, 3), Edge(4, 6), Edge(3, 5)}


def test_torch_kernels_pass_and_unknown_ones_do_not() -> None:
    nodes, edges = chain("nvjet", "unknown", "void at::native::add", "memset", "nvjet", "mystery", "memset", "nvjet")
    changes = plan(nodes, edges)
    assert changes.removed == (Edge(3, 4),)
    assert set(changes.added) == {Edge(3, 5), Edge(2, 4)}


@pytest.mark.parametrize(
    "names",
    [
        ("nvjet", "memset", "nvjet", "memset", "nvjet"),  # nothing is between
        ("nvjet", "triton_a", "memset", "triton_b", "memset", "triton_c"),  # no product's counters
        ("nvjet", "triton_a", "memset", "nvjet"),  # one alone: it may be anything
        ("cublasLt::splitKreduce", "memset", "nvjet", "cublasLt::splitKreduce", "memset", "nvjet"),
    ],
)
def test_what_is_left_as_it_is(names: tuple[str, ...]) -> None:
    assert plan(*chain(*names)).removed == ()


def test_kernels_that_start_early_and_branches_are_left() -> None:
    nodes, edges = chain("nvjet", "triton_a", "memset", "nvjet", "triton_b", "memset", "nvjet")
    early = [edge._replace(data=b"\0\0\1" + bytes(5)) if edge == Edge(2, 3) else edge for edge in edges]
    assert plan(nodes, early).removed == (Edge(5, 6),)
    nodes[8] = Node(KERNEL, "triton_c")
    assert plan(nodes, [*edges, Edge(5, 8)]).removed == (Edge(2, 3),)
    assert plan(nodes, [*edges, Edge(1, 7)]).removed == (Edge(2, 3),)


def test_large_memsets_are_other_ones() -> None:
    nodes, edges = chain("nvjet", "triton_a", "memset", "nvjet", "triton_b", "memset", "nvjet")
    nodes[3] = nodes[3]._replace(bytes=2**20)
    assert plan(nodes, edges).removed == (Edge(5, 6),)
