"""Where fused steps find their rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepInputs(NamedTuple):
    """Where steps find their rows; fixed addresses."""

    rows: Tensor
    """int64 [>= max_batch]: the slot of each row."""
    slots: Tensor
    """int32, the same."""
    state: Tensor
    """int64 [3, slots]: last token, length and generated tokens by slot."""
    block_table: Tensor
    """int32 [slots, max_pages]."""
    padding_slot: int
