"""An EAGLE-3 head that drafts (Li, Wei, Zhang and Zhang, arXiv:2503.01840; what its files hold: `loading.eagle`).

The head goes on from what the model itself computed. Position p of its own sequence has the hidden states that three
of the model's layers were given there, joined by `fc`, beside the embedding of the token at p + 1. One decoder layer
attends over these pairs, and a small head says which token follows. A further draft takes the layer's own output in
place of hidden states that the model has not computed yet: k drafts are a chain of k passes.

Its keys and values lie in pages of the same numbers as the model's, as those of `ModelDrafter` do. A position's pair is
known once the token behind it is: a prefill writes all but that of the prompt's last token, and each step those of the
tokens that it brought, over what its drafts had left there. Where a prompt's first pages come from the prefix cache,
the pair at their end has the token with which another prompt went on; that can cost a draft.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hybridgen.cache import LayerPages, LayerShape, LayerState, PagedKV
from hybridgen.device.watched import has_forward_hooks, has_global_hooks
from hybridgen.errors import ConfigError
from hybridgen.execution.drafting import DraftCall, PrefillCall
from hybridgen.kernels.attention.ops import (
    Options,
    Places,
    decode_attention,
    make_schedule,
    schedule_attention,
    write_kv,
)
from hybridgen.kernels.step.drafts import NO_DRAFT
from hybridgen.loading import Checkpoint
from hybridgen.loading.eagle import EagleFiles
from hybridgen.models import BoundModel
from hybridgen.models.decoder import Unfit
from hybridgen.sampling.choice import choose_greedy
from hybridgen.speculation.head import EagleHead

if TYPE_CHECKING:  # it imports Triton, which is not there everywhere
    from hybridgen.fused.chain.draft_head import HeadChain

logger = logging.getLogger(__name__)

_NO_NUMBER = -2
"""A draft where the logits held no number that could be chosen: it is counted as dropped."""


class EagleDrafter:
    """Drafts with a head, by each request's own temperature, filters, penalties and noise."""

    wrong = "logits that hold no number"
    reach = None
    """It sees all positions."""

    def __init__(self, name: str, head: EagleHead, bound: BoundModel, layers: tuple[int, ...], page_size: int) -> None:
        """
        Args:
            name: as statistics show it.
            bound: the model, whose embedding is used if the head has none.
            layers: of the model, whose inputs are read.
        """
        shape = head.shape
        self.name = name
        self.layers = layers
        self.width = len(layers) * shape.model_hidden
        """Values of each token's hidden states."""
        self.head = head
        self._bound = bound
        self._pages = PagedKV(LayerShape(shape.kv_heads, shape.head_dim, shape.head_dim), page_size, head.dtype)
        self._options = Options(shape.head_dim**-0.5)
        self._chain: HeadChain | None = None

    @property
    def states(self) -> tuple[LayerState, ...]:
        """The pages of its layer."""
        return (self._pages,)

    @property
    def pages(self) -> LayerPages:
        """Keys and values of its layer."""
        return self._pages.pages

    @property
    def block_table(self) -> Tensor:
        """The engine's, int32 [slots, pages]."""
        return self._table

    @property
    def padding_slot(self) -> int:
        """The slot whose pages nobody reads."""
        return self._padding_slot

    def begin(self, *, slots: int, context: int, vocab_size: int, count: int, device: torch.device) -> None:
        """Allocate what is the same in each step."""
        self._padding_slot = slots - 1
        self._columns = vocab_size
        with torch.inference_mode():  # as what a step computes is
            self._places = torch.arange(count + 1, device=device)
            self._rows = torch.arange(slots, device=device)

    def attach(self, block_table: Tensor, rows: int) -> None:
        """Use the pages, which are allocated.

        Args:
            block_table: the engine's, int32 [slots, pages].
            rows: tokens of a decode step at most.
        """
        self._table = block_table
        self._schedule = make_schedule(*self._pages.pages, block_table, self.head.shape.heads, rows, 0, 0)
        self.use_chain(self._chain)

    def follow(self, call: PrefillCall) -> None:
        """Write the keys and values of a prefill's tokens. Those of each prompt's last one are written again by
        `draft`, when the token behind it is known."""
        step = call.step
        behind = (step.positions + 1).clamp(max=call.text.shape[1] - 1)
        ids = call.text[step.slots.long(), behind]
        hidden = self.head.joined(_states(call.states))
        _, keys, values = self.head.projected(self._embedded(ids), hidden, step.positions)
        write_kv(keys, values, self._at(step.slots, step.positions))

    def draft(self, call: DraftCall) -> Tensor:
        """int64 [B, count]: what each request would take from the head's logits, one after the other."""
        chain = self._chain
        if chain is not None and len(call.slots) <= chain.most_rows:
            try:
                return self.draft_by(chain, call)
            except Unfit as why:  # a live module's embedding has changed since
                logger.debug("a head drafts by PyTorch's operators: %s", why)
        return self.draft_by(None, call)

    def draft_by(self, chain: HeadChain | None, call: DraftCall) -> Tensor:
        """`draft`, by a chain of kernels, or by PyTorch's operators."""
        if chain is not None:
            return self._drafted_by(chain, call)
        rows, head = len(call.slots), self.head
        states = _states(call.states)
        fed = len(states) // rows
        joined = head.joined(states).view(rows, fed, -1)
        positions = (call.lengths - call.brought - 1)[:, None] + self._places[:fed]
        # What was fed and not accepted has no place, nor have rows of padding.
        known = (self._places[:fed] < call.brought[:, None]) & (positions >= 0)
        positions = positions * known
        ids = call.text[call.slots[:, None], (positions + 1).clamp(max=call.text.shape[1] - 1)]
        slots = torch.where(known, call.slots[:, None], self._padding_slot).to(torch.int32)
        flat = joined.flatten(0, 1)
        queries, keys, values = head.projected(self._embedded(ids.flatten()), flat, positions.flatten())
        write_kv(keys, values, self._at(slots.flatten(), positions.flatten()))
        last = self._rows[:rows] * fed + call.brought - 1
        at = self._at(slots.flatten()[last], positions.flatten()[last])
        hidden = self._attended(queries[last], flat[last], at)
        drafts: list[Tensor] = []
        ends = call.lengths + call.room
        while True:
            logits = head.logits(hidden)
            column = self._column(call, logits, drafts)
            drafts.append(head.named(column) if call.greedy else column)
            if len(drafts) == call.most:
                break
            places = call.lengths + (len(drafts) - 2)
            inside = places < ends
            places = places * inside
            at = self._at(torch.where(inside, call.slots, self._padding_slot).to(torch.int32), places)
            query, key, value = head.projected(self._embedded(drafts[-1]), hidden, places)
            hidden = self._attended(query, hidden, at, key, value)
        return self._closed(call, torch.stack(drafts, dim=1), logits)

    def _drafted_by(self, chain: HeadChain, call: DraftCall) -> Tensor:
        embedding, table = self.embedding, self._table
        args = call.slots, call.lengths, call.brought, call.room
        logits = chain.first(_states(call.states), call.text, *args, embedding, table, self._padding_slot)
        columns = [self._column(call, logits, [])]
        while len(columns) < call.most:
            logits = chain.further(len(columns), columns[-1], embedding, table, named=call.greedy)
            columns.append(self._column(call, logits, columns))
        made = torch.stack(columns, dim=1)
        return chain.named(made, call.room) if call.greedy else self._closed(call, made, logits)

    def _column(self, call: DraftCall, logits: Tensor, drafts: list[Tensor]) -> Tensor:
        """int64 [B]: what is drafted on the head's logits: where all rows are greedy a column of these, else an id.

        What is as wide as the model's vocabulary is made where requests look at more than the largest logit.
        """
        if call.greedy:
            return choose_greedy(logits)
        return call.choose(self._widened(self.head.spread(logits)), drafts)

    def _closed(self, call: DraftCall, made: Tensor, logits: Tensor) -> Tensor:
        # Else what can be drafted is banned. What is no number stays so from draft to draft.
        broken = logits.isnan().any(dim=-1, keepdim=True)
        made = made.masked_fill((made < 0) & broken, _NO_NUMBER)
        return made.masked_fill(self._places[: call.most] >= call.room[:, None], NO_DRAFT)

    def use_chain(self, chain: HeadChain | None) -> None:
        """From now on run the passes that it has room for by a chain of kernels, which was tried; None: none."""
        self._chain = chain
        if chain is not None:
            chain.attach((self._pages.pages,))

    @property
    def embedding(self) -> Tensor:
        """The table [vocabulary, H] of the embedding that it uses.

        Raises:
            Unfit: the model's embedding computes more than a look-up, or is of another dtype than the head.
        """
        if self.head.embedding is not None:
            return self.head.embedding
        module = self._bound.model.get_input_embeddings()
        if type(module) is not nn.Embedding or module.max_norm is not None:
            raise Unfit(f"the model's embedding is a {type(module).__name__}, which computes more than a look-up")
        if has_global_hooks() or has_forward_hooks(module) or "forward" in vars(module):
            raise Unfit("the model's embedding has hooks or a replaced forward")
        if module.weight.dtype != self.head.dtype or not module.weight.is_contiguous():
            raise Unfit(f"the model's embedding is {module.weight.dtype}, and the head {self.head.dtype}")
        return module.weight.detach()

    def _attended(
        self, query: Tensor, hidden: Tensor, at: Places, key: Tensor | None = None, value: Tensor | None = None
    ) -> Tensor:
        """The layer's output for one pair of each row, whose keys and values are written first if they are given."""
        schedule_attention(at, self.head.shape.heads, 0, 0, self._schedule)
        attended = decode_attention(query, at, self._options, k=key, v=value, schedule=self._schedule)
        return self.head.finished(attended, self.head.around(hidden))

    def _at(self, slots: Tensor, positions: Tensor) -> Places:
        return Places(*self._pages.pages, self._table, slots, positions)

    def _embedded(self, ids: Tensor) -> Tensor:
        """[T, H]; ids int [T], of which some may be no tokens."""
        ids = ids.long().clamp(0, self.head.shape.vocab - 1)
        if self.head.embedding is not None:
            return self.head.embedding[ids]
        return cast(nn.Module, self._bound.model.get_input_embeddings())(ids)

    def _widened(self, logits: Tensor) -> Tensor:
        """As wide as the model's own logits, which may have columns that are no ids."""
        missing = self._columns - logits.shape[1]
        return nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits

    def tensors(self) -> dict[str, Tensor]:
        """Its weights and pages."""
        own = {"places": self._places, "rows": self._rows, "schedule": self._schedule}
        pages = {f"{name} of its layer": tensor for name, tensor in self._pages.tensors().items()}
        if self._chain is not None:
            own |= {f"chain {name}": tensor for name, tensor in self._chain.tensors().items()}
        return own | pages | dict(self.head.named_parameters()) | dict(self.head.named_buffers())


