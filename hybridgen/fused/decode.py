"""The fused decode steps of an engine: which sizes they serve, and why they do not serve others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridgen.errors import DeviceError
from hybridgen.fused import reference
from hybridgen.fused.chain import MAX_ROWS, ChainStep
from hybridgen.fused.inputs import StepInputs
from hybridgen.fused.persistent.shape import Tuning
from hybridgen.fused.persistent.step import PersistentStep
from hybridgen.fused.structure import Decoder, Unfit, describe
from hybridgen.kvcache import LayerPages
from hybridgen.models import BoundModel

logger = logging.getLogger(__name__)

_TOLERANCE = 5e-2
"""Largest relative error of the trial step's logits; bfloat16 itself gives 1e-2 to 2e-2."""


@dataclass(eq=False)
class FusedDecode:
    """Decode steps that do not go through Hugging Face's layers, by their number of rows."""

    inputs: StepInputs
    model: Decoder | None = None
    persistent: PersistentStep | None = None
    """For one row."""
    chain: ChainStep | None = None
    """For a few."""
    chain_rows: int = 0
    """Up to how many rows the chain is used."""
    logits: Tensor | None = None
    """[rows, vocab]: where the chain leaves its logits."""
    build: Callable[..., PersistentStep] | None = None
    """Makes the persistent step again, with another `tuning=`."""
    notes: dict[str, str] = field(default_factory=dict)
    """What serves which sizes, or why nothing does."""

    def serves(self, rows: int) -> bool:
        """Whether a step of this many rows is fused."""
        if rows == 1 and self.persistent is not None:
            return True
        return self.chain is not None and rows <= self.chain_rows

    def run(self, rows: int, tokens: Tensor, positions: Tensor) -> Tensor:
        """Launch the step; returns its logits [rows, vocab], which the next call overwrites.

        Args:
            tokens, positions: int64 [rows], what `inputs.state` has for the rows.
        """
        if rows == 1 and self.persistent is not None:
            return self.persistent()
        if self.chain is None or self.logits is None:
            raise RuntimeError(f"no fused step computes {rows} rows")
        out = self.logits[:rows]
        self.chain(tokens, positions, self.inputs.slots[:rows], self.inputs.block_table, out)
        return out

    @property
    def least_chain_rows(self) -> int:
        """From how many rows on the chain is used."""
        return 1 if self.persistent is None else 2

    def use_chain_up_to(self, rows: int, why: str) -> None:
        """Leave steps of more rows to the model's own layers."""
        self.chain_rows = rows
        self.note_chain(why)

    def note_chain(self, why: str) -> None:
        """Say in `notes` what the chain serves, and why nothing beyond that."""
        self.notes = {size: how for size, how in self.notes.items() if not how.startswith("a chain")}
        least, most = self.least_chain_rows, self.chain_rows
        rows = f"{least} rows" if least == most else f"{least} to {most} rows"
        size = f"decode of {rows}" if most >= least else "decode of more rows"
        how = "a chain of Triton kernels" if most >= least else "the model's own layers"
        self.notes[size] = f"{how}{f'; {why}' if why else ''}"

    def tensors(self) -> dict[str, Tensor]:
        """What outlives a step, by name."""
        persistent = self.persistent.tensors() if self.persistent is not None else {}
        chain = self.chain.tensors() if self.chain is not None else {}
        chain = {f"chain {name}": tensor for name, tensor in chain.items()}
        return persistent | chain | ({} if self.logits is None else {"chain logits": self.logits})

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
    max_rows: int,
    tuned: Mapping[str, Any] | None = None,
    kept: Callable[[str, Callable[[], bytes]], bytes] | None = None,
) -> FusedDecode:
    """Build what serves this model on its device; whatever does not leaves its reason in `notes`.

    Runs the model on a few tokens, and steps of the padding slot, whose page is the dummy page.

    Args:
        max_rows: rows of a step at most.
        tuned: what `fused.tuning.tune` chose for this model and device; else the defaults.
        kept: gives the machine code kept under a key, or makes and keeps it.
    """
    fused = FusedDecode(inputs)
    tuning, tiles = tuned_parts(tuned)
    try:
        with bound.original_attention(), torch.inference_mode():
            model = fused.model = describe(bound.model, bound.sites, max_context)
            reference.check(bound.model, model)
    except Unfit as reason:
        fused.notes["fused decode"] = f"none: {reason}"
        return fused
    try:
        fused.build = partial(
            PersistentStep,
            model,
            pages,
            rows=inputs.rows,
            state=inputs.state,
            block_table=inputs.block_table,
            kept=kept,
        )
        fused.persistent = fused.build(tuning=tuning)
        _try(fused, 1, pages)
        fused.notes["decode of 1 row"] = "one persistent kernel"
    except (Unfit, DeviceError) as reason:
        fused.persistent = None
        fused.notes["decode of 1 row"] = f"no persistent kernel: {reason}"
    few = min(MAX_ROWS, max_rows)
    if few == 1 and fused.persistent is not None:
        return fused
    least = 1 if fused.persistent is None else 2
    try:
        fused.chain = ChainStep(model, max_rows=few, tiles=tiles)
        fused.chain.attach(pages)
        fused.chain_rows = few
        with torch.inference_mode(False):
            fused.logits = torch.zeros(few, model.vocab, dtype=model.dtype, device=model.device)
        _try(fused, few, pages)
        fused.note_chain("")
    except Unfit as reason:
        fused.chain, fused.chain_rows = None, 0
        fused.notes[f"decode of {least} to {few} rows"] = f"no chain of kernels: {reason}"
    for size, how in fused.notes.items():
        logger.info("%s: %s", size, how)
    return fused


@torch.inference_mode()
def _try(fused: FusedDecode, rows: int, pages: tuple[LayerPages, ...]) -> None:
    """Run a step of padding rows and compare.

    Raises:
        Unfit: it computes something else, or was given up.
    """
    inputs, model = fused.inputs, fused.model
    if model is None:
        raise RuntimeError("the model was not described")
    padding = inputs.padding_slot
    inputs.rows[:rows] = padding
    inputs.slots[:rows] = padding
    inputs.state[:, padding] = 0
    tokens, positions = (inputs.state[i, inputs.rows[:rows]] for i in range(2))
    actual = fused.run(rows, tokens, positions)
    torch.cuda.synchronize(model.device)
    if fused.stopped():
        raise Unfit("its trial step was given up by the watchdog")
    table = inputs.block_table[padding : padding + 1]
    expected = reference.step(model, pages, tokens[:1], positions[:1], table)
    error = float(((actual.float() - expected).norm(dim=-1) / expected.norm()).max())
    if not error < _TOLERANCE:
        raise Unfit(f"its trial step is off by {error:.3g}")


def tuned_parts(document: Mapping[str, Any] | None) -> tuple[Tuning | None, Mapping[str, Any] | None]:
    """The persistent step's tuning and the chain's tiles of what `fused.tuning.tune` returned.

    None where it has none, or one with other fields than this version's.
    """
    document = document or {}
    try:
        tuning = Tuning(**document["persistent"]) if "persistent" in document else None
    except TypeError:
        tuning = None
    return tuning, document.get("chain")
