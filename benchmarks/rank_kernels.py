"""The persistent kernels on two ranks' shares, without an engine: a part of `parallel.py`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import random_decoder, release

from hybridgen.cache import LayerPages
from hybridgen.fused import reference
from hybridgen.models.decoder import Decoder
from hybridgen.parallel.group import Group
from hybridgen.parallel.share import GroupShare

ROOM, PAGE_SIZE, POSITION, ROWS = 1024, 64, 512, 8
VARIANTS: dict[str, list[dict[str, int]]] = {
    "persistent": [{}, {"in_flight": 1}, {"in_flight": 3}, {"stage": 65536}, {"short_splits": 8}, {"in_flight": 4}],
    "rows": [{}, {"in_flight": 1}, {"in_flight": 3}, {"piece": 1024}, {"piece": 1024, "in_flight": 4}],
}
"""Changes of the default tuning."""


class Cache:
    """Pages of eight rows at `POSITION`, and what steps read of them."""

    def __init__(self, model: Decoder) -> None:
        device = model.device
        generator = torch.Generator(device).manual_seed(1)
        count = ROOM // PAGE_SIZE
        size = ROWS * count + 1, model.kv_heads, PAGE_SIZE, model.head_dim
        self.pages = tuple(
            LayerPages(*(torch.randn(size, device=device, generator=generator).to(model.dtype) for _ in range(2)))
            for _ in model.layers
        )
        self.table = (torch.arange(ROWS * count, device=device) + 1).view(ROWS, count).to(torch.int32)
        self.ids = torch.arange(ROWS, device=device) * 37
        self.positions = torch.full((ROWS,), POSITION, device=device)
        self.slots = torch.arange(ROWS, dtype=torch.int32, device=device)
        self.state = torch.zeros(3, ROWS, dtype=torch.int64, device=device)
        self.state[:2] = torch.stack((self.ids, self.positions))
        self.rows = torch.arange(ROWS, device=device)


def measure(
    name: str, group: Group, device: torch.device, left: Callable[[], float], microseconds: Callable[..., float]
) -> Iterator[dict[str, Any]]:
    """Rows of a shape's kernels; both ranks go through it alike.

    Args:
        left: seconds that are left.
        microseconds: times a call on all ranks.
    """
    from hybridgen.fused.persistent.shape import default_tuning, inbox_bytes
    from hybridgen.fused.persistent.step import PersistentStep
    from hybridgen.fused.rows import shape as rows_shape
    from hybridgen.fused.rows.step import RowsStep
    from hybridgen.models.decoder import Unfit

    share = GroupShare(group, 0)
    model = random_decoder(name, torch.bfloat16, str(device), ROOM, share)
    share = GroupShare(group, share.size * model.vocab)
    model = dataclasses.replace(model, share=share)
    release()
    cache = Cache(model)
    blocks = torch.cuda.get_device_properties(device).multi_processor_count

    def make(kind: str, changes: dict[str, int]) -> tuple[Any, Callable[[], torch.Tensor], int]:
        if kind == "persistent":
            tuning = dataclasses.replace(default_tuning(model, blocks), **changes)
            inboxes = group.memory(inbox_bytes(model, 1))
            places = {"rows": cache.rows, "state": cache.state, "block_table": cache.table}
            one: Any = PersistentStep(model, cache.pages, tuning=tuning, inboxes=inboxes, **places)
            return one, one, 1
        several = dataclasses.replace(rows_shape.default_tuning(model), **changes)
        inboxes = group.memory(inbox_bytes(model, rows_shape.COLUMNS))
        step = RowsStep(model, cache.pages, block_table=cache.table, tuning=several, inboxes=inboxes)
        return step, lambda: step(cache.ids, cache.positions, cache.slots), ROWS

    for kind, changes in ((kind, each) for kind, tunings in VARIANTS.items() for each in tunings):
        if min(float(each) for each in group.exchange(f"{left():020.6f}".encode())) < 12:
            return
        begin = time.monotonic()
        row: dict[str, Any] = {"what": "kernel", "model": name, "kernel": kind, "changes": changes}
        made, why = None, ""
        try:
            made = make(kind, changes)
        except Unfit as error:
            why = str(error)
        why = share.agree(why)
        if why or made is None:
            yield {**row, "why_not": why}
            continue
        step, call, rows = made
        logits = call().float().clone()
        torch.cuda.synchronize()
        table = cache.table[cache.slots[:rows].long()]
        expected = reference.step(model, cache.pages, cache.ids[:rows], cache.positions[:rows], table)
        found = share.gather(logits)
        row |= {"rows": rows, "error": float((found - expected).norm() / expected.norm()), "gave_up": step.faulted}
        row["tuning"] = dataclasses.asdict(step.tuning)
        row |= {each.lower(): step.kernel.attribute(each) for each in ("NUM_REGS", "LOCAL_SIZE_BYTES")}
        row["us"] = microseconds(call)
        yield {**row, "GB_per_s": model.weight_bytes / row["us"] / 1e3, "seconds": time.monotonic() - begin}
        step.kernel.close()
