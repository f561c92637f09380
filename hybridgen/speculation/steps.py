"""The step that a drafter's own layers run in: over the engine's block table, with tokens and positions of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridgen.models.attention import StepMetadata


def own_step(block_table: Tensor) -> StepMetadata:
    """A step without tokens, to be filled before each pass.

    Args:
        block_table: the engine's, int32 [slots, pages].
    """
    nothing = torch.zeros(1, dtype=torch.int64, device=block_table.device)
    slots = torch.zeros(1, dtype=torch.int32, device=block_table.device)
    return StepMetadata(block_table, slots, nothing, slots, nothing, nothing)


def follow_step(own: StepMetadata, step: StepMetadata) -> None:
    """Let the drafter's step have the rows and positions of the model's. Its ids stay as they are."""
    own.phase, own.several, own.slots, own.positions = step.phase, step.several, step.slots, step.positions
    own.query_starts, own.rope_lengths, own.runs = step.query_starts, step.rope_lengths, step.runs
