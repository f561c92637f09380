"""Drafts: the tokens that a drafter expects behind a row's own, made at the end of a step for the next one.

A drafter decides how many tokens a step brings, never which (`kernels.step.drafts`). So nothing that it does costs a
token: one that raises is not asked again, and ids that the model does not have are dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hybridgen.cache import LayerState
from hybridgen.device.failures import is_fatal
from hybridgen.errors import ConfigError, EngineError, HybridgenError, described, shown
from hybridgen.execution.state import DeviceState
from hybridgen.kernels.step.drafts import NO_DRAFT, keep_drafts
from hybridgen.models import StepMetadata

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
    room: Tensor
    """int64 [B]: how many more tokens each row may generate, and so how many more positions its pages hold."""
    choose: Callable[[Tensor, Sequence[Tensor]], Tensor]
    """What the rows' requests would take from logits [B, V] behind their text and the drafts before (int64 [B] each):
    int64 [B], by their own temperature, filters, penalties and noise of that position; -1 where nothing can be chosen.
    V is that of the model whose drafts these are."""
    brought: Tensor
    """int64 [B]: tokens that the step brought to each row, the last ones of its sequence."""
    states: Tensor | None = None
    """[B * Q, width], for a drafter that reads `layers`: what went into these layers for the tokens that the step fed,
    Q of each row, of which the first `brought` are in the row's text. Of a prefill, each prompt's last token alone."""
    greedy: bool = False
    """Whether `choose` would take each row's largest logit, of whatever ids."""


class PrefillCall(NamedTuple):
    """What a prefill fed; tensors on the device."""

    step: StepMetadata
    """Its T tokens, by slot and position."""
    text: Tensor
    """As in `DraftCall`; each prompt's tokens are there, also those that are not fed yet."""
    states: Tensor | None = None
    """[T, width], as in `DraftCall`."""


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


@runtime_checkable
class CachedDrafter(Drafter, Protocol):
    """A drafter with keys and values of its own, at the places of the model's: in pages of the same numbers."""

    @property
    def states(self) -> Sequence[LayerState]:
        """What its layers keep; it has as many pages as the model's."""
        ...

    def follow(self, call: PrefillCall) -> None:
        """Part of a prefill: read the tokens that the model was fed."""
        ...


@runtime_checkable
class StateReader(CachedDrafter, Protocol):
    """A drafter that goes on from the model's own hidden states."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose inputs it reads, side by side in this order."""
        ...

    @property
    def width(self) -> int:
        """Values of all of them together, by token."""
        ...


_TAKEN: dict[int, Drafter] = {}
"""Drafters that engines have, by identity."""


def check_unused(drafter: object) -> None:
    """Raise if another engine has the drafter: it would begin again, and lose what recorded steps of that one write to.

    Raises:
        EngineError: it has.
    """
    if id(drafter) in _TAKEN:
        raise EngineError(
            f"speculation={shown(drafter)} drafts for another engine; make one for each, or close that engine first "
            "(`engine.close()` or `hybridgen.unload()`)"
        )


