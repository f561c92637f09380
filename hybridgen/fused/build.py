"""Builds the fused executors of a model: makes each, tries it, and keeps what computes the same.

Imports Triton; import it only where that is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from hybridgen.cache import LayerPages
from hybridgen.device.failures import LostRanks
from hybridgen.device.program import Keeper
from hybridgen.errors import DeviceError, described
from hybridgen.fused import reference
from hybridgen.fused.chain.search import COMPILED_AT_ONCE
from hybridgen.fused.chain.step import MAX_ROWS, ChainStep
from hybridgen.fused.decode import FusedDecode
from hybridgen.fused.executors import ChainExecutor, PersistentExecutor, RowsExecutor
from hybridgen.fused.inputs import StepInputs
from hybridgen.fused.persistent.shape import Tuning, check_cache, inbox_bytes
from hybridgen.fused.persistent.step import PersistentStep
from hybridgen.fused.rows.shape import COLUMNS
from hybridgen.fused.rows.shape import Tuning as RowsTuning
from hybridgen.fused.rows.step import RowsStep
from hybridgen.models import BoundModel
from hybridgen.models.decoder import Decoder, Unfit, describe
from hybridgen.models.share import Share

logger = logging.getLogger(__name__)
R = TypeVar("R")


def build_fused(
    bound: BoundModel,
    pages: tuple[LayerPages, ...],
    inputs: StepInputs,
    *,
    max_context: int,
    max_rows: int,
    query_len: int = 1,
    reads: tuple[int, ...] = (),
    equal_bits: bool = False,
    tuned: Mapping[str, Any] | None = None,
    kept: Keeper | None = None,
    share: Share | None = None,
    scaled_cache: bool = False,
) -> FusedDecode:
    """Build what serves this model on its device; whatever does not leaves its reason, which `notes` has.

    Runs the model on a few tokens, and steps of the padding slot, whose page is the dummy page.

    Args:
        max_rows: rows of a step at most.
        query_len: tokens of a row in a step at most.
        reads: layers whose inputs whoever drafts goes on from.
        equal_bits: build the kernel for several columns alone, and use it for a single row, too.
        tuned: what `fused.tuning.tune` chose for this model and device; else the defaults.
        kept: gives the machine code kept under a key, or makes and keeps it.
        share: the other ranks, where the model is a rank's share. All of them call this at the same time, and have the
            same executors in the end: what one of them cannot have, none has.
        scaled_cache: whether keys and values are divided by scales when they are written.

    Raises:
        LostRanks: a rank failed where others wait for it.
    """
    fused = FusedDecode(inputs, pages=pages, share=share, equal_bits=equal_bits)
    tuning, rows_tuning, tiles = tuned_parts(tuned)
    try:
        model = fused.on_all_ranks(partial(_described, bound, scaled_cache, max_context, share))
        with bound.original_attention(), torch.inference_mode():
            _check(fused, bound.model, model)
            fused.model = model
            fused.refresh()
        inboxes = _Inboxes(model, share)
    except Exception as error:
        fused.nothing = fused.reason_of(error)
        return fused
    few = min(MAX_ROWS, max_rows)
    with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
        # The kernels for several rows are compiled while the one for one row is.
        build_rows = partial(_rows_step, fused, model, kept, reads, inboxes.rows)
        making = pool.submit(build_rows, rows_tuning)
        compiling: list[Future[object]] | Exception = []
        if equal_bits:
            _make_rows(fused, making, build_rows, max_rows * query_len, 0)
            return _logged(fused)
        if few > 1:
            compiling = _begin_chain(fused, few, tiles, pool)
        _make_persistent(fused, model, kept, tuning, inboxes.one)
        _make_rows(fused, making, build_rows, max_rows * query_len, 0 if reads or share is not None else few)
        nobody = fused.persistent is None and fused.rows is None
        if few == 1 and nobody:
            compiling = _begin_chain(fused, few, tiles, pool)
    if few > 1 or nobody:
        _finish_chain(fused, few, compiling)
    return _logged(fused)


def _described(bound: BoundModel, scaled_cache: bool, max_context: int, share: Share | None) -> Decoder:
    """The model as data.

    Raises:
        Unfit: something of it is not fused.
    """
    if bound.mixers:
        raise Unfit("its layers keep a state besides keys and values")
    if bound.latents:
        raise Unfit("its layers cache latents instead of keys and values")
    if scaled_cache:
        raise Unfit("keys and values are cached with scales (kv_dtype), which the fused kernels do not know")
    with bound.original_attention(), torch.inference_mode():
        return describe(bound.model, bound.sites, bound.weights, max_context, share)


def _check(fused: FusedDecode, model: PreTrainedModel, decoder: Decoder) -> None:
    """Compare with the model's own forward, in which other ranks take part.

    Raises:
        Unfit: it computes something else, on this rank or another.
        LostRanks: it failed while others wait.
    """
    different: Unfit | None = None
    try:
        reference.check(model, decoder)
    except Unfit as error:
        different = error
    except Exception as error:
        if fused.share is None:
            raise
        raise LostRanks(f"a check of the model failed while the other ranks wait in it: {described(error)}") from error

    def tell() -> None:
        if different is not None:
            raise different

    fused.on_all_ranks(tell)


class _Inboxes:
    """Where the persistent kernels of all ranks leave partial sums: an address of each rank's memory, by kernel."""

    def __init__(self, model: Decoder, share: Share | None) -> None:
        self.one: list[int] = []
        self.rows: list[int] = []
        if share is None:
            return
        own = inbox_bytes(model, 1)
        try:
            addresses = share.memory(own + inbox_bytes(model, COLUMNS))
        except DeviceError as error:  # on all ranks: the chain needs none of it
            logger.info("no persistent kernels: %s", error)
            return
        self.one, self.rows = addresses, [address + own for address in addresses]


