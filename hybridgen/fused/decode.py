"""The fused executors of an engine: which sizes they serve, and why they do not serve others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.device.failures import LostRanks, is_fatal
from hybridgen.errors import CacheMissError, described
from hybridgen.fused import reference
from hybridgen.fused.executors import ChainExecutor, PersistentExecutor, RowsExecutor
from hybridgen.fused.inputs import StepInputs
from hybridgen.graphs import Executor
from hybridgen.models import StepMetadata
from hybridgen.models.attention import Phase
from hybridgen.models.decoder import Decoder, Unfit
from hybridgen.models.share import Share

logger = logging.getLogger(__name__)

R = TypeVar("R")

_TRIAL_TOKENS = 1024
_TOLERANCE = 5e-2
"""Largest relative error of the trial step's logits; bfloat16 itself gives 1e-2 to 2e-2."""


@dataclass(eq=False)
class FusedDecode:
    """What decodes small batches in place of the model's own layers."""

    inputs: StepInputs
    model: Decoder | None = None
    persistent: PersistentExecutor | None = None
    """For one row."""
    rows: RowsExecutor | None = None
    """For a few tokens."""
    chain: ChainExecutor | None = None
    """For a few rows."""
    build: Callable[..., PersistentExecutor] | None = None
    """Makes the persistent executor again, with another `tuning=`."""
    build_rows: Callable[..., RowsExecutor] | None = None
    """The same of the executor for a few tokens."""
    pages: tuple[LayerPages, ...] = ()
    nothing: str = ""
    """Why nothing of the model is fused; empty where something may be."""
    refusals: dict[str, str] = field(default_factory=dict)
    """By executor: why there is none."""
    limits: dict[str, str] = field(default_factory=dict)
    """By executor: why it is used for no more sizes."""
    share: Share | None = None
    """The other ranks, where the model is a rank's share."""
    equal_bits: bool = False
    """Whether one kernel serves all decode steps, so that their bits are equal."""
    failures: list[str] = field(default_factory=list)
    """What went wrong that should not have."""

    @property
    def executors(self) -> tuple[Executor, ...]:
        """In order of preference."""
        return tuple(executor for executor in (self.persistent, self.rows, self.chain) if executor is not None)

    def use_rows(self, least: int, most: int, why: str) -> None:
        """Use the kernel for several rows for steps of so many tokens, and leave others to what comes after it."""
        if self.rows is not None:
            self.rows.least, self.rows.most = least, most
            self.limits[self.rows.name] = why

    @property
    def first_of_several(self) -> int:
        """Rows from which on something else than the kernel for one row serves."""
        return 1 if self.persistent is None else 2

    def use_chain_up_to(self, rows: int, why: str) -> None:
        """Leave steps of more rows to the model's own layers."""
        if self.chain is not None:
            self.chain.most = rows
            self.limits[self.chain.name] = why

    @property
    def notes(self) -> dict[str, str]:
        """What serves which sizes, or why nothing does: each size by who runs it."""
        if self.nothing:
            return {"fused decode": f"none: {self.nothing}"}
        found: dict[str, str] = {}
        if self.persistent is not None:
            found["decode of 1 row"] = "one persistent kernel"
        elif "persistent" in self.refusals:
            found["decode of 1 row"] = f"no persistent kernel: {self.refusals['persistent']}"
        rows, chain = self.rows, self.chain
        if rows is not None and rows.most >= rows.least:
            how = "one persistent kernel for several rows"
            found[_sizes(rows.least, rows.most)] = self._limited(how, rows.name)
        elif rows is not None:
            found["decode of a few rows"] = self._limited("not the kernel for several rows", rows.name)
        elif "rows" in self.refusals:
            found["decode of a few rows"] = f"no persistent kernel for several rows: {self.refusals['rows']}"
        if chain is None:
            return found | ({"the chain": f"none: {self.refusals['chain']}"} if "chain" in self.refusals else {})
        if chain.most < chain.least:
            return found | {"decode of more rows": self._limited("the model's own layers", chain.name)}
        left = [n for n in range(chain.least, chain.most + 1) if rows is None or not rows.least <= n <= rows.most]
        if not left:
            return found | {"the chain": "not used: the kernel for several rows serves its sizes"}
        for first, last in _runs(left):
            size, how = _sizes(first, last), "a chain of Triton kernels"
            how = self._limited(how, chain.name) if last == left[-1] else how
            found[size] = f"{how}; {found[size]}" if size in found else how
        return found

    def _limited(self, how: str, name: str) -> str:
        why = self.limits.get(name)
        return f"{how}; {why}" if why else how

    def refresh(self) -> None:
        """Make the norms' factors again from the parameters as they are now; all other weights are read where the model
        has them. Done every time, because nothing tells whether it is needed: writing to a parameter's `.data` does not
        change its version counter."""
        if self.model is None:
            return
        pairs = [(norm.scale, norm.source, norm.shift) for norm in self.model.norms if norm.source is not None]
        if not pairs:
            return
        scales, sources, shifts = map(list, zip(*pairs, strict=True))
        torch._foreach_copy_(scales, sources)
        if any(shifts):
            torch._foreach_add_(scales, shifts)

    def close(self) -> None:
        """Unload what was loaded. Not while a step runs or a graph holds one."""
        for executor in (self.persistent, self.rows):
            if executor is not None:
                executor.close()
        self.persistent = self.rows = self.chain = None

    def stopped(self) -> bool:
        """Whether a step that has run was given up by its watchdog; what it leaves behind is mended.

        Such a step's logits are NaN. Waits for the device if there was one.
        """
        steps = [executor.step for executor in (self.persistent, self.rows) if executor is not None]
        stopped = [step for step in steps if step.faulted]
        for step in stopped:
            step.repair()
        return bool(stopped)

    def give_up(self) -> None:
        """Let steps that run wait for nobody any more; from any thread."""
        for executor in (self.persistent, self.rows):
            if executor is not None:
                executor.step.give_up()

    def on_all_ranks(self, make: Callable[[], R]) -> R:
        """What a call returns, if it succeeds on all ranks. All ranks must call this; `make` itself waits for none.

        Raises:
            Unfit: it failed on another rank.
            Exception: it failed here.
        """
        if self.share is None:
            return make()
        failure: Exception | None = None
        found: list[R] = []
        try:
            found.append(make())
        except Exception as error:
            if is_fatal(error):
                raise
            failure = error
        told = "" if failure is None else str(failure) if isinstance(failure, Unfit) else described(failure)
        reason = self.share.agree(told)
        if failure is not None:
            raise failure
        if reason:  # this rank can do it, so no rule forbids it: something failed
            self.failures.append(f"fused decode: another rank cannot what this one can: {reason}")
            raise Unfit(reason)
        return found[0]

    def reason_of(self, error: Exception) -> str:
        """Why something does not serve, in words. What one of our rules forbids is only that; every other error is also
        counted as a failure. A lost device is raised."""
        if isinstance(error, CacheMissError) or is_fatal(error):
            raise error
        if isinstance(error, Unfit):
            return str(error)
        logger.debug("fused decode failed", exc_info=error)
        reason = described(error)
        self.failures.append(f"fused decode failed, the model's own layers decode: {reason}")
        return reason

    @torch.inference_mode()
    def try_step(self, executor: Executor, rows: int) -> None:
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
        # Not the padding token: where its embedding is zeros, any kernel gives the right logits.
        inputs.state[0, padding] = model.embedding[:_TRIAL_TOKENS].float().norm(dim=-1).argmax()
        step = self.metadata(rows)
        try:
            try:
                actual = executor.logits(step, None)
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
            except Exception as error:
                if self.share is None:
                    raise
                raise LostRanks(f"a step failed on a rank while the others wait in it: {described(error)}") from error
            self.on_all_ranks(self._check_stopped)
            table = inputs.block_table[padding : padding + 1]
            expected = reference.step(model, self.pages, step.ids[:1], step.positions[:1], table)
            self.on_all_ranks(partial(_check_error, actual, expected))
        finally:
            inputs.state[:, padding] = 0

    def _check_stopped(self) -> None:
        if self.stopped():
            raise Unfit("its trial step was given up by the watchdog")

    def metadata(self, rows: int) -> StepMetadata:
        """A decode step of the rows that the inputs name now."""
        inputs = self.inputs
        ids, positions = (inputs.state[i, inputs.rows[:rows]] for i in range(2))
        slots = inputs.slots[:rows]
        return StepMetadata(inputs.block_table, slots, positions, slots, positions + 1, ids, Phase.DECODE)


def _sizes(least: int, most: int) -> str:
    if least == most:
        return f"decode of {least} row{'s' * (least != 1)}"
    return f"decode of {least} to {most} rows"


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of numbers that follow each other."""
    first = numbers[0]
    for number, behind in zip(numbers, [*numbers[1:], None], strict=True):
        if behind != number + 1:
            yield first, number
            first = behind or 0


def _check_error(actual: Tensor, expected: Tensor) -> None:
    error = float(((actual.float() - expected).norm(dim=-1) / expected.norm()).max())
    if not error < _TOLERANCE:
        raise Unfit(f"its trial step is off by {error:.3g}")
