"""The function behind Hugging Face's attention interface, and what it needs to know of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from hybridgen.kernels.attention.ops import (
    Options,
    Places,
    decode_attention,
    prefill_attention,
    schedule_attention,
    write_kv,
)
from hybridgen.kernels.attention.rotary import HeadNorms, rotate_and_write
from hybridgen.models.visibility import Visibility

# Hugging Face routes by substring of this name ("flash", "sdpa", "/", "|" each trigger something), so it has none.
ATTENTION_NAME = "hybridgen"
SITES_NAME = "hybridgen_sites"


class Phase(StrEnum):
    """Which attention a step runs."""

    PREFILL = "prefill"
    """Runs of consecutive tokens, one run per request."""
    DECODE = "decode"
    """The same number of tokens for each request: one, or several where drafts are checked."""


class RunEnds(NamedTuple):
    """The last tokens of the prompts that end in a prefill."""

    places: torch.Tensor
    """int64 [K]: where they are among the packed tokens."""
    slots: torch.Tensor
    """int64 [K]: their requests; behind them the padding slot, whose tokens are any."""
    lengths: torch.Tensor
    """int64 [K]: of the prompts; 0 for padding."""


@dataclass(eq=False, slots=True)
class StepMetadata:
    """Where the T packed tokens of a step belong. One object per engine; its fields are set before each step."""

    block_table: torch.Tensor
    """int32 [max_batch, max_pages]: page ids of each slot."""
    slots: torch.Tensor
    """int32 [T]: the slot of each token."""
    positions: torch.Tensor
    """int64 [T]: the position of each token in its request."""
    query_starts: torch.Tensor
    """int32 [max_batch + 2]: where each request's run of tokens starts, padded with T. Read by prefill only."""
    rope_lengths: torch.Tensor
    """int64 [T]: the request's length as rotary scaling sees it (see `models.rope`)."""
    ids: torch.Tensor
    """int64 [T]: the tokens."""
    phase: Phase = Phase.DECODE
    fed: torch.Tensor | None = None
    """int64 [max_batch + 1]: in prefill the slot of each run, then the padding slot. Read by models whose layers keep a
    state by slot, as the two below are."""
    runs: tuple[tuple[int, bool], ...] = ()
    """In prefill the length of each run, and whether it is its request's first; known to the host."""
    packed: tuple[Any, Any] | None = None
    """What mixers made of `runs` on the device, and of which (`models.mixers`)."""
    state_places: tuple[torch.Tensor, torch.Tensor] | None = None
    """int64 each: where states are read and written (`cache.slot_state`), of each token in decode, of each slot in
    `fed` in prefill."""
    several: bool = False
    """Whether a decode step has several tokens a request: then the keys of all are written before any is read."""
    ends: RunEnds | None = None
    """In a prefill whose last layer goes on from its keys and values with these tokens alone; None: with all."""
    writes_only: bool = False
    """Whether a prefill's attention writes keys and values, and what it returns is not read."""

    @contextmanager
    def writing_only(self) -> Iterator[None]:
        """Inside, attention writes and does not attend."""
        self.writes_only = True
        try:
            yield
        finally:
            self.writes_only = False

    @contextmanager
    def at(self, ends: RunEnds) -> Iterator[None]:
        """Inside, it is a decode step of these tokens of the prefill."""
        before = self.phase, self.slots, self.positions, self.rope_lengths, self.ids, self.ends
        self.phase, self.ends, self.ids = Phase.DECODE, None, self.ids.index_select(0, ends.places)
        # Positions lie behind something, as in a decode step's state: compiled layers are specialised to that.
        positions = torch.stack((ends.lengths, (ends.lengths - 1).clamp(min=0)))[1]
        self.slots, self.positions, self.rope_lengths = ends.slots.to(torch.int32), positions, ends.lengths
        try:
            yield
        finally:
            self.phase, self.slots, self.positions, self.rope_lengths, self.ids, self.ends = before


class AttentionCall(NamedTuple):
    """One attention call of a layer: all that an implementation of attention is given."""

    query: torch.Tensor
    """[T, num_heads, key_dim]"""
    new: tuple[torch.Tensor, torch.Tensor]
    """The tokens' keys [T, num_kv_heads, key_dim] and values [T, num_kv_heads, value_dim]; or their latents
    [T, 1, rank] and rotary keys [T, 1, rope] (`models.latent`)."""
    scale: float
    sees: Visibility
    softcap: float
    """0 for none."""
    sinks: torch.Tensor | None
    """[num_heads] logits that take part in the softmax's denominator only (GPT-OSS)."""


class StateBinding(Protocol):
    """What hangs on an attention module: its layer's state, and how to attend to it."""

    sees: Visibility

    def attend(self, module: nn.Module, call: AttentionCall) -> torch.Tensor:
        """Write what is new and attend: [T, num_heads, value_dim]."""


