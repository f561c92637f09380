"""Launches steps: stages what a call needs, asks the router how it runs, and hands back the launched step."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from hybridgen.cache import LayerState
from hybridgen.compilation.aot import LayerUnits
from hybridgen.compilation.layers import CompiledLayers
from hybridgen.device.capture import CAPTURING
from hybridgen.execution.drafting import DRAFTS, Drafter, Drafting
from hybridgen.execution.executors import LayersExecutor
from hybridgen.execution.hidden import CapturedStates
from hybridgen.execution.owner import Following
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.execution.replays import Replays
from hybridgen.execution.ring import LaunchedStep, TokenRing
from hybridgen.execution.scoring import ScoredTokens, score_budget
from hybridgen.execution.state import DeviceState
from hybridgen.execution.step import ModelSteps
from hybridgen.execution.stream import OnStream, on_its_stream
from hybridgen.fused.decode import FusedDecode
from hybridgen.graphs import Executor, GraphKey, GraphSettings, GraphStore, Recorder, Route, Router
from hybridgen.graphs.recorder import this_thread
from hybridgen.graphs.timings import feeds_faster
from hybridgen.models import BoundModel
from hybridgen.models.twin import Twin
from hybridgen.sampling import SamplerPlan, SamplerState
from hybridgen.sampling.own import OwnRows
from hybridgen.telemetry.statistics import Counters

logger = logging.getLogger(__name__)


class Steady(NamedTuple):
    """How decode steps run while the batch and the store stay as they are."""

    slots: tuple[int, ...]
    version: int
    sampler: SamplerPlan
    route: Route
    replays: bool
    """Whether that is a graph's launch and nothing else, which needs nothing set up around it."""
    own: OwnRows | None = None
    """Rows with functions of their own."""


