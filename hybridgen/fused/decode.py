"""The fused decode steps of an engine: which sizes they serve, and why they do not serve others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.errors import DeviceError
from hybridgen.fused import reference
from hybridgen.fused.persistent.step import PersistentStep
from hybridgen.fused.structure import Decoder, Unfit, describe
from hybridgen.kvcache import LayerPages
from hybridgen.models import BoundModel

logger = logging.getLogger(__name__)

_TOLERANCE = 3e-2
"""Largest relative error of the trial step's logits; bfloat16 itself gives about 1e-2."""


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


@dataclass(eq=False)
class FusedDecode:
    """Decode steps that do not go through Hugging Face's layers, by their number of rows."""

    model: Decoder | None = None
    persistent: PersistentStep | None = None
    notes: dict[str, str] = field(default_factory=dict)
    """What serves which sizes, or why nothing does."""

    def serves(self, rows: int) -> bool:
        """Whether a step of this many rows is fused."""
        return rows == 1 and self.persistent is not None

    def logits(self, rows: int) -> Tensor:
        """Launch the step; returns its logits [rows, vocab], which the next call overwrites."""
        if rows != 1 or self.persistent is None:
            raise RuntimeError(f"no fused step serves {rows} rows")
        return self.persistent()

    def tensors(self) -> dict[str, Tensor]:
        """What outlives a step, by name."""
        return self.persistent.tensors() if self.persistent is not None else {}

    def stopped(self) -> bool:
        """Whether a step that has run was given up by its watchdog; what it leaves behind is mended.

        Such a step's logits are NaN. Waits for the device if there was one.
        """
        step = self.persistent
        if step is None or not step.faulted:
            return False
        step.repair()
        return True


def fuse_decode(
    bound: BoundModel,
    pages: tuple[LayerPages, ...],
    inputs: StepInputs,
    *,
    max_context: int,
    kept: Callable[[str, Callable[[], bytes]], bytes] | None = None,
) -> FusedDecode:
    """Build what serves this model on its device; whatever does not leaves its reason in `notes`.

    Runs the model on a few tokens, and one step of the padding slot, whose page is the dummy page.
    """
    try:
        with bound.original_attention(), torch.inference_mode():
            model = describe(bound.model, bound.sites, max_context)
            reference.check(bound.model, model)
    except Unfit as reason:
        return FusedDecode(notes={"fused decode": f"none: {reason}"})
    try:
        persistent = PersistentStep(
            model, pages, rows=inputs.rows, state=inputs.state, block_table=inputs.block_table, kept=kept
        )
        _try(persistent, model, pages, inputs)
    except (Unfit, DeviceError) as reason:
        logger.info("decode of one row stays generic: %s", reason)
        return FusedDecode(model, notes={"decode of 1 row": f"not fused: {reason}"})
    return FusedDecode(model, persistent, notes={"decode of 1 row": "one persistent kernel"})


@torch.inference_mode()
def _try(step: PersistentStep, model: Decoder, pages: tuple[LayerPages, ...], inputs: StepInputs) -> None:
    """Run a step of the padding slot and compare.

    Raises:
        Unfit: it computes something else, or was given up.
    """
    inputs.rows[:1] = inputs.padding_slot
    inputs.state[:, inputs.padding_slot] = 0
    actual = step()
    torch.cuda.synchronize(model.device)
    if step.faulted:
        step.repair()
        raise Unfit("its trial step was given up by the watchdog")
    slot = slice(inputs.padding_slot, inputs.padding_slot + 1)
    expected = reference.step(
        model, pages, inputs.state[0, slot], inputs.state[1, slot], inputs.block_table[slot].clone()
    )
    error = float((actual.float() - expected).norm() / expected.norm())
    if not error < _TOLERANCE:
        raise Unfit(f"its trial step is off by {error:.3g}")
