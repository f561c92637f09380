"""The parts of `parallel.py` that need no engine: sums over ranks, and the persistent kernels on ranks' shares."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from parts import Part

from hybridgen.device.timing import graph_seconds
from hybridgen.errors import described
from hybridgen.parallel.group import Group

SHAPE, LARGE = "llama-3.1-8b", "llama-3.1-70b"
SIZES = [8 * 2**10, 16 * 2**10, 64 * 2**10, 128 * 2**10, 512 * 2**10, 4 * 2**20]
"""Bytes of an all-reduce."""
CALLS = {"cpu": 50, "cuda": 500}
"""Of a graph: so many that what the ranks begin apart, some tens of microseconds, is little for each."""


def all_reduce(part: Part) -> None:
    """All ranks call it."""
    cuda = part.device == "cuda"
    device = torch.device("cuda", part.rank) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    if cuda:
        torch.cuda.set_device(device)
    group = Group(part.rank, part.ranks, part.folder / "store", device, dtype)
    if cuda:
        others = [rank for rank in range(part.ranks) if rank != part.rank]
        peers = all(torch.cuda.can_device_access_peer(part.rank, other) for other in others)
        part.add(what="one shot", peers=peers, serves=group.one_shot is not None, why_not=group.why_not)
    generator = torch.Generator(device).manual_seed(part.rank)
    with torch.inference_mode():
        for size in SIZES[:1] if part.smoke else SIZES:
            x = torch.randn(size // dtype.itemsize, device=device, generator=generator).to(dtype)
            ours, theirs = group.reduce(x), group._sum(x.clone())
            same = len(set(group.exchange(ours.cpu().view(torch.uint8).numpy().tobytes()[:4096]))) == 1
            difference = float((ours.float() - theirs.float()).abs().max())
            row: dict[str, Any] = {"bytes": size, "same_bits_on_ranks": same, "largest_difference_to_nccl": difference}
            total = torch.empty_like(x)
            for way, call in {"ours": lambda: group.reduce(x), "nccl": lambda: group._sum(total)}.items():  # noqa: B023
                row[f"{way}_us"] = slowest(group, microseconds(call, cuda, group))
            part.add(what="all-reduce", **row)
        if cuda:
            logits = torch.randn(1, 128256 // part.ranks, device=device).to(dtype)
            took = slowest(group, microseconds(lambda: group.gather(logits, 128256), cuda, group))
            part.add(what="gather of a row of logits", bytes=logits.numel() * dtype.itemsize, ours_us=took)
    group.exchange(b"done")
    if cuda:
        symmetric_memory(part, device, dtype, group)
    group.exchange(b"done")


def kernels(part: Part) -> None:
    """All ranks call it."""
    if part.device != "cuda":
        part.add(what="kernel", why_not="the persistent kernels need GPUs")
        return
    import rank_kernels

    device = torch.device("cuda", part.rank)
    torch.cuda.set_device(device)
    group = Group(part.rank, part.ranks, part.folder / "store of kernels", device, torch.bfloat16)

    def left() -> float:
        return part.end - time.monotonic()

    def timed(call: Callable[[], object]) -> float:
        return slowest(group, microseconds(call, True, group, calls=10))

    with torch.inference_mode():
        for name in (SHAPE, LARGE):
            for row in rank_kernels.measure(name, group, device, left, timed):
                part.add(**row)
    group.exchange(b"done")


def symmetric_memory(part: Part, device: torch.device, dtype: torch.dtype, group: Group) -> None:
    """torch's own kernel over symmetric memory, to compare with."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not every host has it, and this needs none
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symm_mem

    row: dict[str, Any] = {"what": "torch's one-shot all-reduce", "bytes": SIZES[0]}
    try:
        store = dist.FileStore(str(part.folder / "default store"), part.ranks)
        dist.init_process_group("nccl", store=store, rank=part.rank, world_size=part.ranks, device_id=device)
        buffer = symm_mem.empty(SIZES[0] // dtype.itemsize, dtype=dtype, device=device)
        symm_mem.rendezvous(buffer, dist.group.WORLD)
        buffer.zero_()
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]

        def call() -> None:
            torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", name)

        row["torch_us"] = slowest(group, microseconds(call, True, group))
    except Exception as error:
        row["error"] = described(error)
    part.add(**row)


def slowest(group: Group, value: float) -> float:
    """The largest of what the ranks measured."""
    return max(float(each) for each in group.exchange(f"{value:020.6f}".encode()))


def microseconds(call: Callable[[], object], cuda: bool, group: Group, calls: int = CALLS["cuda"]) -> float:
    """Of a call in a CUDA graph of many; on a CPU of a call."""
    if cuda:
        return graph_seconds(call, repeats=15, calls=calls, before=lambda: group.exchange(b"now")) * 1e6
    call()
    start = time.perf_counter()
    for _ in range(CALLS["cpu"]):
        call()
    return (time.perf_counter() - start) / CALLS["cpu"] * 1e6