class ModelRunner(OnStream):
    """Launches prefill and decode calls of one model on one device."""

    def __init__(
        self,
        bound: BoundModel,
        *,
        vocab_size: int,
        max_batch: int,
        max_pages: int,
        token_budget: int,
        max_context: int | None = None,
        query_len: int = 1,
        compile_backend: str | None = None,
        units: LayerUnits | None = None,
        offline: bool = False,
        one_copy: bool = True,
        buffers: int = 2,
        drafter: Drafter | None = None,
        fall_back: Callable[[str], None] = warnings.warn,
        twin: Twin[Any] | None = None,
    ) -> None:
        """
        Args:
            max_pages: pages of a row of the block table.
            token_budget: tokens of a prefill call at most.
            max_context: tokens of a request at most.
            query_len: tokens of a row in a decode step at most.
            compile_backend: None runs every step eagerly.
            units, offline: see `CompiledLayers`.
            one_copy, buffers: see `ModelSteps`.
            drafter: guesses what comes behind each row, for steps of several tokens; `query_len` is above 1 then.
            fall_back: told when a layer runs eagerly that should not, and why.
            twin: whose tree the bound model is, where its owner can change it; None: nobody can.
        """
        device = bound.model.device
        super().__init__(device)
        self.bound = bound
        self.token_budget = token_budget
        self.max_tokens = min(token_budget, max_batch * (max_context or token_budget))
        """Tokens that one prefill call can have."""
        self.max_batch = max_batch
        self.fall_back = fall_back
        self.following = Following(bound, twin)
        """What is known of the model's owner; see `following.begin_call`."""
        self.state = DeviceState(max_batch, max_pages, device, query_len=query_len)
        context = {} if max_context is None else {"max_context": max_context}
        keeps_text = drafter is not None
        self.sampler = SamplerState(max_batch + 1, vocab_size, device, **context, keeps_text=keeps_text)
        self.drafting: Drafting | None = None
        """What drafts at the end of steps; None: nobody does."""
        if drafter is not None:
            longest = self.sampler.max_context
            self.drafting = Drafting(drafter, self.state, vocab_size=vocab_size, context=longest, fall_back=fall_back)
            bound.note_inputs(self.drafting.layers)
        self.ring = TokenRing(max_batch, device, query_len=query_len, tells_drafts=keeps_text)
        self.layers = LayersExecutor(bound)
        """The executor that serves every step."""
        self.executors: dict[str, Executor] = {self.layers.name: self.layers}
        """By name, in order of preference; the layers, which serve every step, come last."""
        self.fused: FusedDecode | None = None
        self.steps = ModelSteps(
            bound,
            self.executors,
            state=self.state,
            sampler=self.sampler,
            ring=self.ring,
            token_budget=token_budget,
            one_copy=one_copy,
            buffers=buffers,
            drafting=self.drafting,
            **context,
        )
        if compile_backend is not None:
            self.layers.compiled = CompiledLayers(
                bound.layers,
                self.steps.metadata,
                backend=compile_backend,
                max_batch=max_batch * query_len,
                token_budget=token_budget,
                fall_back=fall_back,
                units=units,
                offline=offline,
            )
        self._check_addresses = False
        self._refreshes = False
        """Whether the fused kernels' copies of weights are to be made again."""
        self._steady: dict[tuple[int, bool], Steady] = {}
        """By tokens a row and whether drafting pauses, of the batch that is staged."""
        self.use_graphs(GraphSettings(max_rows=max_batch), recorder=None, why_plain="no graphs", counters=Counters())

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Tokens a row of decode steps that check drafts; none where nobody drafts."""
        return () if self.drafting is None else tuple(n + 1 for n in DRAFTS if 0 < n < self.state.query_len)

    @property
    def compiled(self) -> CompiledLayers | None:
        """The compiled layers; None where layers run eagerly."""
        return self.layers.compiled

    @property
    def all_states(self) -> tuple[LayerState, ...]:
        """What the model's layers keep between steps, and then those of the model that drafts, if one does."""
        return self.states if self.drafting is None else (*self.states, *self.drafting.states)

    def attach(self, states: Sequence[LayerState]) -> None:
        """Let the layers keep their state here from now on. Not after something was recorded, or decode was fused.

        Args:
            states: what `BoundModel.layer_states()` gave, allocated.
        """
        self.states = tuple(states)
        self._by_slot = tuple(state for state in states if state.bytes_per_slot)
        self.bound.attach(states, self.steps.metadata, self.max_batch * self.state.query_len)
        self.steps.attach(states)

    def use_fused(self, fused: FusedDecode | None) -> None:
        """From now on prefer these fused executors where they serve a step; None: the layers serve all."""
        self.fused = fused
        preferred = () if fused is None else fused.executors
        self.executors.clear()
        self.executors.update({executor.name: executor for executor in (*preferred, self.layers)})
        self._route_anew()

    def use_graphs(
        self,
        settings: GraphSettings,
        *,
        recorder: Callable[[GraphKey, bool], Recorder | None] | None,
        why_plain: str,
        note: str = "",
        counters: Counters,
        notify: Callable[..., None] | None = None,
        check_addresses: bool = False,
        validates: bool = False,
    ) -> None:
        """How steps are recorded; see `GraphStore`, `Router` and `EngineConfig`."""
        self._check_addresses = check_addresses
        if validates:
            self.steps.keep_logits(always=True)
        self.graphs = GraphStore(
            settings, self, recorder=recorder, counters=counters, notify=notify, validates=validates
        )
        self._why = why_plain, note
        self._route_anew()

    def _route_anew(self) -> None:
        why_plain, note = self._why
        executors = tuple(self.executors.values())
        self.router = Router(
            self.graphs,
            executors,
            self.steps,
            why_plain=why_plain,
            note=note,
            reads_layers=self.drafting is not None and bool(self.drafting.layers),
            keeps_executor=self.fused is not None and self.fused.equal_bits,
        )
        """Decides how each step runs."""
        self._replays = Replays(self.bound, self.steps, self.ring, self.graphs, self.router)
        self._steady = {}

    @on_its_stream
    def admit(self, *admissions: Admission) -> None:
        """Give slots to new requests; all of them in a few launches."""
        slots = [admission.slot for admission in admissions]
        self.state.block_table.assign_all(slots, [admission.pages for admission in admissions])
        for state in self._by_slot:
            for slot in slots:
                state.reset(slot)
        self.sampler.assign_all([(each.slot, each.sampling, each.prompt_ids, ()) for each in admissions])
        self._steady = {}

    @on_its_stream
    def prefill(self, chunks: Sequence[PrefillChunk]) -> LaunchedStep:
        """Run the chunks in one call; sample for those that end their prompt, score what they have targets for."""
        slots = tuple(chunk.slot for chunk in chunks if chunk.last)
        sampler, own = self.sampler.needs(slots), self.sampler.own(slots)
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        key = GraphKey.prefill(tokens, len(slots), self._recorded(sampler, own))
        if any(chunk.targets or chunk.hidden for chunk in chunks):
            return self._prefill_told(chunks, key, sampler, own)
        route = self.router.route(key)
        if not self.steps.has_room(len(chunks), route.key.tokens - tokens):
            route = self.router.plain(key, f"the padding to bucket {route.key.tokens} has no room")
        self.steps.stage_prefill(chunks, route.key.tokens, route.key.rows)
        return self._launch(route, len(slots), sampler, own)

    def _recorded(self, sampler: SamplerPlan, own: OwnRows | None) -> SamplerPlan | None:
        """The sampler of a recording that can serve a step: none where rows have functions of their own, so that it
        ends at the logits."""
        if own is None:
            return sampler
        self.steps.keep_logits()
        return None

    def _prefill_told(
        self, chunks: Sequence[PrefillChunk], key: GraphKey, sampler: SamplerPlan, own: OwnRows | None
    ) -> LaunchedStep:
        scored = ScoredTokens(chunks, self.device) if any(chunk.targets for chunk in chunks) else None
        route = self.router.plain(key, "it scores prompts" if scored else "its hidden states are wanted")
        route.run = functools.partial(self.steps.run_told, route.key, scored)
        hidden = CapturedStates(chunks, self.bound) if any(chunk.hidden for chunk in chunks) else None
        self.steps.stage_prefill(chunks, key.tokens, key.rows)
        with nullcontext() if hidden is None else hidden.listening():
            launched = self._launch(route, key.rows, sampler, own)
        launched.scores, launched.hidden = scored, hidden
        return launched

    @property
    def score_budget(self) -> int:
        """Tokens that one prefill call tells the log-probabilities of at most."""
        return score_budget(self.sampler.vocab_size, self.bound.logits_dtype)

    def decode(self, slots: tuple[int, ...], query_len: int = 1, *, quiet: bool = False) -> LaunchedStep:
        """Run one decode step of these slots: sample a token for each, and check `query_len - 1` drafts of each.

        While the caller hands in the same tuple, nothing is looked up and nothing is sent to the device: a recorded
        step is replayed, and an event recorded behind it.

        Args:
            quiet: nobody drafts at its end.
        """
        steady = self._steady.get((query_len, quiet))
        if steady is None or slots is not steady.slots or self.router.version != steady.version:
            return self._decode(slots, query_len, quiet)
        if steady.replays and self.is_here():
            return self._launch(steady.route, len(slots), steady.sampler)
        return self._decode_again(steady)

    def refresh_fused(self) -> None:
        """Have the next decode step begin with what the fused kernels copied of the weights made again. A prefill in
        front of it does not wait for that."""
        self._refreshes = self.fused is not None
        self._steady = {}

    def _refresh(self) -> None:
        if self._refreshes and self.fused is not None:
            self.fused.refresh()
        self._refreshes = False

    @on_its_stream
    def _decode(self, slots: tuple[int, ...], query_len: int, quiet: bool) -> LaunchedStep:
        self._refresh()
        staged = next(iter(self._steady.values()), None)
        sampler, own = self.sampler.needs(slots), self.sampler.own(slots)
        version = self.router.version  # as it is now: the step may drop its own graph
        several = query_len if self._may_check(own) else 1
        key = GraphKey.decode(len(slots), self._recorded(sampler, own), query_len=several, quiet=quiet)
        route = self.router.route(key)
        if staged is None or slots is not staged.slots:
            self._steady = {}
            self.steps.stage_decode(slots)
        launched = self._launch(route, len(slots), sampler, own)
        self._steady[query_len, quiet] = Steady(slots, version, sampler, route, own is None and route.only_replays, own)
        return launched

    @on_its_stream
    def decode_beside(self, slots: tuple[int, ...], chunks: Sequence[PrefillChunk]) -> LaunchedStep:
        """Run one decode step of these slots in which each token of the chunks is one more row; none has targets.

        It samples for the slots, and then for the chunks that end their prompt.
        """
        self._steady = {}
        rows = (*slots, *(chunk.slot for chunk in chunks if chunk.last))
        sampler = self.sampler.needs(rows)
        route = self.router.route(GraphKey.decode(len(slots) + sum(len(chunk.tokens) for chunk in chunks), sampler))
        self._refresh()
        self.steps.stage_together(slots, chunks)
        return self._launch(route, len(rows), sampler)

    def feeds_faster_beside(self, rows: int, room: int) -> bool:
        """Whether so many tokens of prompts take less beside so many rows of a decode step than in a prefill call, by
        the times of recorded steps; False where these are not known."""
        return feeds_faster({each.key: each.recorded.seconds for each in self.graphs.recordings}, rows, room)

    def decode_seconds(self, slots: tuple[int, ...], query_len: int, *, quiet: bool = False) -> float | None:
        """What the recording takes that would run such a step; None where none would. One that is missing is wanted."""
        steady = next((steady for steady in self._steady.values() if steady.slots is slots), None)
        sampler = self.sampler.needs(slots) if steady is None else steady.sampler
        own = self.sampler.own(slots) if steady is None else steady.own
        if not self._may_check(own):
            return None
        key = GraphKey.decode(len(slots), self._recorded(sampler, own), query_len=query_len, quiet=quiet)
        route = self.router.route(key)
        parts = [route] if own is None else [route, self.router.rest(route, sampler)]
        times = [part.recording.recorded.seconds for part in parts if part.recording is not None]
        for part in parts:
            if part.recording is None and part.wanted is not None:
                self.graphs.want(part.wanted)
        if len(times) < len(parts):
            return None
        if own is not None:  # the host makes the masks, while the device is at the forward
            times[0] = max(times[0], self.steps.mask_seconds * len(own.guided) * query_len)
        return sum(times)

    def _may_check(self, own: OwnRows | None) -> bool:
        """Whether a step may check drafts. Not where a row has functions of its own: they are called with its text, and
        the host has to know how long that is. Nor where it has a grammar and there are other ranks, which have none."""
        return own is None or not (own.calls or self.steps.agree is not None)

    @on_its_stream
    def _decode_again(self, steady: Steady) -> LaunchedStep:
        return self._launch(steady.route, len(steady.slots), steady.sampler, steady.own)

    def _launch(self, route: Route, rows: int, sampler: SamplerPlan, own: OwnRows | None = None) -> LaunchedStep:
        recording = route.recording
        if recording is not None and recording.recorded.thread not in (None, this_thread()):
            self.fall_back(
                "cudagraph trees replay on the thread that recorded them; steps of others run in another way"
            )
            route = self.router.by_any_thread(route, "its cudagraph tree belongs to another thread")
        samples = route.key.rows > 0
        if samples:
            self.ring.reserve()
        try:
            if own is not None and own.guided and route.key.query_len > 1:
                self.steps.ask_drafts()
            route = self._run(route)
            reason = route.reason if own is None else self._finish(route, sampler, own)
            self._count(route)
            if samples:
                logprobs, tokens = sampler.logprobs, route.key.query_len
                launched = self.ring.launched(rows, logprobs, route.kind, reason, tokens)
                if own is not None:
                    own.launched(launched)
                return launched
        except BaseException:
            self.recover()
            raise
        return LaunchedStep(self.ring, 0, 0, None, route.kind, route.reason)

    def _finish(self, route: Route, sampler: SamplerPlan, own: OwnRows) -> str:
        """Run what is left of a step that ended at its logits; returns how the step ran, in words.

        The device is at the forward meanwhile: the masks are made from the tokens of the step before.
        """
        if own.guided:
            self.steps.stage_masks(own, route.key.query_len)
        if own.calls or self.steps.agree is not None:  # which the host runs; other ranks are told what it chose
            self.steps.finish(route.key, sampler, own)
            return route.reason
        rest = self._run(self.router.rest(route, sampler))
        self._count(rest)
        return rest.reason

    def _count(self, route: Route) -> None:
        if route.recording is None and route.key.is_rest:
            pass  # its step is counted
        elif route.recording is None:
            self.graphs.count_miss(route.key.phase, route.reason)
        else:
            self.graphs.count_hit(route.recording, padded=route.padded)
        if route.wanted is not None:
            self.graphs.want(route.wanted)

    @on_its_stream
    def recover(self) -> None:
        """After a step that was not launched as a whole: what host and device believe is made the same again."""
        self.ring.resynchronize()
        self._steady = {}

    def _run(self, route: Route) -> Route:
        """Run a step; returns how it ran in the end."""
        if route.recording is not None:
            return self._replays.run(route, route.recording)
        route.run()
        return route

    def prepare(self, key: GraphKey) -> None:
        """Stage a step of padding, with what its key needs allocated."""
        if key.sampler is None or key.is_rest:
            self.steps.keep_logits()
        if key.sampler is not None:
            self.sampler.allocate(key.sampler)
        self.steps.stage_padding(key)
        self._steady = {}

    def run(self, key: GraphKey) -> None:
        """Launch the step that was staged, without a recording."""
        self.steps.run(key)

    def run_padding(self, key: GraphKey) -> None:
        """Run a step of padding, which writes to the dummy page only."""
        self.prepare(key)
        try:
            self.run(key)
        finally:
            self.ring.resynchronize()

    @on_its_stream
    def capture(self, keys: Sequence[GraphKey], progress: Callable[[], object]) -> None:
        """Record these steps. Not while requests run: they would wait for it."""
        self.ring.drain()
        try:
            self.graphs.capture(map(self.router.served, keys), progress)
        finally:
            self.after_capture()

    @on_its_stream
    def capture_pending(self) -> bool:
        """Record the step that was wanted most, if any; returns whether more are. Not while requests run."""
        if not self.graphs.pending:
            return False
        self.ring.drain()
        try:
            return self.graphs.capture_pending()
        finally:
            self.after_capture()

    def after_capture(self) -> None:
        """What follows a capture: its addresses are noted, and host and device agree again."""
        for recording in self.graphs.recordings:
            if recording.addresses is None and self._check_addresses:
                recording.addresses = self._replays.addresses()
        self.recover()

    def disable_compilation(self) -> None:
        """Run every later step eagerly."""
        if self.layers.compiled is not None:
            self.layers.compiled.remove()
            self.layers.compiled = None

    def close(self) -> None:
        """Wait for the device, release what was recorded, and give the layers back as they were."""
        if self.stream is not None:
            try:
                self.stream.synchronize()
            except torch.AcceleratorError as error:
                logger.debug("the device is lost: %s", error)
        self.graphs.close()
        self.router.forget()
        self._steady = {}
        fused = self.fused or self.following.unused
        if fused is not None:
            with CAPTURING:
                fused.close()
        self.fused = None
        self.following.forget()
        self.executors.clear()
        self.disable_compilation()
