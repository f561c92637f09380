"""Who drafts, and how many drafts are worth checking. What is accepted: `hybridgen.kernels.step.drafts`."""

from __future__ import annotations

import torch

from hybridgen.models import BoundModel

KEEPS_STATE = "its layers keep a state that cannot be taken back when a draft is wrong"


def refusal(bound: BoundModel, max_context: int, page_size: int, dtype: torch.dtype) -> str | None:
    """Why drafts cannot be checked on a model, in words; None where they can.

    Args:
        max_context: tokens of a request at most.
    """
    switch = bound.reprefill_length
    if switch is not None and switch <= max_context:
        return (
            f"its rotary table changes when a request reaches {switch} tokens, which must not happen between drafts "
            f"(max_context={switch - 1} or less avoids it)"
        )
    if any(state.bytes_per_slot or not state.rerunnable for state in bound.layer_states(page_size, dtype)):
        return KEEPS_STATE
    return None
