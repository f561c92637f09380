"""The head for multi-token prediction that a checkpoint carries, as a drafter (its files: `loading.mtp`).

Position p of its own sequence has the model's hidden state there, behind the final norm, beside the embedding of the
token at p + 1; both are normed and made one by `eh_proj`. One decoder layer of the model's own kind attends over these,
and its output, behind a norm of its own, goes to the model's head: it says which token follows. That is what it was
trained for; a further draft takes the normed output in place of a hidden state that the model has not computed yet.

The layer is that of a model of the same class with one layer, so that whatever the class does is done: its rotary
positions, its experts, its latents. Its keys and values lie in pages of the same numbers as the model's, written and
taken back as those of an EAGLE-3 head (`speculation.eagle`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm

from hybridgen.cache import LayerState
from hybridgen.execution.drafting import DraftCall, PrefillCall
from hybridgen.kernels.step.drafts import NO_DRAFT
from hybridgen.models import BoundModel
from hybridgen.models.attention import Phase
from hybridgen.speculation.steps import follow_step, own_step

_NO_NUMBER = -2
"""A draft where the logits held no number that could be chosen: it is counted as dropped."""


class JoinedEmbedding(nn.Module):
    """Stands for the embedding of the head's model: what it gives has the hidden state in it, too."""

    token_norm: Tensor
    hidden_norm: Tensor
    join: Tensor

    def __init__(self, embedding: nn.Module, token_norm: Tensor, hidden_norm: Tensor, join: Tensor, eps: float) -> None:
        """
        Args:
            embedding: the model's.
            token_norm, hidden_norm: [H].
            join: [H, 2 * H].
        """
        super().__init__()
        self.embedding = embedding
        for name, value in (("token_norm", token_norm), ("hidden_norm", hidden_norm), ("join", join)):
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.eps = eps
        self.hidden: Tensor | None = None
        """[T, H], of the next call's tokens; None: zeros."""

    def forward(self, ids: Tensor) -> Tensor:
        """[1, T, H] of ids [1, T]."""
        embedded = self.embedding(ids)
        hidden = torch.zeros_like(embedded) if self.hidden is None else self.hidden[None]
        size = (embedded.shape[-1],)
        both = rms_norm(embedded, size, self.token_norm, self.eps), rms_norm(hidden, size, self.hidden_norm, self.eps)
        return linear(torch.cat(both, dim=-1), self.join)


