"""A step on static buffers: what it reads, what it runs, and what it leaves.

Every mode runs the same step. Its inputs lie at fixed addresses, its outputs go into the ring, and it decides nothing
on the host, so it can be recorded once and replayed (`graphs`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hybridgen.cache import LayerState
from hybridgen.execution.drafting import Drafting, PrefillCall
from hybridgen.execution.masks import HostDrafts, TokenMasks
from hybridgen.execution.ring import TokenRing
from hybridgen.execution.scoring import ScoredTokens
from hybridgen.execution.staging import StagedInputs
from hybridgen.execution.state import DeviceState
from hybridgen.fused.inputs import StepInputs
from hybridgen.graphs.executor import Executor, StateExecutor
from hybridgen.graphs.key import LAYERS, GraphKey
from hybridgen.kernels.step.drafts import accept_drafts, feed_drafts
from hybridgen.models import BoundModel
from hybridgen.models.attention import Phase, RunEnds
from hybridgen.sampling import SamplerPlan, SamplerState, remember, sample
from hybridgen.sampling.own import OwnRows

_NEWEST = 0.125
"""The last step's share in what is known of a mask's time."""


class ModelSteps(StagedInputs):
    """The steps of one model on one device: `stage_*` says what the next one reads, `run` is the step."""

    def __init__(
        self,
        bound: BoundModel,
        executors: Mapping[str, Executor],
        *,
        state: DeviceState,
        sampler: SamplerState,
        ring: TokenRing,
        token_budget: int,
        max_context: int | None = None,
        one_copy: bool = True,
        buffers: int = 2,
        drafting: Drafting | None = None,
    ) -> None:
        """
        Args:
            executors: what turns tokens into logits, by name; more may be added later.
            token_budget: tokens of a prefill call at most.
            max_context: tokens of a request at most; None: as many as a call has.
            drafting: what drafts at the end of steps; None: nobody does. The sampler keeps the text for it.
            one_copy, buffers: see `StagedInputs`.
        """
        longest = max_context or token_budget
        super().__init__(state, token_budget=token_budget, longest_run=longest, one_copy=one_copy, buffers=buffers)
        self._bound = bound
        self._executors = executors
        self._sampler = sampler
        self._ring = ring
        self._drafting = drafting
        self._ones = torch.ones(state.max_batch + 1, dtype=torch.int64, device=state.device)
        self.attach(())
        self.agree: Callable[[Tensor], Tensor] | None = None
        """Gives all ranks of a group the tokens that rank 0 chose for rows whose functions it alone has; None where
        there is one process."""
        self._always_keeps_logits = False
        self.logits: Tensor | None = None
        """[max_batch * query_len + 1, vocab_size]: where steps that end at the logits leave them, once `keep_logits()`
        ran."""
        self._hidden: Tensor | None = None
        """[max_batch * query_len + 1, width]: where they leave what a drafter reads of the model's layers."""
        self.masks: TokenMasks | None = None
        """Which tokens rows with a grammar may choose, once `keep_masks()` ran."""
        self._told_drafts: HostDrafts | None = None
        """What the host is told of drafts beside such rows, once `ask_drafts()` ran."""
        self.mask_seconds = 0.0
        """What a mask of one place took of late; 0: none was made."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that outlives a step, the model's parameters and buffers apart, by name."""
        fixed = {
            "block table": self._state.block_table.tensor,
            "state": self._state.table,
            **self._state.draft_tensors(),
            "ones": self._ones,
            **self._ring.tensors(),
            **self.input_tensors(),
        }
        logits = {} if self.logits is None else {"logits": self.logits}
        logits |= {} if self._hidden is None else {"hidden states": self._hidden}
        logits |= {} if self.masks is None else self.masks.tensors()
        layers = {f"{name} of layer {i}": t for i, s in enumerate(self._states) for name, t in s.tensors().items()}
        fixed |= {} if self._drafting is None else self._drafting.tensors()
        tensors = fixed | logits | layers | self._sampler.tensors()
        for executor in self._executors.values():
            tensors |= executor.tensors()
        return tensors

    def attach(self, states: Sequence[LayerState]) -> None:
        """Say what the layers keep between steps."""
        self._states = tuple(states)
        self._to_commit = tuple(state for state in states if not state.rerunnable)

    def mutable(self) -> list[Tensor]:
        """What a step changes, but pages of the cache: with these put back, it can run again."""
        history = self._sampler.history
        optional = self.logits, self._sampler.output_counts, None if history is None else history.text
        return [
            self._state.table,
            self._state.drafts,
            *self._ring.tensors().values(),
            *(tensor for tensor in optional if tensor is not None),
            *(tensor for state in self._to_commit for tensor in state.marks()),
        ]

    def _commit(self, slots: Tensor) -> None:
        """Keep what the step wrote for these slots, int64; the last that a step does."""
        for state in self._to_commit:
            state.commit(slots, self._ones[: slots.shape[0]])

    def inputs(self) -> StepInputs:
        """Where a decode step finds its rows."""
        rows, slots = self._decode["rows"], self._decode["slots"]
        return StepInputs(rows, slots, self._state.table, self._state.block_table.tensor, self._state.padding_slot)

    def keep_logits(self, *, always: bool = False) -> None:
        """Allocate where logits are left, if that has not been done.

        Args:
            always: steps that sample leave theirs too (for validation).
        """
        self._always_keeps_logits |= always
        if self.logits is None:
            shape = self._state.max_batch * self._state.query_len + 1, self._sampler.vocab_size
            self.logits = torch.zeros(shape, dtype=self._bound.logits_dtype, device=self._state.device)
            if self._drafting is not None and self._drafting.layers:
                wide, dtype = (shape[0], self._drafting.width), self._bound.model.dtype
                self._hidden = torch.zeros(wide, dtype=dtype, device=self._state.device)

    def keep_masks(self) -> TokenMasks:
        """Allocate where masks of rows with a grammar lie, if that has not been done."""
        if self.masks is None:
            lines = self._state.max_batch * self._state.query_len + 1
            self.masks = TokenMasks(lines, self._sampler.vocab_size, self._state.device)
        return self.masks

    def ask_drafts(self) -> None:
        """Have the drafts sent to the host that the next step checks, before it is launched: its rows with a grammar
        need them for their masks."""
        if self._told_drafts is None:
            self._told_drafts = HostDrafts(self._state.drafts)
        self._told_drafts.ask()

    def stage_masks(self, own: OwnRows, query_len: int = 1) -> None:
        """Say which tokens the rows with a grammar may choose in the step whose logits come. The host waits for the
        step before that one.

        Args:
            query_len: tokens of a row in the step; above 1 `ask_drafts()` ran before it was launched.
        """
        masks = self.keep_masks()
        own.catch_up()
        drafts = None if query_len == 1 or self._told_drafts is None else self._told_drafts.wait()[:, : query_len - 1]
        lines = [row * query_len + place for row in own.guided for place in range(query_len)]
        bits = masks.open(len(lines))
        begin = time.perf_counter()
        if drafts is None:
            own.fill(bits)
        else:
            own.fill_with_drafts(bits, drafts)
        took = (time.perf_counter() - begin) / len(lines)
        self.mask_seconds += (took - self.mask_seconds) * (_NEWEST if self.mask_seconds else 1.0)
        masks.send(lines)

    def stage_padding(self, key: GraphKey) -> None:
        """Set a step's metadata to padding alone, for warm-up and capture."""
        if key.phase is Phase.DECODE:
            self.stage_decode(())
        else:
            self.stage_prefill((), key.tokens, key.rows)
        if key.is_rest:  # the step that it is the rest of would have brought it in
            self._bring_in(key)
            self.keep_masks().clear()

    def sized(self, key: GraphKey) -> tuple[Tensor, Tensor]:
        """Inputs of a step, as long as its tokens and its rows."""
        inputs = self._decode if key.phase is Phase.DECODE else self._prefill
        return inputs["slots"][: key.tokens], inputs["rows"][: key.rows]

    def run(self, key: GraphKey) -> None:
        """Launch the step that was staged. All of it runs on the device; the host waits for nothing."""
        if key.is_rest and key.sampler is not None:
            self.finish(key, key.sampler)
        elif key.phase is Phase.DECODE:
            self._run_decode(key)
        else:
            self._run_prefill(key)

    def _run_decode(self, key: GraphKey) -> None:
        self._bring_in(key)
        rows, slots = self._decode["rows"][: key.rows], self._decode["slots"][: key.rows]
        state = self._state.read(rows)
        lengths = state.lengths + 1
        if key.query_len == 1:
            self._set(Phase.DECODE, state.last_tokens, slots, state.lengths, lengths)
        else:
            ids, slots, positions = feed_drafts(self._state.table, self._state.drafts, rows, key.query_len)
            self._set(Phase.DECODE, ids, slots, positions, positions + 1, several=True)
        logits = self._executors[key.executor].logits(self.metadata, None)
        hidden = self._read_layers(key)
        if key.sampler is None:
            self._leave(logits, hidden)
        else:
            before = lengths, state.generated
            self._sample(logits, rows, *before, key.sampler, key.query_len, hidden=hidden, quiet=key.quiet)
            self._commit(rows)

    def run_told(self, key: GraphKey, scored: ScoredTokens | None) -> None:
        """Launch the prefill that was staged, whose tokens all go through all layers; leave the log-probabilities of
        prompts with `scored`, if any are wanted."""
        self._run_prefill(key, scored, whole=True)

    def _run_prefill(self, key: GraphKey, scored: ScoredTokens | None = None, *, whole: bool = False) -> None:
        self._bring_in(key)
        inputs, tokens, rows = self._prefill, key.tokens, key.rows
        # One token alone is a decode step: a compiled prefill has a dynamic length, and 1 is always a special case. A
        # recurrence may compute it another way, though, than a prompt's token (`BoundModel.shortest_run`).
        phase = Phase.DECODE if tokens == 1 and self._bound.shortest_run == 1 else Phase.PREFILL
        ids, slots, positions, rope = (inputs[name][:tokens] for name in ("ids", "slots", "positions", "rope"))
        self._set(phase, ids, slots, positions, rope)
        # Where no prompt ends, the head still needs one token: the first. `keep` may still name a place of an earlier,
        # longer call.
        keep = inputs["keep"][:rows] if rows else self._zeros[0]
        if phase is Phase.PREFILL and not whole and self._drafting is None:
            count = max(rows, 1)
            self.metadata.ends = RunEnds(*(inputs[name][:count] for name in ("keep", "rows", "lengths")))
        if scored is not None:
            keep = torch.cat((inputs["keep"][:rows], scored.places))
        logits = self._executors[key.executor].logits(self.metadata, keep)
        hidden = self._read_layers(key)
        history = self._sampler.history
        if self._drafting is not None and history is not None:
            self._drafting.follow(PrefillCall(self.metadata, history.text, hidden))
            hidden = None if hidden is None else hidden.index_select(0, inputs["keep"][:rows])
        if scored is not None:
            scored.take(logits[rows:])
            logits = logits[:rows]
        if rows and key.sampler is None:
            self._leave(logits, hidden)
            return
        if key.sampler is not None and rows:
            self._sample(logits, *self._prefilled(rows), key.sampler, hidden=hidden)
        self._commit(inputs["fed"])

    def finish(self, key: GraphKey, sampler: SamplerPlan, own: OwnRows | None = None, *, is_told: bool = False) -> None:
        """What is left of a step that ended at its logits: sample, publish, advance. Masks that were staged hold where
        there are rows of their own, or the key is of such a rest.

        Args:
            own: rows with functions of their own, which change their logits.
            is_told: another rank has such functions, and says which tokens came out.
        """
        allowed, count = None, key.rows * key.query_len
        if self.masks is not None and (key.is_rest or (own is not None and own.guided)):
            allowed = self.masks.rows[:count], self.masks.bits[:count]
        logits, hidden = self._kept(count), None if self._hidden is None else self._hidden[:count]
        if key.phase is Phase.DECODE:
            rows = self._decode["rows"][: key.rows]
            state = self._state.read(rows)
            before = state.lengths + 1, state.generated
            self._sample(logits, rows, *before, sampler, key.query_len, own, hidden, key.quiet, allowed, is_told)
            self._commit(rows)
        else:
            prefilled = self._prefilled(key.rows)
            self._sample(logits, *prefilled, sampler, own=own, hidden=hidden, allowed=allowed, is_told=is_told)
            self._commit(self._prefill["fed"])

    def _prefilled(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots of the prompts that end in a prefill step, their lengths, and what they generated before."""
        slots, lengths, generated = (self._prefill[name][:rows] for name in ("rows", "lengths", "generated"))
        return slots, lengths, generated

    def _kept(self, rows: int) -> Tensor:
        if self.logits is None:
            raise RuntimeError("no step has left its logits; keep_logits() comes first")
        return self.logits[:rows]

    def _leave(self, logits: Tensor, hidden: Tensor | None = None) -> None:
        self._kept(logits.shape[0]).copy_(logits)
        if hidden is not None and self._hidden is not None:
            self._hidden[: hidden.shape[0]].copy_(hidden)

    def _read_layers(self, key: GraphKey) -> Tensor | None:
        """What the drafter reads of the model's layers in this step; None where nobody does, or the executor runs none
        and leaves nothing (then nobody drafts in such a step)."""
        if self._drafting is None or not self._drafting.layers:
            return None
        if key.executor == LAYERS:
            inputs = self._bound.take_inputs()
            return None if key.quiet else self._drafting.joined(inputs)
        executor = self._executors[key.executor]
        return executor.states(key.tokens) if isinstance(executor, StateExecutor) else None

    def _sample(
        self,
        logits: Tensor,
        rows: Tensor,
        lengths: Tensor,
        generated: Tensor,
        sampler: SamplerPlan,
        query_len: int = 1,
        own: OwnRows | None = None,
        hidden: Tensor | None = None,
        quiet: bool = False,
        allowed: tuple[Tensor, Tensor] | None = None,
        is_told: bool = False,
    ) -> None:
        """Sample the tokens behind `lengths` tokens of each row, publish them, and advance the rows.

        Args:
            hidden: what the drafter reads of the model's layers, of each row of the logits.
            quiet: nobody drafts.
            allowed: see `sampling.sample`.
            is_told: see `finish`.
        """
        if self._always_keeps_logits:
            self._leave(logits)
        slots, positions, before, drafts = rows, lengths, generated, None
        history = self._sampler.history if sampler.history or self._drafting is not None else None
        if query_len > 1:
            places = self._state.places[:query_len]
            slots = rows[:, None].expand(-1, query_len).flatten()
            positions, before = ((value[:, None] + places).flatten() for value in (lengths, generated))
            if sampler.penalties or sampler.history:  # the text at each place has the drafts before it
                drafts = self._state.drafts.index_select(0, rows)[:, : query_len - 1]
            if drafts is not None and sampler.history and history is not None:
                ends = (lengths[:, None] + places[:-1]).flatten()
                remember(drafts.flatten(), rows[:, None].expand_as(drafts).flatten(), ends, history.text)
        sampled = sample(logits, self._sampler, slots, positions, before, sampler, own, drafts, allowed=allowed)
        if self.agree is not None and (is_told or own is not None):
            sampled = sampled._replace(tokens=self.agree(sampled.tokens))
        if history is not None:
            remember(sampled.tokens, slots, positions, history.text)
        brought = None
        if query_len > 1:
            tokens, brought = accept_drafts(sampled.tokens.view(-1, query_len), self._state.drafts, rows)
            sampled = sampled._replace(tokens=tokens)
        told = None
        if self._drafting is not None and history is not None:
            brought = torch.ones_like(lengths) if brought is None else brought
            ends, count = lengths + brought, generated + brought
            room = self._sampler.most_new[rows] - count
            if quiet:
                told = self._drafting.skip(rows, room)
            else:
                last = sampled.tokens.view(rows.shape[0], -1)
                choose = partial(self._expect, rows, ends, count, last, sampler)
                more = hidden, sampler.greedy
                told = self._drafting.draft(rows, ends, room, history.text, choose, query_len - 1, brought, *more)
        counts = self._sampler.output_counts if sampler.penalties else None
        self._ring.finish(sampled, rows, lengths, generated, self._state.table, counts, told)

    def _expect(
        self,
        rows: Tensor,
        lengths: Tensor,
        generated: Tensor,
        last: Tensor,
        sampler: SamplerPlan,
        logits: Tensor,
        drafts: Sequence[Tensor],
    ) -> Tensor:
        """The tokens that rows would take from a drafter's logits, behind so many drafts; see `DraftCall.choose`.

        Args:
            last: int64 [B, Q], what the step brought; below 0: nothing.
        """
        positions = (lengths + len(drafts)).clamp(max=self._sampler.max_context)  # no draft there is kept
        before, behind = generated + len(drafts), None
        if sampler.penalties:
            behind = torch.cat((last, *(draft[:, None] for draft in drafts)), dim=1)
        if sampler.history and drafts and self._sampler.history is not None:
            remember(drafts[-1], rows, positions - 1, self._sampler.history.text)
        plan = sampler._replace(logprobs=None, sampled_logprobs=False)
        return sample(logits, self._sampler, rows, positions, before, plan, behind=behind).tokens