def _logged(fused: FusedDecode) -> FusedDecode:
    for size, how in fused.notes.items():
        logger.info("%s: %s", size, how)
    return fused


def _rows_step(
    fused: FusedDecode,
    model: Decoder,
    kept: Keeper | None,
    reads: tuple[int, ...],
    inboxes: Sequence[int],
    tuning: RowsTuning | None,
) -> RowsStep:
    """The step for several rows; called on a thread of its own, which has a stream of its own.

    Raises:
        Unfit: it does not serve the model.
    """
    if reads and max(reads) >= len(model.layers):
        raise Unfit("whoever drafts reads what goes into the final norm, which it does not leave")
    # A new thread is on the first device, and pinned memory belongs to the device that is current.
    with torch.cuda.device(model.device), torch.inference_mode():
        table = fused.inputs.block_table
        step = RowsStep(model, fused.pages, block_table=table, tuning=tuning, reads=reads, inboxes=inboxes, kept=kept)
    torch.cuda.synchronize(model.device)
    return step


def _make_rows(
    fused: FusedDecode,
    making: Future[RowsStep],
    build: Callable[[RowsTuning | None], RowsStep],
    tokens: int,
    widest: int,
) -> None:
    """Try the step for several columns; where it does not serve, say why.

    Args:
        making: the step, which is being made.
        build: makes it again.
        widest: rows of one token that it may decode in several launches, where that is faster.
    """
    columns = min(COLUMNS, tokens)
    try:
        step = fused.on_all_ranks(making.result)
        wide = None
        if widest > columns:
            with torch.inference_mode(False):
                wide = torch.zeros(widest, *step.logits.shape[1:], dtype=step.logits.dtype, device=step.logits.device)

        def executor(step: RowsStep) -> RowsExecutor:
            return RowsExecutor(step, columns, fused.first_of_several, fused.share, wide)

        rows = fused.rows = executor(step)
        fused.build_rows = lambda *, tuning: executor(build(tuning))
        if rows.least > columns:
            rows.close()
            fused.rows = None
            return
        fused.try_step(rows, columns)
    except Exception as error:
        reason = fused.reason_of(error)
        if fused.rows is not None:
            fused.rows.close()
            fused.rows = None
        fused.refusals["rows"] = reason


def _make_persistent(
    fused: FusedDecode,
    model: Decoder,
    kept: Keeper | None,
    tuning: Tuning | None,
    inboxes: Sequence[int],
) -> None:
    """Build and try the persistent step; where it does not serve, say why."""

    def make(*, tuning: Tuning | None) -> PersistentExecutor:
        inputs = fused.inputs
        rows, state, table = inputs.rows, inputs.state, inputs.block_table
        step = PersistentStep(
            model,
            fused.pages,
            kept=kept,
            rows=rows,
            state=state,
            block_table=table,
            tuning=tuning,
            inboxes=inboxes,
        )
        return PersistentExecutor(step, fused.share)

    fused.build = make
    try:
        fused.persistent = fused.on_all_ranks(partial(make, tuning=tuning))
        fused.try_step(fused.persistent, 1)
    except Exception as error:
        reason = fused.reason_of(error)
        if fused.persistent is not None:
            fused.persistent.close()
            fused.persistent = None
        fused.refusals["persistent"] = reason


def _begin_chain(
    fused: FusedDecode, rows: int, tiles: Mapping[str, Any] | None, pool: ThreadPoolExecutor
) -> list[Future[object]] | Exception:
    """Make the chain, and begin to compile what its usual sizes launch; what went wrong, if something did."""
    try:
        if fused.model is None:
            raise RuntimeError("the model was not described")
        check_cache(fused.model, fused.pages)
        chain = ChainStep(fused.model, max_rows=rows, tiles=tiles)
        chain.attach(fused.pages)
        sizes = sorted({min(size, rows) for size in (2, 4, 8, 16)})
        with torch.inference_mode(False):
            logits = torch.zeros(rows, fused.model.vocab, dtype=fused.model.dtype, device=fused.model.device)
        fused.chain = ChainExecutor(chain, logits)
        return [
            pool.submit(compile_kernel) for compile_kernel in chain.prepare(sizes, fused.inputs.block_table.shape[1])
        ]
    except Exception as error:
        return error


def _finish_chain(fused: FusedDecode, rows: int, compiling: list[Future[object]] | Exception) -> None:
    """Try the chain; where it does not serve, say why."""
    try:
        fused.on_all_ranks(partial(_compiled, compiling))
        if fused.chain is None:
            raise RuntimeError("there is no chain to try")
        fused.chain.least = fused.first_of_several
        fused.try_step(fused.chain, rows)
    except Exception as error:
        fused.chain = None
        fused.refusals["chain"] = fused.reason_of(error)


def _compiled(compiling: list[Future[object]] | Exception) -> None:
    if isinstance(compiling, Exception):
        raise compiling
    for future in compiling:
        future.result()


def tuned_parts(
    document: Mapping[str, Any] | None,
) -> tuple[Tuning | None, RowsTuning | None, Mapping[str, Any] | None]:
    """The persistent steps' tunings and the chain's tiles of what `fused.tuning.tune` returned.

    None where it has none, or one with other fields than this version's.
    """
    document = document or {}

    def tuning(name: str, kind: Callable[..., R]) -> R | None:
        try:
            return kind(**document[name]) if name in document else None
        except TypeError:
            return None

    return tuning("persistent", Tuning), tuning("columns", RowsTuning), document.get("chain")
