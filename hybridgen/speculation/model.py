"""A smaller model of the same vocabulary that drafts.

Its keys and values lie in pages of the same numbers as the model's own, found by the same block table: where the model
has a request's token, so has it. So it has nothing of its own to admit, share, evict or take back: a prefill feeds both
the same tokens, pages that the prefix cache finds hold what both computed, and a wrong draft is a length.

A decode step ends with its drafts: one pass over the last two tokens of each row, then one for each further draft.
Two, because of the drafts that it made last time, it never fed the last one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybridgen.cache import LayerState
from hybridgen.errors import ConfigError
from hybridgen.execution.drafting import DraftCall, PrefillCall
from hybridgen.kernels.step.drafts import NO_DRAFT
from hybridgen.loading import Checkpoint
from hybridgen.loading.support import keeps_states
from hybridgen.models import BoundModel
from hybridgen.models.attention import Phase
from hybridgen.models.contexts import scaled_context
from hybridgen.speculation import KEEPS_STATE, refusal
from hybridgen.speculation.steps import follow_step, own_step

_FED = 2
"""Last tokens of a row that the first pass of a step feeds."""
_NO_NUMBER = -2
"""A draft where the logits held no number that could be chosen: it is counted as dropped."""


class ModelDrafter:
    """Drafts with a model, by each request's own temperature, filters, penalties and noise."""

    wrong = "logits that hold no number"

    def __init__(self, name: str, bound: BoundModel, vocab_size: int, states: tuple[LayerState, ...]) -> None:
        """
        Args:
            name: as statistics show it.
            bound: the model, on the device.
            vocab_size: ids that it has, from 0 on.
            states: what `bound.layer_states()` gave, with pages of the size of the engine's.
        """
        self.name = name
        self.states = states
        self._bound = bound
        self._vocab_size = vocab_size

    @property
    def reach(self) -> int | None:
        """Positions that a query sees at most in any layer; None where a layer sees all of them."""
        return self._bound.reach

    def begin(self, *, slots: int, context: int, vocab_size: int, count: int, device: torch.device) -> None:
        """Allocate what is the same in each step."""
        self._padding_slot = slots - 1
        self._columns = vocab_size
        with torch.inference_mode():  # as what a step computes is
            self._back = torch.arange(-_FED, 0, device=device)
            self._last = torch.arange(_FED - 1, _FED * slots, _FED, device=device)
            self._first = torch.zeros(1, dtype=torch.int64, device=device)
            self._places = torch.arange(count, device=device)

    def attach(self, block_table: Tensor, rows: int) -> None:
        """Let its layers keep their keys and values in `states`, which are allocated.

        Args:
            block_table: the engine's, int32 [slots, pages].
            rows: tokens of a decode step at most.
        """
        self._step = own_step(block_table)
        self._bound.attach(self.states, self._step, rows)

    def follow(self, call: PrefillCall) -> None:
        """Read what a prefill fed; nobody looks at the logits, of which there is one row."""
        own, step = self._step, call.step
        follow_step(own, step)
        own.ids = self._known(step.ids)
        self._bound.forward(own.ids, own, self._first)

    def draft(self, call: DraftCall) -> Tensor:
        """int64 [B, count]: what each request would take from this model's logits, one after the other."""
        slots, ends = call.slots[:, None], (call.lengths + call.room)[:, None]
        positions = call.lengths[:, None] + self._back
        ids = call.text[slots, positions.clamp(0, call.text.shape[1] - 1)].long()
        logits = self._feed(ids, slots, positions, ends, self._last[: len(slots)])
        drafts: list[Tensor] = []
        while True:
            drafts.append(call.choose(logits, drafts))
            if len(drafts) == call.most:
                break
            positions = call.lengths[:, None] + (len(drafts) - 1)
            logits = self._feed(drafts[-1][:, None], slots, positions, ends, None)
        made = torch.stack(drafts, dim=1)
        made = made.masked_fill(made < 0, _NO_NUMBER)
        return made.masked_fill(self._places >= call.room[:, None], NO_DRAFT)

    def _feed(self, ids: Tensor, slots: Tensor, positions: Tensor, ends: Tensor, keep: Tensor | None) -> Tensor:
        """Logits [B, V] behind the last of each row's tokens. What lies behind a row's pages goes to the dummy page.

        Args:
            ids, positions: int64 [B, N].
            slots, ends: int64 [B, 1]: each row's slot, and the positions that its pages hold.
        """
        inside = (positions >= 0) & (positions < ends)
        step = self._step
        step.phase, step.several, step.ids = Phase.DECODE, ids.shape[1] > 1, self._known(ids.flatten())
        step.slots = torch.where(inside, slots, self._padding_slot).flatten().to(torch.int32)
        step.positions = (positions * inside).flatten()
        step.rope_lengths = step.positions + 1
        logits = self._bound.forward(step.ids, step, keep)
        missing = self._columns - logits.shape[1]
        return pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits[:, : self._columns].contiguous()

    def _known(self, ids: Tensor) -> Tensor:
        """Ids that it has: a model's embedding may have more rows than that of the one that drafts for it."""
        return ids.clamp(0, self._vocab_size - 1)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, and what its layers keep."""
        layers = {
            f"{name} of layer {i}": t for i, state in enumerate(self.states) for name, t in state.tensors().items()
        }
        parts = (dict(self._bound.model.named_parameters()), dict(self._bound.model.named_buffers()))
        own = {"back": self._back, "last": self._last, "first": self._first, "places": self._places}
        return own | layers | self._bound.tensors() | parts[0] | parts[1]


def check_drafter(drafter: Checkpoint, model: Checkpoint, max_context: int) -> None:
    """Raise if a model cannot draft for another one, before its weights are read.

    Raises:
        ConfigError: its vocabulary is another one, its context is shorter than `max_context`, or it keeps states.
    """
    whose = f"drafter={drafter.name!r}"
    why = vocabulary_differs(drafter, model)
    if why is not None:
        raise ConfigError(f"{whose} has another vocabulary than {model.name!r}: {why}; give a model of the same family")
    limit = drafter.max_context
    if limit is not None and scaled_context(drafter.hf_config, limit) < max_context:
        raise ConfigError(
            f"{whose} has a context of {limit} tokens, and requests may have {max_context}; set max_context={limit} or "
            "less, or give another drafter"
        )
    if keeps_states(drafter.hf_config):
        raise _cannot(drafter.name, KEEPS_STATE)
    if drafter.device != model.device:
        raise ConfigError(f"{whose} is on {drafter.device} and the model on {model.device}; move it there")


def check_states(name: str, bound: BoundModel, max_context: int, page_size: int, dtype: torch.dtype) -> None:
    """Raise if a model's wrong drafts cannot be taken back.

    Raises:
        ConfigError: they cannot.
    """
    why = refusal(bound, max_context, page_size, dtype)
    if why is not None:
        raise _cannot(name, why)


def _cannot(name: str, why: str) -> ConfigError:
    return ConfigError(f"drafter={name!r} cannot draft: {why}; give another one")


def vocabulary_differs(one: Checkpoint, other: Checkpoint) -> str | None:
    """How two vocabularies differ, in words; None where each id means the same in both.

    Without two tokenizers only the numbers of ids can be compared.
    """
    if one.tokenizer is None or other.tokenizer is None:
        if one.vocab_size == other.vocab_size:
            return None
        return f"{one.vocab_size} ids, not {other.vocab_size}, and no tokenizer to compare them by"
    mine, theirs = _by_id(one.tokenizer.get_vocab()), _by_id(other.tokenizer.get_vocab())
    wrong = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    if not wrong:
        return None
    first = wrong[0]
    return f"{len(wrong)} ids mean something else, such as {first}: {mine.get(first)!r}, not {theirs.get(first)!r}"


def _by_id(vocabulary: Mapping[str, int]) -> dict[int, str]:
    return {index: token for token, index in vocabulary.items()}