class KVFactors(NamedTuple):
    """By which a layer's queries, keys, values and results are multiplied, so that its pages hold scaled ones: float32
    [num_heads, 1] or [num_kv_heads, 1] each. A factor on keys is one on queries; one on values is one on results."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    result: torch.Tensor


class LayerBinding:
    """What one attention module needs beyond its inputs; an attribute of the module.

    An attribute, because some models drop the keyword arguments that others hand down to attention, and no layer
    index, because one would give each layer its own compiled graph.
    """

    __slots__ = ("factors", "keys", "reads_only", "schedule", "sees", "step", "values")

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: StepMetadata,
        sees: Visibility,
        schedule: torch.Tensor,
        reads_only: bool = False,
        factors: KVFactors | None = None,
    ) -> None:
        """See the arguments.

        Args:
            schedule: shared by the layers that are alike; see `kernels.attention.ops.make_schedule`.
            reads_only: the pages are an earlier layer's, which wrote the step's keys and values already.
            factors: of pages that hold scaled keys and values.
        """
        self.keys = keys
        self.values = values
        self.step = step
        self.sees = sees
        self.schedule = schedule
        self.reads_only = reads_only
        self.factors = factors

    def places(self) -> Places:
        """Where the step's tokens lie in this layer's cache."""
        step = self.step
        return Places(self.keys, self.values, step.block_table, step.slots, step.positions)

    def attend(self, module: nn.Module, call: AttentionCall) -> torch.Tensor:
        """Write the step's keys and values, unless the pages are another layer's, and attend to them."""
        factors = self.factors
        if factors is None:
            return self._attend(call)
        # The dtype stays: what is added by rounding here is little beside the pages' 8 bits.
        (k, v), dtype = call.new, call.query.dtype
        query = (call.query * factors.query).to(dtype)
        new = (k * factors.key).to(dtype), (v * factors.value).to(dtype)
        return (self._attend(call._replace(query=query, new=new)) * factors.result).to(dtype)

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        step, (k, v) = self.step, call.new
        places = self.places()
        options = Options(call.scale, call.sees.window, call.sees.chunk, call.softcap, call.sinks)
        if step.phase is Phase.DECODE and not step.several and not self.reads_only:
            return decode_attention(call.query, places, options, k=k, v=v, schedule=self.schedule)
        # All of them, before any is read: requests of one prefill call can share pages.
        if not self.reads_only:
            write_kv(k, v, places)
        if step.writes_only:
            return call.query.new_empty(*call.query.shape[:2], v.shape[-1])
        if step.phase is Phase.DECODE:  # each token is a row of its own, whose position says what it sees
            return decode_attention(call.query, places, options, schedule=self.schedule)
        return prefill_attention(call.query, places, step.query_starts, options)

    def rotate_and_attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norms: HeadNorms,
        scale: float,
        softcap: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalise and rotate heads, write keys and values, and attend; see `kernels.attention.rotary`."""
        places = self.places()
        options = Options(scale, self.sees.window, self.sees.chunk, softcap, sinks)
        q = rotate_and_write(q, k, v, cos, sin, norms, places)
        if self.step.writes_only:
            return q.new_empty(*q.shape[:2], v.shape[-1])
        if self.step.phase is Phase.DECODE:
            return decode_attention(q, places, options, schedule=self.schedule)
        return prefill_attention(q, places, self.step.query_starts, options)

    def write_schedule(self, query_heads: int) -> None:
        """Schedule decode attention of the step, for all layers that share the schedule."""
        schedule_attention(self.places(), query_heads, self.sees.window, self.sees.chunk, self.schedule)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write the step's keys and values into the cache and attend to it.

    Args:
        query: [1, num_heads, T, key_dim], the step's tokens packed in one row.
        key: [1, num_kv_heads, T, key_dim]; value alike with value_dim. From modules that hand on their latents, these
            and the rotary keys, [1, 1, T, ...].
        attention_mask: always None: without a registered mask function, Hugging Face builds none. What a query sees
            is in the module's binding, as the probe read it.
        s_aux: [num_heads] attention-sink logits (GPT-OSS).

    Returns:
        [1, T, num_heads, value_dim], None
    """
    binding: StateBinding = module._hybridgen  # type: ignore[assignment]
    call = AttentionCall(
        query[0].transpose(0, 1),
        (key[0].transpose(0, 1), value[0].transpose(0, 1)),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        binding.sees,
        abs(softcap or 0.0),
        s_aux,
    )
    return binding.attend(module, call).unsqueeze(0), None


def note_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Note who attends and with which shapes; return zeros of the right shape, or what the note returns."""
    noted = module._hybridgen_note(module, query, key, value, attention_mask, kwargs)  # type: ignore[operator]
    if noted is not None:
        return noted, None
    tokens = query.shape[2]
    return query.new_zeros(query.shape[0], tokens, query.shape[1], value.shape[-1]), None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
AttentionInterface.register(SITES_NAME, note_attention)
