"""The fused decode steps of an engine: which sizes they serve, and why they do not serve others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.device.failures import is_fatal
from hybridgen.errors import CacheMissError, described
from hybridgen.fused import reference
from hybridgen.fused.chain.step import MAX_ROWS, ChainStep
from hybridgen.fused.chain.tiles import COMPILED_AT_ONCE
from hybridgen.fused.inputs import StepInputs
from hybridgen.fused.persistent.shape import Tuning
from hybridgen.fused.persistent.step import PersistentStep
from hybridgen.models import BoundModel
from hybridgen.models.decoder import Decoder, Unfit, describe

logger = logging.getLogger(__name__)

_TRIAL_TOKENS = 1024
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
    pages: tuple[LayerPages, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    """What serves which sizes, or why nothing does."""
    failures: list[str] = field(default_factory=list)
    """What went wrong that should not have."""
    _versions: tuple[int | None, ...] = ()

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

    def refresh(self) -> None:
        """Take over norms whose parameters were changed in place since the last call; all other weights are the
        model's own storage."""
        if self.model is None:
            return
        versions = tuple(_version(norm.source) for norm in self.model.norms)
        if versions != self._versions:
            for norm in self.model.norms:
                norm.refresh()
            self._versions = versions

    def close(self) -> None:
        """Unload what was loaded. Not while a step runs or a graph holds one."""
        if self.persistent is not None:
            self.persistent.kernel.close()
        self.persistent = self.chain = None

    def stopped(self) -> bool:
        """Whether a step that has run was given up by its watchdog; what it leaves behind is mended.

        Such a step's logits are NaN. Waits for the device if there was one.
        """
        step = self.persistent
        if step is None or not step.faulted:
            return False
        step.repair()
        return True

    def reason_of(self, error: Exception) -> str:
        """Why something does not serve; what is no rule of ours is a failure, too. A lost device is raised."""
        if isinstance(error, CacheMissError) or is_fatal(error):
            raise error
        if isinstance(error, Unfit):
            return str(error)
        logger.debug("fused decode failed", exc_info=error)
        reason = described(error)
        self.failures.append(f"fused decode failed, the model's own layers decode: {reason}")
        return reason

    @torch.inference_mode()
    def try_step(self, rows: int) -> None:
        """Run a step of padding rows and compare. Overwrites the padding slot's state and page.

        Raises:
            Unfit: it computes something else, or was given up.
        """
        inputs, model, padding = self.inputs, self.model, self.inputs.padding_slot
        if model is None:
            raise RuntimeError("the model was not described")
        inputs.rows[:rows] = padding
        inputs.slots[:rows] = padding
        inputs.state[:, padding] = 0
        # Some embed their padding token as zeros, which every model maps to zeros.
        inputs.state[0, padding] = model.embedding[:_TRIAL_TOKENS].float().norm(dim=-1).argmax()
        tokens, positions = (inputs.state[i, inputs.rows[:rows]] for i in range(2))
        try:
            actual = self.run(rows, tokens, positions)
            torch.cuda.synchronize(model.device)
            if self.stopped():
                raise Unfit("its trial step was given up by the watchdog")
            table = inputs.block_table[padding : padding + 1]
            expected = reference.step(model, self.pages, tokens[:1], positions[:1], table)
            error = float(((actual.float() - expected).norm(dim=-1) / expected.norm()).max())
        finally:
            inputs.state[:, padding] = 0
        if not error < _TOLERANCE:
            raise Unfit(f"its trial step is off by {error:.3g}")


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
    fused = FusedDecode(inputs, pages=pages)
    tuning, tiles = tuned_parts(tuned)
    try:
        with bound.original_attention(), torch.inference_mode():
            model = describe(bound.model, bound.sites, bound.weights, max_context)
            reference.check(bound.model, model)
            fused.model = model
            fused.refresh()
    except Exception as error:
        fused.notes["fused decode"] = f"none: {fused.reason_of(error)}"
        return fused
    few = min(MAX_ROWS, max_rows)
    with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
        # The chain's kernels are compiled while the persistent one is.
        compiling = _begin_chain(fused, few, tiles, pool) if few > 1 else []
        _make_persistent(fused, partial(PersistentStep, model, pages, kept=kept), tuning)
        if few == 1 and fused.persistent is None:
            compiling = _begin_chain(fused, few, tiles, pool)
    if few > 1 or fused.persistent is None:
        _finish_chain(fused, few, compiling)
    for size, how in fused.notes.items():
        logger.info("%s: %s", size, how)
    return fused


def _make_persistent(fused: FusedDecode, build: Callable[..., PersistentStep], tuning: Tuning | None) -> None:
    """Build and try the persistent step, and say in the notes whether it serves."""
    inputs = fused.inputs
    try:
        fused.build = partial(build, rows=inputs.rows, state=inputs.state, block_table=inputs.block_table)
        fused.persistent = fused.build(tuning=tuning)
        fused.try_step(1)
        fused.notes["decode of 1 row"] = "one persistent kernel"
    except Exception as error:
        reason = fused.reason_of(error)
        if fused.persistent is not None:
            fused.persistent.kernel.close()
            fused.persistent = None
        fused.notes["decode of 1 row"] = f"no persistent kernel: {reason}"


def _begin_chain(
    fused: FusedDecode, rows: int, tiles: Mapping[str, Any] | None, pool: ThreadPoolExecutor
) -> list[Future[object]] | Exception:
    """Make the chain, and begin to compile what its usual sizes launch; what went wrong, if something did."""
    try:
        if fused.model is None:
            raise RuntimeError("the model was not described")
        chain = ChainStep(fused.model, max_rows=rows, tiles=tiles)
        chain.attach(fused.pages)
        sizes = sorted({min(size, rows) for size in (2, 4, 8, 16)})
        fused.chain = chain
        return [
            pool.submit(compile_kernel) for compile_kernel in chain.prepare(sizes, fused.inputs.block_table.shape[1])
        ]
    except Exception as error:
        return error


def _finish_chain(fused: FusedDecode, rows: int, compiling: list[Future[object]] | Exception) -> None:
    """Try the chain, and say in the notes what it serves."""
    try:
        if isinstance(compiling, Exception):
            raise compiling
        for future in compiling:
            future.result()
        if fused.model is None:
            raise RuntimeError("the model was not described")
        fused.chain_rows = rows
        with torch.inference_mode(False):
            fused.logits = torch.zeros(rows, fused.model.vocab, dtype=fused.model.dtype, device=fused.model.device)
        fused.try_step(rows)
        fused.note_chain("")
    except Exception as error:
        fused.chain, fused.chain_rows = None, 0
        fused.notes[f"decode of {fused.least_chain_rows} to {rows} rows"] = f"no chain: {fused.reason_of(error)}"


def _version(parameter: Tensor | None) -> int | None:
    try:
        return None if parameter is None else parameter._version
    except RuntimeError:  # a tensor made in inference mode does not count
        return None


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
