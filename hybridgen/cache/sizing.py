"""How many pages the pool gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridgen.cache.pages import pages_for_tokens
from hybridgen.cache.state import LayerState, bytes_per_page, bytes_per_slot
from hybridgen.errors import OutOfMemoryError

CPU_DEFAULT_BYTES = 2**30
"""KV memory on a CPU when none is given: enough for a notebook, little enough not to push it into swap."""

CUDA_HEADROOM = 0.06
"""Share of the device's memory left free: other libraries and fragmentation need some."""


def pages_in_turn(reach: int, tokens: int, page_size: int) -> int:
    """Pages that are enough for a request of any length that uses them in turn.

    Args:
        reach: positions that a query sees at most in any layer, its own included.
        tokens: of the request that one call feeds at most; all of them are written before any layer reads.
    """
    # The first query of such a call sees the position reach + tokens - 2 before the last one that is written.
    return pages_for_tokens(reach + tokens - 1, page_size)


def plan_pages(
    states: Sequence[LayerState],
    *,
    page_size: int,
    max_batch: int,
    slots: int | None = None,
    max_context: int,
    kv_memory: int | None,
    device: torch.device,
    activation_bytes: int = 0,
) -> int:
    """Pages to allocate, the dummy page included.

    Never more than `max_batch` requests of `max_context` tokens can use. Within that, `kv_memory` bytes where given;
    else on CUDA what is free less `activation_bytes` (the measured peak of a step) and a headroom, and on a CPU
    `CPU_DEFAULT_BYTES`. What the layers keep by slot is taken off first.

    Args:
        slots: that are allocated, padding's included; None: one more than `max_batch`.

    Raises:
        OutOfMemoryError: not even one page and the dummy page fit beside the slots.
    """
    useful = max_batch * pages_for_tokens(max_context, page_size) + 1
    if kv_memory is not None:
        available, source = kv_memory, f"kv_memory={kv_memory:,}"
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        available = int(free - activation_bytes - CUDA_HEADROOM * total)
        source = f"{free:,} bytes free on {device}, less {activation_bytes:,} for a step and headroom,"
    else:
        available, source = CPU_DEFAULT_BYTES, f"the default of {CPU_DEFAULT_BYTES:,} bytes on a CPU"
    each, fixed = bytes_per_page(states), (slots or max_batch + 1) * bytes_per_slot(states)
    # A model whose layers keep nothing in pages has as many as its requests can name.
    affordable = (available - fixed) // each if each else useful * (available >= fixed)
    if affordable < 2:
        held = [f"two KV-cache pages of {each:,} bytes"] if each else []
        held += [f"{fixed:,} bytes for the states of {max_batch} requests"] if fixed else []
        raise OutOfMemoryError(
            f"{source} holds fewer than {' beside '.join(held)}, and at least {fixed + 2 * each:,} bytes are needed; "
            f"raise kv_memory, lower {'max_batch, ' if fixed else ''}page_size or token_budget, or free memory on the "
            "device"
        )
    return min(useful, affordable)
