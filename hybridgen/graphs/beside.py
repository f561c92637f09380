"""What cuBLAS clears before its products, done beside the kernels that come before.

Most products of cuBLAS 13 on a Hopper GPU are two nodes of a CUDA graph: a memset of a few counters in its workspace,
and the kernel. In a graph that was captured from one stream the memset waits for the kernel before it, and the product
for the memset: 3 us and more for each product, in decode steps whose products take 10 to 60. The workspace is used by
products alone, so the memset has to wait for the product before it and for nothing else. Its edges are changed so
before the graph is instantiated; kernels and their order stay.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

KERNEL, MEMSET = 0, 2
"""Of `CUgraphNodeType`."""
_MOST_BYTES = 2**16
"""Of counters; a larger memset is another thing."""
_PRODUCTS = ("nvjet", "cublas", "cutlass", "gemm", "gemv", "splitk", "xmma", "dot_kernel")
"""Parts of the names of kernels that may use cuBLAS's workspace."""
_OTHERS = ("triton_", "at::native")
"""Parts of the names of kernels that never do: Inductor's and PyTorch's own."""


class Node(NamedTuple):
    """A node of a graph."""

    kind: int
    name: str = ""
    """Of a kernel."""
    target: int = 0
    """Where a memset writes."""
    bytes: int = 0


class Edge(NamedTuple):
    """One node waits for another."""

    before: int
    after: int
    data: bytes = bytes(8)
    """All zero: for its end. Others are of kernels that start early."""


class Changes(NamedTuple):
    """What is changed of a graph's edges."""

    removed: tuple[Edge, ...]
    added: tuple[Edge, ...]


def plan(nodes: Mapping[int, Node], edges: Iterable[Edge], own: Iterable[str] = ()) -> Changes:
    """Which edges to change, so that memsets of cuBLAS's workspace run beside the kernels between two products.

    Args:
        own: names of further kernels that never use the workspace.
    """
    names = frozenset(own)
    before: dict[int, list[Edge]] = defaultdict(list)
    after: dict[int, list[Edge]] = defaultdict(list)
    for edge in edges:
        before[edge.after].append(edge)
        after[edge.before].append(edge)

    def passes(node: int) -> bool:
        """Whether a memset of the workspace may run beside it: one kernel in a row, none of cuBLAS's."""
        found = nodes[node]
        known = found.name in names or any(part in found.name for part in _OTHERS)
        alone = len(before[node]) <= 1 and len(after[node]) == 1
        return found.kind == KERNEL and known and not _is_product(found) and alone

    removed, added = [], []
    targets: dict[int, int] = defaultdict(int)
    for node in nodes.values():
        if node.kind == MEMSET:
            targets[node.target] += 1
    for memset, node in nodes.items():
        if node.kind != MEMSET or not 0 < node.bytes <= _MOST_BYTES or targets[node.target] < 2:
            continue
        if len(before[memset]) != 1 or len(after[memset]) != 1:
            continue
        waits, leads = before[memset][0], after[memset][0]
        product = leads.after
        if any(waits.data) or any(leads.data) or len(before[product]) != 1 or not _is_product(nodes[product]):
            continue
        last: int | None = waits.before
        while last is not None and passes(last):
            last = before[last][0].before if before[last] else None
        if last == waits.before:
            continue
        removed.append(waits)
        added.append(Edge(waits.before, product))
        if last is not None:
            added.append(Edge(last, memset))
    return Changes(tuple(removed), tuple(added))


def _is_product(node: Node) -> bool:
    name = node.name.lower()
    return node.kind == KERNEL and any(part in name for part in _PRODUCTS)


class _MemsetParams(ctypes.Structure):
    _fields_ = (
        ("dst", ctypes.c_uint64),
        ("pitch", ctypes.c_size_t),
        ("value", ctypes.c_uint),
        ("element", ctypes.c_uint),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _KernelParams(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p),
        ("sizes", ctypes.c_uint * 7),
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *args: Any) -> None:
    status = getattr(_driver(), name)(*args)
    if status != 0:
        raise RuntimeError(f"{name} returned {status}")


def read(graph: int) -> tuple[dict[int, Node], list[Edge]]:
    """The nodes and edges of a `cudaGraph_t`.

    Raises:
        RuntimeError: the driver refuses.
        AttributeError: it is older than the calls that this takes (CUDA 12.3).
        OSError: there is none.
    """
    handle, count = ctypes.c_void_p(graph), ctypes.c_size_t()
    _call("cuGraphGetNodes", handle, None, ctypes.byref(count))
    found = (ctypes.c_void_p * count.value)()
    _call("cuGraphGetNodes", handle, found, ctypes.byref(count))
    nodes = {int(node or 0): _node(int(node or 0)) for node in found}
    _call("cuGraphGetEdges_v2", handle, None, None, None, ctypes.byref(count))
    if not count.value:
        return nodes, []
    ends = [(ctypes.c_void_p * count.value)() for _ in range(2)]
    data = ctypes.create_string_buffer(8 * count.value)
    _call("cuGraphGetEdges_v2", handle, *ends, data, ctypes.byref(count))
    edges = [
        Edge(int(ends[0][i] or 0), int(ends[1][i] or 0), data.raw[8 * i : 8 * i + 8]) for i in range(count.value)
    ]
    return nodes, edges


def _node(node: int) -> Node:
    handle, kind = ctypes.c_void_p(node), ctypes.c_int()
    _call("cuGraphNodeGetType", handle, ctypes.byref(kind))
    if kind.value == MEMSET:
        memset = _MemsetParams()
        _call("cuGraphMemsetNodeGetParams", handle, ctypes.byref(memset))
        size = memset.element * memset.width * max(1, memset.height)
        return Node(MEMSET, target=memset.dst, bytes=size)
    if kind.value != KERNEL:
        return Node(kind.value)
    kernel, name = _KernelParams(), ctypes.c_char_p()
    _call("cuGraphKernelNodeGetParams_v2", handle, ctypes.byref(kernel))
    if kernel.function:
        _call("cuFuncGetName", ctypes.byref(name), ctypes.c_void_p(kernel.function))
    else:
        _call("cuKernelGetName", ctypes.byref(name), ctypes.c_void_p(kernel.kernel))
    return Node(KERNEL, (name.value or b"").decode(errors="replace"))


def _change(name: str, graph: int, edges: Sequence[Edge]) -> None:
    ends = [(ctypes.c_void_p * len(edges))(*column) for column in zip(*(edge[:2] for edge in edges), strict=True)]
    data = ctypes.create_string_buffer(b"".join(edge.data for edge in edges), 8 * len(edges))
    _call(name, ctypes.c_void_p(graph), *ends, data, ctypes.c_size_t(len(edges)))


def move_memsets(graph: int, own: Iterable[str] = ()) -> int:
    """Change a `cudaGraph_t` that is not instantiated yet; returns how many memsets run beside kernels now.

    Args:
        own: see `plan`.

    Raises:
        Exception: as `read()`; the graph may be half changed then, and is not to be used.
    """
    changes = plan(*read(graph), own)
    if not changes.removed:
        return 0
    _change("cuGraphRemoveDependencies_v2", graph, changes.removed)
    _change("cuGraphAddDependencies_v2", graph, changes.added)
    return len(changes.removed)