class MtpDrafter:
    """Drafts with such a head, by each request's own temperature, filters, penalties and noise."""

    name = "mtp"
    wrong = "logits that hold no number"

    def __init__(
        self, bound: BoundModel, joined: JoinedEmbedding, target: BoundModel, states: tuple[LayerState, ...], width: int
    ) -> None:
        """
        Args:
            bound: the head's model, whose embedding is `joined`.
            target: the model.
            states: what `bound.layer_states()` gave, with pages of the size of the engine's.
            width: of a hidden state.
        """
        self.states = states
        self.layers = (len(target.layers),)
        """The final norm, which stands behind the layers."""
        self.width = width
        self._bound = bound
        self._joined = joined
        self._norm = target.final_norm
        self._own_norm = bound.final_norm
        bound.note_inputs((len(bound.layers),))

    @property
    def reach(self) -> int | None:
        """Positions that a query sees at most; None: all of them."""
        return self._bound.reach

    def begin(self, *, slots: int, context: int, vocab_size: int, count: int, device: torch.device) -> None:
        """Allocate what is the same in each step."""
        self._padding_slot = slots - 1
        self._columns = vocab_size
        with torch.inference_mode():  # as what a step computes is
            self._places = torch.arange(count + 1, device=device)
            self._rows = torch.arange(slots, device=device)
            self._first = torch.zeros(1, dtype=torch.int64, device=device)

    def attach(self, block_table: Tensor, rows: int) -> None:
        """Let its layer keep its keys and values in `states`, which are allocated.

        Args:
            block_table: the engine's, int32 [slots, pages].
            rows: tokens of a decode step at most.
        """
        self._step = own_step(block_table)
        self._bound.attach(self.states, self._step, rows)

    def follow(self, call: PrefillCall) -> None:
        """Write the keys and values of a prefill's tokens. Those of each prompt's last one are written again by
        `draft`, when the token behind it is known."""
        own, step = self._step, call.step
        behind = (step.positions + 1).clamp(max=call.text.shape[1] - 1)
        follow_step(own, step)
        own.ids = self._known(call.text[step.slots.long(), behind])
        self._forward(self._norm(_states(call.states)), self._first)

    def draft(self, call: DraftCall) -> Tensor:
        """int64 [B, count]: what each request would take from the head's logits, one after the other."""
        rows = len(call.slots)
        states = _states(call.states)
        fed = len(states) // rows
        positions = (call.lengths - call.brought - 1)[:, None] + self._places[:fed]
        # What was fed and not accepted has no place, nor have rows of padding.
        known = (self._places[:fed] < call.brought[:, None]) & (positions >= 0)
        ids = call.text[call.slots[:, None], (positions + 1).clamp(0, call.text.shape[1] - 1)]
        last = self._rows[:rows] * fed + call.brought - 1
        logits, hidden = self._pass(ids, call.slots, positions, known, self._norm(states), last)
        drafts: list[Tensor] = []
        ends = (call.lengths + call.room)[:, None]
        while True:
            drafts.append(call.choose(self._widened(logits), drafts))
            if len(drafts) == call.most:
                break
            places = (call.lengths + (len(drafts) - 2))[:, None]
            inside = (places >= 0) & (places < ends)
            logits, hidden = self._pass(drafts[-1][:, None], call.slots, places, inside, hidden, None)
        made = torch.stack(drafts, dim=1)
        # Else what can be drafted is banned. What is no number stays so from draft to draft.
        made = made.masked_fill((made < 0) & logits.isnan().any(dim=-1, keepdim=True), _NO_NUMBER)
        return made.masked_fill(self._places[: call.most] >= call.room[:, None], NO_DRAFT)

    def _pass(
        self, ids: Tensor, slots: Tensor, positions: Tensor, known: Tensor, hidden: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, V] behind the last pair of each row, and the head's hidden states [B, H] there.

        Args:
            ids, positions, known: [B, N]; what is not known goes to the dummy page.
            hidden: [B * N, H].
            keep: int64 [B], the last pairs; None: each row has one.
        """
        step = self._step
        step.phase, step.several, step.ids = Phase.DECODE, ids.shape[1] > 1, self._known(ids.flatten())
        step.slots = torch.where(known, slots[:, None], self._padding_slot).flatten().to(torch.int32)
        step.positions = (positions * known).flatten()
        step.rope_lengths = step.positions + 1
        logits, out = self._forward(hidden, keep)
        return logits, self._own_norm(out if keep is None else out[keep])

    def _forward(self, hidden: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        self._joined.hidden = hidden
        try:
            logits = self._bound.forward(self._step.ids, self._step, keep)
        finally:
            self._joined.hidden = None
        [out] = self._bound.take_inputs()
        if out is None:
            raise RuntimeError("the head's norm was not called")
        return logits, out

    def _known(self, ids: Tensor) -> Tensor:
        """Ids that it has."""
        return ids.long().clamp(0, self._columns - 1)

    def _widened(self, logits: Tensor) -> Tensor:
        missing = self._columns - logits.shape[1]
        return pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits[:, : self._columns].contiguous()

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, and what its layer keeps."""
        layer = {f"{name} of its layer": tensor for state in self.states for name, tensor in state.tensors().items()}
        model: Any = self._bound.model
        own = {"places": self._places, "rows": self._rows, "first": self._first}
        return own | layer | self._bound.tensors() | dict(model.named_parameters()) | dict(model.named_buffers())


def _states(states: Tensor | None) -> Tensor:
    if states is None:
        raise RuntimeError("no hidden states came with the step")
    return states
