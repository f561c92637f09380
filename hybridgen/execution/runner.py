"""Launches steps: stages what a call needs, finds how it runs, and hands back the launched step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import cast

import torch
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from hybridgen.execution.compiled import CompiledLayers
from hybridgen.execution.graphs import GraphSettings, GraphStore, Recorder, Recording, Route
from hybridgen.execution.graphs.validation import validate
from hybridgen.execution.ring import LaunchedStep, TokenRing
from hybridgen.execution.state import DeviceState
from hybridgen.execution.statistics import Counters
from hybridgen.execution.steps import ModelSteps, PrefillChunk, StepKey
from hybridgen.kvcache import LayerPages
from hybridgen.models import BoundModel
from hybridgen.models.attention import Phase
from hybridgen.sampling import ResolvedSampling, SamplerPlan, SamplerState

logger = logging.getLogger(__name__)

WARM_UP_RUN = 7
"""Tokens of the warm-up prefill: few enough for the first page, and no dimension of a model."""

WARM_UP_ROWS = 3


class ModelRunner:
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
        compile_backend: str | None = None,
        one_copy: bool = True,
        buffers: int = 2,
        fall_back: Callable[[str], None] = warnings.warn,
    ) -> None:
        """
        Args:
            max_pages: pages of a row of the block table.
            token_budget: tokens of a prefill call at most.
            max_context: tokens of a request at most.
            compile_backend: None runs every step eagerly.
            one_copy, buffers: see `ModelSteps`.
            fall_back: told when a layer runs eagerly that should not, and why.
        """
        device = bound.model.device
        self._bound = bound
        self.device = device
        self._fall_back = fall_back
        self._token_budget = token_budget
        self._max_tokens = min(token_budget, max_context or token_budget)
        self._max_batch = max_batch
        self.state = DeviceState(max_batch, max_pages, device)
        self.sampler = SamplerState(max_batch + 1, vocab_size, device)
        self.ring = TokenRing(max_batch, device)
        self.steps = ModelSteps(
            bound,
            state=self.state,
            sampler=self.sampler,
            ring=self.ring,
            token_budget=token_budget,
            one_copy=one_copy,
            buffers=buffers,
        )
        self.compiled: CompiledLayers | None = None
        if compile_backend is not None:
            self.compiled = CompiledLayers(
                bound.layers,
                self.steps.metadata,
                backend=compile_backend,
                max_batch=max_batch,
                token_budget=token_budget,
                fall_back=fall_back,
            )
        self._check_addresses = False
        self._batch: tuple[int, ...] | None = None
        self._plan = SamplerPlan()
        self._route: tuple[int, Route] | None = None
        self.use_graphs(GraphSettings(max_rows=max_batch), recorder=None, why_plain="no graphs", counters=Counters())

    def attach(self, pages: tuple[LayerPages, ...]) -> None:
        """Use these pages from now on. Not after something was recorded."""
        self._bound.attach(pages, self.steps.metadata)

    def use_graphs(
        self,
        settings: GraphSettings,
        *,
        recorder: Callable[[StepKey, bool], Recorder | None] | None,
        why_plain: str,
        counters: Counters,
        notify: Callable[..., None] | None = None,
        check_addresses: bool = False,
        validates: bool = False,
    ) -> None:
        """How steps are recorded; see `GraphStore` and `EngineConfig`."""
        self._check_addresses = check_addresses
        if validates:
            self.steps.keep_logits(always=True)
        self.graphs = GraphStore(
            settings,
            recorder=recorder,
            prepare=self._prepare,
            run=self.steps.run,
            finish=self.steps.finish,
            plain_kind=self._plain_kind,
            why_plain=why_plain,
            counters=counters,
            notify=notify,
            validates=validates,
        )
        self._batch = None

    @torch.inference_mode()
    def admit(self, slot: int, pages: Sequence[int], sampling: ResolvedSampling, prompt_ids: Sequence[int]) -> None:
        """Give a slot to a new request."""
        self.state.block_table.assign(slot, pages)
        self.sampler.assign(slot, sampling, prompt_ids, ())
        self._batch = None

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[PrefillChunk]) -> LaunchedStep:
        """Run the chunks in one call; sample for those that end their prompt."""
        slots = tuple(chunk.slot for chunk in chunks if chunk.last)
        plan = self.sampler.needs(slots)
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        route = self.graphs.route(StepKey(Phase.PREFILL, tokens, len(slots), plan))
        self.steps.stage_prefill(chunks, route.key.tokens, route.key.rows)
        return self._launch(route, len(slots), plan)

    @torch.inference_mode()
    def decode(self, slots: tuple[int, ...]) -> LaunchedStep:
        """Run one decode step of these slots and sample a token for each.

        While the caller hands in the same tuple, nothing is looked up and nothing is sent to the device.
        """
        if slots is not self._batch or self._route is None or self._route[0] != self.graphs.version:
            self._plan = self.sampler.needs(slots)
            key = StepKey(Phase.DECODE, len(slots), len(slots), self._plan)
            self._route = self.graphs.version, self.graphs.route(key)
            self._batch = slots
        self.steps.stage_decode(slots)
        return self._launch(self._route[1], len(slots), self._plan)

    def _launch(self, route: Route, rows: int, plan: SamplerPlan) -> LaunchedStep:
        if route.recording is not None and route.recording.recorded.thread not in (None, get_ident()):
            self._fall_back("cudagraph trees replay on the thread that recorded them; steps of others run without")
            route = self._plain_route(route, "its cudagraph tree belongs to another thread")
        if route.key.rows:
            self.ring.reserve()
        try:
            if route.recording is not None and (self._check_addresses or not route.recording.checked):
                route = self._checked(route, route.recording)
            else:
                route.run()
        except BaseException:
            self.ring.resynchronize()
            raise
        self.graphs.count(route)
        if not route.key.rows:
            return LaunchedStep(self.ring, 0, 0, None, route.kind, route.reason)
        return self.ring.launched(rows, plan.logprobs, route.kind, route.reason)

    def _checked(self, route: Route, recording: Recording) -> Route:
        """Run a step whose recording is not to be trusted yet; returns how it ran in the end."""
        if recording.addresses is not None:
            moved = [name for name, address in self._addresses().items() if recording.addresses.get(name) != address]
            if moved:
                self.graphs.drop(recording, f"moved since the capture: {', '.join(moved[:3])}")
                plain = self._plain_route(route, "a tensor of its graph moved")
                plain.run()
                return plain
        if recording.checked:
            route.run()
            return route
        recording.checked = True
        wrong = validate(self, recording)  # runs the step, whatever comes out
        if route.finish is not None:
            route.finish()
        if wrong is None:
            return route
        self.graphs.drop(recording, wrong)
        return self._plain_route(route, "its graph was found wrong")

    def _plain_route(self, route: Route, reason: str) -> Route:
        """The same step, padding and all, without the recording."""

        def run() -> None:
            self.steps.run(route.key)
            if route.finish is not None:
                route.finish()

        return Route(route.key, run, self._plain_kind(), reason)

    def _plain_kind(self) -> str:
        return "eager" if self.compiled is None else "compiled"

    def _addresses(self) -> dict[str, int]:
        """Where everything lies that a recorded step reads or writes."""
        model = self._bound.model
        parts = (dict(model.named_parameters()), dict(model.named_buffers()), self.steps.tensors())
        return {name: tensor.data_ptr() for part in parts for name, tensor in part.items()}

    def _prepare(self, key: StepKey) -> None:
        if key.plan is None:
            self.steps.keep_logits()
        else:
            self.sampler.allocate(key.plan)
        self.steps.stage_padding(key)
        self._batch = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile prefill, decode of several rows and of one. Writes to the dummy page only.

        Where a backend's choices depend on the number of tokens (grouped matrix products of experts in bfloat16 do, in
        torch 2.11), there is a graph for each part of the range that the sizes tried here meet.
        """
        if self.compiled is None:
            return
        self.compiled.install()
        try:
            self._compile([WARM_UP_RUN], [WARM_UP_ROWS, 1])
        except ConstraintViolationError as error:
            logger.debug("not one graph for all sizes: %s", error)
            self.compiled.strict = False
            rows = [2**i for i in range(self._max_batch.bit_length())]
            self._compile([WARM_UP_RUN, *(2**i for i in range(4, 14))], [WARM_UP_ROWS, *rows, self._max_batch])

    def _compile(self, runs: Sequence[int], rows: Sequence[int]) -> None:
        plan = SamplerPlan()
        prefill = dict.fromkeys(min(run, self._token_budget) for run in runs)
        decode = dict.fromkeys(min(row, self._max_batch) for row in rows)
        keys = [StepKey(Phase.PREFILL, run, 1, plan) for run in prefill]
        keys += [StepKey(Phase.DECODE, row, row, plan) for row in decode]
        with cast(CompiledLayers, self.compiled).warming_up():
            for key in keys:
                self._run_padding(key)

    @torch.inference_mode()
    def exercise(self) -> None:
        """Run a few sizes of prefill and decode: on CUDA, kernels have variants for sizes.

        They are compiled, loaded and chosen on their first use, which takes up to half a second each: not in a user's
        step. Writes to the dummy page only.
        """
        plan = SamplerPlan()
        for tokens in _spread(self._max_tokens):
            self._run_padding(StepKey(Phase.PREFILL, tokens, 1, plan))
        for rows in _spread(self._max_batch):
            self._run_padding(StepKey(Phase.DECODE, rows, rows, plan))
        torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def capture(self, keys: Sequence[StepKey], progress: Callable[[], None]) -> None:
        """Record these steps. Not while requests run: they would wait for it."""
        self.ring.drain()
        self.graphs.capture(keys, progress)
        self._after_capture()

    @torch.inference_mode()
    def capture_pending(self) -> bool:
        """Record the step that was wanted most, if any; returns whether more are. Not while requests run."""
        if not self.graphs.pending:
            return False
        self.ring.drain()
        more = self.graphs.capture_pending()
        self._after_capture()
        return more

    def _after_capture(self) -> None:
        for recording in self.graphs.recordings:
            if recording.addresses is None and self._check_addresses:
                recording.addresses = self._addresses()
        self.ring.resynchronize()
        self.steps.stage_decode(())
        self._batch = None

    def _run_padding(self, key: StepKey) -> None:
        self._prepare(key)
        self.steps.run(key)
        self.ring.resynchronize()

    @torch.inference_mode()
    def measure_activations(self) -> int:
        """Bytes that the largest prefill call allocates at its peak on CUDA (0 elsewhere).

        Runs with padding alone, so it writes to the dummy page only.
        """
        if self.device.type != "cuda":
            return 0
        key = StepKey(Phase.PREFILL, self._max_tokens, 1, SamplerPlan())
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._run_padding(key)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        # The sampler works on [max_batch, vocab_size] in float32: logits, processed, sorted values and ids, noise.
        sampling = 8 * 4 * self._max_batch * self.sampler.vocab_size
        torch.cuda.empty_cache()
        return peak + sampling

    def disable_compilation(self) -> None:
        """Run every later step eagerly."""
        if self.compiled is not None:
            self.compiled.remove()
            self.compiled = None

    def close(self) -> None:
        """Release what was recorded, and give the layers back as they were."""
        self.graphs.close()
        self.disable_compilation()


def _spread(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
