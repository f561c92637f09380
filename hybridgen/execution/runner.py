"""Launches steps: stages what a call needs, finds how it runs, and hands back the launched step."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from hybridgen.cache import KeyValueState
from hybridgen.compilation.aot import LayerUnits
from hybridgen.compilation.layers import CompiledLayers
from hybridgen.device.capture import CAPTURING
from hybridgen.device.failures import is_fatal
from hybridgen.errors import described
from hybridgen.execution import numerics
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.execution.ring import LaunchedStep, TokenRing
from hybridgen.execution.state import DeviceState
from hybridgen.execution.step import ModelSteps
from hybridgen.execution.validation import validate
from hybridgen.graphs import GraphSettings, GraphStore, Recorder, Recording, Route
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.recorder import this_thread
from hybridgen.models import BoundModel
from hybridgen.sampling import SamplerPlan, SamplerState
from hybridgen.sampling.state import every_kind
from hybridgen.telemetry.statistics import Counters

logger = logging.getLogger(__name__)

WARM_UP_RUN = 7
"""Tokens of the warm-up prefill: few enough for the first page, and no dimension of a model."""

WARM_UP_ROWS = 3

_NODE_BYTES = 128 * 2**20
"""For the nodes of all graphs; a 1B model's took 1 to 6 MiB each on an H200."""

P = ParamSpec("P")
R = TypeVar("R")