def _states(states: Tensor | None) -> Tensor:
    if states is None:
        raise RuntimeError("no hidden states came with the step")
    return states


def check_head(head: EagleFiles, model: Checkpoint) -> tuple[int, ...]:
    """The model's layers whose inputs a head reads.

    Raises:
        ConfigError: the head is for another model.
    """
    config: Any = model.hf_config
    shape, whose = head.shape, f"drafter={head.name!r}"
    for what, own, theirs in (
        ("a vocabulary of", shape.vocab, getattr(config, "vocab_size", None)),
        ("hidden states of", shape.model_hidden, getattr(config, "hidden_size", None)),
    ):
        if own != theirs:
            raise ConfigError(
                f"{whose} is a head for {what} {own}, and {model.name!r} has {theirs}; give one that was trained for it"
            )
    count = int(getattr(config, "num_hidden_layers", 0))
    layers = shape.layers or (2, count // 2, count - 3)
    if min(layers) < 0 or max(layers) >= count:
        raise ConfigError(
            f"{whose} reads what goes into the layers {layers}, and {model.name!r} has {count} of them; give a head "
            "that was trained for it"
        )
    own = "embed_tokens.weight" in head.names
    if not own and shape.hidden != shape.model_hidden:
        raise ConfigError(
            f"{whose} is {shape.hidden} wide and brings no embed_tokens.weight, and the embedding of {model.name!r} is "
            f"{shape.model_hidden} wide; give the head with its own"
        )
    return layers
