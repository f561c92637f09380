"""Drafts: the tokens that a drafter expects behind a row's own, made at the end of a step for the next one.

A drafter decides how many tokens a step brings, never which (`execution.verification`). So nothing that it does costs a
token: one that raises is not asked again, and ids that the model does not have are dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hybridgen.device.failures import is_fatal
from hybridgen.errors import described
from hybridgen.execution.state import DeviceState
from hybridgen.execution.verification import NO_DRAFT
from hybridgen.kernels.step.advance import REJECTED

logger = logging.getLogger(__name__)

DRAFTS = (0, 3, 7)
"""How many drafts of each row a decode step can check. Few, because each is a set of recordings of its own."""


class DraftCall(NamedTuple):
    """What a drafter is asked at the end of a step, by row; tensors on the device."""

    slots: Tensor
    """int64 [B]: each row's slot; rows of padding have the last one."""
    lengths: Tensor
    """int64 [B]: tokens of each row's sequence, those included that the step brought."""
    text: Tensor
    """int32 [slots, context]: each slot's tokens by position. What lies behind a row's length is not its text."""
    most: int
    """Drafts of a row at most."""


class Drafter(Protocol):
    """Guesses what comes behind each row's text. Part of a step that can be recorded: all that it does runs on the
    device, the host waits for nothing, and what it keeps stays where it is."""

    @property
    def name(self) -> str:
        """As statistics show it."""
        ...

    def begin(self, *, slots: int, context: int, vocab_size: int, count: int, device: torch.device) -> None:
        """Allocate what it keeps. Called once, before the first step.

        Args:
            slots: rows of the text, the padding slot's included.
            context: tokens of a sequence at most.
            count: drafts of a row at most.
        """
        ...

    def draft(self, call: DraftCall) -> Tensor:
        """int64 [B, count]: the drafts of each row, -1 from the first place on where it has none."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What outlives a step, by name."""
        ...


class Drafting:
    """Asks the drafter at the end of steps, and keeps what it says for the next ones."""

    def __init__(
        self,
        drafter: Drafter,
        state: DeviceState,
        *,
        vocab_size: int,
        context: int,
        fall_back: Callable[[str], None],
    ) -> None:
        """
        Args:
            vocab_size: ids that the model's logits have.
            context: tokens of a sequence at most.
            fall_back: told why there are no drafts any more.
        """
        self._drafter: Drafter | None = drafter
        self._state = state
        self._vocab_size = vocab_size
        self._fall_back = fall_back
        self.name = drafter.name
        self.failure: str | None = None
        """Why it is not asked any more."""
        count = state.query_len - 1
        self._places = torch.arange(count, device=state.device)
        self._none = torch.full((state.max_batch + 1, count), NO_DRAFT, dtype=torch.int64, device=state.device)
        """What a drafter that failed says."""
        drafter.begin(
            slots=state.max_batch + 1, context=context, vocab_size=vocab_size, count=count, device=state.device
        )

    def tensors(self) -> dict[str, Tensor]:
        """What steps read and write, by name."""
        own = {"draft places": self._places, "no drafts": self._none}
        theirs = {} if self._drafter is None else self._drafter.tensors()
        return own | {f"{self.name} {name}": tensor for name, tensor in theirs.items()}

    def draft(self, slots: Tensor, accepted: Tensor, lengths: Tensor, room: Tensor, text: Tensor) -> Tensor:
        """Part of a step, before its state moves on: draft behind what each row has now.

        Args:
            slots: int64 [B].
            accepted: int64 [B, Q], the tokens of each row, `REJECTED` behind them.
            lengths: int64 [B], tokens of each row's sequence before those.
            room: int64 [B], how many tokens each row could generate behind its text before those. One of them is
                chosen by the next step itself, the others may be drafted: so no draft lies behind a row's limit.
            text: see `DraftCall`.

        Returns:
            int64 [B, 2]: drafts that wait for the next step, and drafts that were dropped.
        """
        brought = (accepted != REJECTED).sum(dim=1)
        drafts = self._ask(DraftCall(slots, lengths + brought, text, self._places.shape[0]))
        real = slots[:, None] != self._state.padding_slot
        known = (drafts >= 0) & (drafts < self._vocab_size) & (self._places < (room - brought - 1)[:, None]) & real
        kept = known.cumprod(dim=1).bool()
        self._state.drafts.index_copy_(0, slots, torch.where(kept, drafts, NO_DRAFT))
        dropped = ((drafts < NO_DRAFT) | (drafts >= self._vocab_size)) & real
        return torch.stack((kept.sum(dim=1), dropped.sum(dim=1)), dim=1)

    def _ask(self, call: DraftCall) -> Tensor:
        none = self._none[: call.slots.shape[0]]
        if self._drafter is None:
            return none
        try:
            drafts = self._drafter.draft(call)
            if drafts.shape == none.shape and drafts.dtype is torch.int64:
                return drafts
            failure = f"gave {drafts.dtype} {list(drafts.shape)}, not {none.dtype} {list(none.shape)}"
        except Exception as error:
            if is_fatal(error):
                raise
            logger.debug("a drafter failed", exc_info=error)
            failure = f"raised {described(error)}"
        self._drafter = None
        self.failure = f"the drafter {self.name} {failure}; steps run without drafts"
        self._fall_back(self.failure)
        return none