def take(drafter: Drafter) -> Callable[[], None]:
    """Note that an engine has a drafter; gives what notes that it has it no more.

    Raises:
        EngineError: another engine has it.
    """
    check_unused(drafter)
    _TAKEN[id(drafter)] = drafter  # kept alive, so that no other object gets its identity

    def give_back() -> None:
        _TAKEN.pop(id(drafter), None)

    return give_back


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
        self.wrong = str(getattr(drafter, "wrong", "ids that the model does not have"))
        """What its drafts are that are dropped, in words."""
        self.states: tuple[LayerState, ...] = tuple(drafter.states) if isinstance(drafter, CachedDrafter) else ()
        """What it keeps in pages."""
        self.can_pause = bool(self.states)
        """Whether it pays to leave it out of some steps: it has states, so that each of its passes costs something.
        It then knows nothing of the tokens that those steps bring."""
        reader = drafter if isinstance(drafter, StateReader) else None
        self.layers: tuple[int, ...] = () if reader is None else reader.layers
        """The model's layers whose inputs it reads."""
        self.width = 0 if reader is None else reader.width
        """Values of a token's hidden states that it reads."""
        self.failure: str | None = None
        """Why it is not asked any more."""
        count = self.most = state.query_len - 1
        """Drafts of a row at most."""
        self._none = torch.full((state.max_batch + 1, count), NO_DRAFT, dtype=torch.int64, device=state.device)
        """What a drafter that failed says."""
        try:
            drafter.begin(
                slots=state.max_batch + 1, context=context, vocab_size=vocab_size, count=count, device=state.device
            )
        except (HybridgenError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if is_fatal(error):
                raise
            raise ConfigError(
                f"the drafter {self.name} cannot begin: {described(error)}; mend it, or leave it out"
            ) from error

    def tensors(self) -> dict[str, Tensor]:
        """What steps read and write, by name."""
        own = {"no drafts": self._none}
        theirs = {} if self._drafter is None else self._drafter.tensors()
        return own | {f"{self.name} {name}": tensor for name, tensor in theirs.items()}

    def joined(self, inputs: Sequence[Tensor | None]) -> Tensor | None:
        """Part of a step: what went into the layers, [T, width]; None where nobody reads it.

        Args:
            inputs: [T, hidden] of each of `layers`; None: that layer was not called.
        """
        if self._drafter is None or not self.layers:
            return None
        try:
            missing = [layer for layer, value in zip(self.layers, inputs, strict=True) if value is None]
            if missing:
                raise RuntimeError(f"layer {missing[0]} of the model was not called")
            states = torch.cat([value for value in inputs if value is not None], dim=-1)
            if states.dim() != 2 or states.shape[1] != self.width:
                raise RuntimeError(f"the model's hidden states are {list(states.shape)}, not [tokens, {self.width}]")
            return states
        except Exception as error:
            self._give_up_on(error)
            return None

    def follow(self, call: PrefillCall) -> None:
        """Part of a prefill: a drafter with a cache of its own reads the same tokens."""
        drafter = self._drafter
        if isinstance(drafter, CachedDrafter):
            try:
                drafter.follow(call)
            except Exception as error:
                self._give_up_on(error)

    def draft(
        self,
        rows: Tensor,
        lengths: Tensor,
        room: Tensor,
        text: Tensor,
        choose: Callable[[Tensor, Sequence[Tensor]], Tensor],
        checked: int,
        brought: Tensor,
        states: Tensor | None = None,
        greedy: bool = False,
    ) -> Tensor:
        """Part of a step, before its state moves on: draft behind what each row has now.

        Args:
            rows: int64 [B], each row's slot.
            lengths: int64 [B], tokens of each row's sequence, those of the step included.
            room: int64 [B], how many more each may generate.
            text, choose, brought, states, greedy: see `DraftCall`.
            checked: drafts of each row that the step had room for.

        Returns:
            int64 [B, 3], by row `DraftCounts`.
        """
        most = self._none.shape[1]
        drafts = self._ask(DraftCall(rows, lengths, text, most, room, choose, brought, states, greedy))
        return keep_drafts(drafts, self._state.drafts, rows, room, self._vocab_size, checked)

    def skip(self, rows: Tensor, room: Tensor) -> Tensor:
        """Part of a step in which nobody drafts: what was drafted before is forgotten. Arguments and result as of
        `draft`."""
        none = self._none[: rows.shape[0]]
        return keep_drafts(none, self._state.drafts, rows, room, self._vocab_size, 0)

    def _ask(self, call: DraftCall) -> Tensor:
        none = self._none[: call.slots.shape[0]]
        if self._drafter is None:
            return none
        try:
            drafts = self._drafter.draft(call)
            if _kind(drafts) == _kind(none):
                return drafts
            self._give_up(f"gave {_kind(drafts)}, not {_kind(none)}")
        except Exception as error:
            self._give_up_on(error)
        return none

    def _give_up_on(self, error: Exception) -> None:
        if is_fatal(error):
            raise error
        logger.debug("a drafter failed", exc_info=error)
        self._give_up(f"raised {described(error)}")

    def _give_up(self, why: str) -> None:
        self._drafter = None
        self.failure = f"the drafter {self.name} {why}; steps run without drafts"
        self._fall_back(self.failure)


def _kind(drafts: object) -> str:
    """What has to be the same in drafts as in the tensor that stands for none, in words."""
    if not isinstance(drafts, Tensor):
        return f"a value of type {type(drafts).__name__}"
    return f"{drafts.dtype} {list(drafts.shape)} on {drafts.device}"