def on_its_stream(
    function: Callable[Concatenate[ModelRunner, P], R],
) -> Callable[Concatenate[ModelRunner, P], R]:
    """Run a method of the runner, or a function of one, in inference mode, on the runner's own device and stream.

    Steps share buffers, and only the order of one stream keeps them apart; callers may be on another device, on a
    stream of their own, or on another thread.
    """

    @functools.wraps(function)
    def run(runner: ModelRunner, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode():
            if runner._is_here():
                return function(runner, *args, **kwargs)
            with torch.cuda.stream(cast(torch.cuda.Stream, runner.stream)):
                return function(runner, *args, **kwargs)

    return run


class Steady(NamedTuple):
    """How decode steps run while the batch and the store stay as they are."""

    slots: tuple[int, ...]
    version: int
    plan: SamplerPlan
    route: Route
    replays: bool
    """Whether that is a graph's launch and nothing else, which needs nothing set up around it."""


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
        units: LayerUnits | None = None,
        offline: bool = False,
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
            units, offline: see `CompiledLayers`.
            one_copy, buffers: see `ModelSteps`.
            fall_back: told when a layer runs eagerly that should not, and why.
        """
        device = bound.model.device
        self._bound = bound
        self.device = device
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        """Where all steps run."""
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
                units=units,
                offline=offline,
            )
        self._check_addresses = False
        self._steady: Steady | None = None
        self.use_graphs(GraphSettings(max_rows=max_batch), recorder=None, why_plain="no graphs", counters=Counters())

    def attach(self, states: Sequence[KeyValueState]) -> None:
        """Let the layers keep their state here from now on. Not after something was recorded, or decode was fused.

        Args:
            states: one a layer, allocated.
        """
        self.states = tuple(states)
        self._bound.attach(states, self.steps.metadata)
        self.steps.attach(states)

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
        """How steps are recorded; see `GraphStore` and `EngineConfig`."""
        self._check_addresses = check_addresses
        if validates:
            self.steps.keep_logits(always=True)
        self.graphs = GraphStore(
            settings,
            recorder=recorder,
            prepare=self.prepare,
            run=self.steps.run,
            finish=self.steps.finish,
            plain_kind=self._plain_kind,
            why_plain=why_plain,
            note=note,
            counters=counters,
            notify=notify,
            validates=validates,
        )
        self._steady = None

    @on_its_stream
    def admit(self, admission: Admission) -> None:
        """Give a slot to a new request."""
        self.state.block_table.assign(admission.slot, admission.pages)
        for state in self.states:
            state.reset(admission.slot)
        self.sampler.assign(admission.slot, admission.sampling, admission.prompt_ids, ())
        if self.steps.fused is not None:
            self.steps.fused.refresh()
        self._steady = None

    @on_its_stream
    def prefill(self, chunks: Sequence[PrefillChunk]) -> LaunchedStep:
        """Run the chunks in one call; sample for those that end their prompt."""
        slots = tuple(chunk.slot for chunk in chunks if chunk.last)
        plan = self.sampler.needs(slots)
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        route = self.graphs.route(GraphKey.prefill(tokens, len(slots), plan))
        self.steps.stage_prefill(chunks, route.key.tokens, route.key.rows)
        return self._launch(route, len(slots), plan)

    def decode(self, slots: tuple[int, ...]) -> LaunchedStep:
        """Run one decode step of these slots and sample a token for each.

        While the caller hands in the same tuple, nothing is looked up and nothing is sent to the device: a recorded
        step is replayed, and an event recorded behind it.
        """
        steady = self._steady
        if steady is None or slots is not steady.slots or self.graphs.version != steady.version:
            return self._decode(slots)
        if steady.replays and self._is_here():
            return self._launch(steady.route, len(slots), steady.plan)
        return self._decode_again(steady)

    @on_its_stream
    def _decode(self, slots: tuple[int, ...]) -> LaunchedStep:
        plan = self.sampler.needs(slots)
        version = self.graphs.version  # as it is now: the step may drop its own graph
        route = self.graphs.route(GraphKey.decode(len(slots), plan))
        self.steps.stage_decode(slots)
        launched = self._launch(route, len(slots), plan)
        self._steady = Steady(slots, version, plan, route, _only_replays(route))
        return launched

    @on_its_stream
    def _decode_again(self, steady: Steady) -> LaunchedStep:
        return self._launch(steady.route, len(steady.slots), steady.plan)

    def _is_here(self) -> bool:
        return self.stream is None or _is_current(self.stream)

    def _launch(self, route: Route, rows: int, plan: SamplerPlan) -> LaunchedStep:
        recording = route.recording
        if recording is not None and recording.recorded.thread not in (None, this_thread()):
            self._fall_back("cudagraph trees replay on the thread that recorded them; steps of others run without")
            route = self._plain_route(route, "its cudagraph tree belongs to another thread")
        samples = route.key.rows > 0
        if samples:
            self.ring.reserve()
        try:
            route = self._run(route)
            self.graphs.count(route)
            if samples:
                return self.ring.launched(rows, plan.logprobs, route.kind, route.reason)
        except BaseException:
            self.recover()
            raise
        return LaunchedStep(self.ring, 0, 0, None, route.kind, route.reason)

    @on_its_stream
    def recover(self) -> None:
        """After a step that was not launched as a whole: what host and device believe is made the same again."""
        self.ring.resynchronize()
        self.steps.forget_staged()
        self._steady = None

    def _run(self, route: Route) -> Route:
        """Run a step; returns how it ran in the end."""
        recording = route.recording
        if recording is None:
            route.run()
            return route
        if recording.addresses is not None and (moved := self._moved(recording.addresses)):
            return self._instead(
                route, f"moved since the capture: {', '.join(moved[:3])}", "a tensor of its graph moved"
            )
        if not recording.checked:
            return self._validated(route, recording)
        try:
            route.run()
        except Exception as error:
            if not _may_be_its_fault(error):
                raise
            # The step's last op is what moves state on, so that it can run again.
            self.ring.resynchronize()
            return self._instead(route, f"its replay raised {described(error)}", "its replay raised")
        return route

    @on_its_stream
    def _instead(self, route: Route, why: str, reason: str) -> Route:
        """Forget the route's recording, and run the step without it."""
        if route.recording is not None:
            self.graphs.drop(route.recording, why)
        plain = self._plain_route(route, reason)
        plain.run()
        return plain

    def _moved(self, addresses: dict[str, int]) -> list[str]:
        """What lies elsewhere now. Tensors that were allocated since are none of a recording's business."""
        now = self._addresses()
        return [name for name, address in addresses.items() if now.get(name) != address]

    def _validated(self, route: Route, recording: Recording) -> Route:
        """Run a step whose recording was never replayed for anybody, and compare."""
        wrong = validate(self, recording)  # runs the step, whatever comes out
        recording.checked = True
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

    def prepare(self, key: GraphKey) -> None:
        """Stage a step of padding, with what its key needs allocated."""
        if key.sampler is None:
            self.steps.keep_logits()
        else:
            self.sampler.allocate(key.sampler)
        self.steps.stage_padding(key)
        self._steady = None

    @on_its_stream
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
        keys = [GraphKey.prefill(run, 1, plan) for run in prefill]
        keys += [GraphKey.decode(row, plan) for row in decode]
        # The layers are compiled for all sizes: a prefill of one token runs them as decode does, and so does a step
        # that no fused one serves.
        with self.steps.fused_by(None), cast(CompiledLayers, self.compiled).warming_up():
            for key in keys:
                self._run_padding(key)

    @on_its_stream
    def check_numerics(self) -> str | None:
        """Compare compiled layers with uncompiled ones on a few tokens; what differs too much, or None."""
        if self.compiled is None:
            return None
        with self.steps.fused_by(None):  # the layers are what is compared
            wrong = numerics.compare(self, self.compiled)
        self._steady = None
        return wrong

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return self._bound.model.dtype

    @on_its_stream
    def exercise(self) -> None:
        """Run a few sizes of prefill and decode: on CUDA, kernels have variants for sizes.

        They are compiled, loaded and chosen on their first use, which takes up to half a second each: not in a user's
        step. Writes to the dummy page only.
        """
        plan = SamplerPlan()
        for tokens in _spread(self._max_tokens):
            self._run_padding(GraphKey.prefill(tokens, 1, plan))
        for rows in _spread(self._max_batch):
            self._run_padding(GraphKey.decode(rows, plan))
        torch.cuda.synchronize(self.device)

    @on_its_stream
    def exercise_samplers(self) -> None:
        """Run a decode step with each kind of sampler, as `exercise()` does for sizes. Not while requests run."""
        self.ring.drain()
        for plan in every_kind(self.sampler.vocab_size):
            self._run_padding(GraphKey.decode(1, plan))
        self.recover()

    @on_its_stream
    def capture(self, keys: Sequence[GraphKey], progress: Callable[[], object]) -> None:
        """Record these steps. Not while requests run: they would wait for it."""
        self.ring.drain()
        try:
            self.graphs.capture(keys, progress)
        finally:
            self._after_capture()

    @on_its_stream
    def capture_pending(self) -> bool:
        """Record the step that was wanted most, if any; returns whether more are. Not while requests run."""
        if not self.graphs.pending:
            return False
        self.ring.drain()
        try:
            return self.graphs.capture_pending()
        finally:
            self._after_capture()

    def _after_capture(self) -> None:
        for recording in self.graphs.recordings:
            if recording.addresses is None and self._check_addresses:
                recording.addresses = self._addresses()
        self.recover()

    def _run_padding(self, key: GraphKey) -> None:
        self.prepare(key)
        try:
            self.steps.run(key)
        finally:
            self.ring.resynchronize()

    @on_its_stream
    def measure_activations(self, recorded: int = 0) -> int:
        """Bytes that steps allocate at their peak on CUDA (0 elsewhere), by the largest prefill call.

        Runs with padding alone, so it writes to the dummy page only.

        Args:
            recorded: tokens of the largest step that will be recorded; a graph's memory is its own.
        """
        if self.device.type != "cuda":
            return 0
        key = GraphKey.prefill(self._max_tokens, 1, SamplerPlan())
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._run_padding(key)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        # The sampler works on [max_batch, vocab_size] in float32: logits, processed, sorted values and ids, noise.
        sampling = 8 * 4 * self._max_batch * self.sampler.vocab_size
        with CAPTURING:
            torch.cuda.empty_cache()
        if not recorded:
            return peak + sampling
        # In a graph: activations, sampler and kept logits, and the nodes.
        in_graphs = peak * min(1.0, recorded / self._max_tokens) + sampling * 5 // 4 + _NODE_BYTES
        return peak + sampling + int(in_graphs)

    def disable_compilation(self) -> None:
        """Run every later step eagerly."""
        if self.compiled is not None:
            self.compiled.remove()
            self.compiled = None

    def close(self) -> None:
        """Wait for the device, release what was recorded, and give the layers back as they were."""
        if self.stream is not None:
            try:
                self.stream.synchronize()
            except torch.AcceleratorError as error:
                logger.debug("the device is lost: %s", error)
        self.graphs.close()
        self._steady = None
        if self.steps.fused is not None:
            with CAPTURING:
                self.steps.fused.close()
            self.steps.fused = None
        self.disable_compilation()


def _is_current(stream: torch.cuda.Stream) -> bool:
    index = cast(int, stream.device_index)
    return torch.cuda.current_device() == index and torch._C._cuda_getCurrentRawStream(index) == stream.cuda_stream


def _spread(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def _only_replays(route: Route) -> bool:
    recording = route.recording
    if recording is None or route.finish is not None or recording.addresses is not None or not recording.checked:
        return False
    return recording.recorded.is_graph


def _may_be_its_fault(error: BaseException) -> bool:
    """Whether a replay that raised this is not to be tried again. Replays allocate nothing, so memory is not."""
    return isinstance(error, Exception) and not is_fatal(error) and not isinstance(error, torch.OutOfMemoryError)
