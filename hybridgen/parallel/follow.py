"""Ranks 1 and up: they run what rank 0 tells them, and decide nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from hybridgen.cache import LayerState, allocate
from hybridgen.execution import ModelRunner
from hybridgen.execution.fused_executors import make_fused
from hybridgen.execution.scoring import ScoredTokens
from hybridgen.execution.stream import on_its_stream
from hybridgen.graphs import GraphKey, Recorder
from hybridgen.graphs.recorder import Recorded
from hybridgen.models.attention import Phase
from hybridgen.parallel.digest import digest
from hybridgen.parallel.group import FAILED, Group
from hybridgen.parallel.recording import OutOfStepError, record_together
from hybridgen.parallel.share import GroupShare
from hybridgen.parallel.wire import Kind, Message, Told, read_admission, read_key, read_step

logger = logging.getLogger(__name__)

_LONG = frozenset({Kind.ALLOCATE, Kind.PADDING, Kind.RECORD, Kind.FUSE})
"""What may compile, record, or wait for memory."""


class Follower:
    """A runner of a rank that is told what to run."""

    def __init__(
        self,
        runner: ModelRunner,
        group: Group,
        recorder: Callable[[GraphKey, bool], Recorder | None] | None,
        states: Callable[[], Sequence[LayerState]],
    ) -> None:
        """
        Args:
            recorder: who records steps, as on rank 0.
            states: what layers keep between steps, not allocated yet.
        """
        self._runner, self._group, self._recorder = runner, group, recorder
        self._states = states
        runner.steps.agree = group.of_rank_zero
        self._recordings: dict[GraphKey, Recorded] = {}
        self._again: Callable[[], None] | None = None
        """Runs the last decode step once more."""
        self._known: set[GraphKey] = set()
        """Steps of which some like them ran before."""
        if runner.compiled is not None:
            # As on rank 0: what one rank alone finds out while compiling would leave the others waiting.
            runner.compiled.strict = False
            self._note_compilations()

    def _note_compilations(self) -> None:
        """Have all that is compiled late counted as what may take long."""
        from torch._dynamo import callback

        long = self._group.progress.long
        callback.on_compile_start(lambda *_: long.__enter__())
        callback.on_compile_end(lambda *_: long.__exit__())

    def do(self, message: Message) -> bool:
        """Do what a message asks for; False if it is the last."""
        progress = self._group.progress
        if message.kind is Kind.END:
            return False
        with progress.long if message.kind in _LONG else progress.step:
            self._do(message)
        return True

    def _do(self, message: Message) -> None:
        kind = message.kind
        if kind is Kind.REPEAT:
            assert self._again is not None
            self._again()
            return
        self._again = None
        if kind is Kind.STEP:
            _step(self._runner, self, message)
        elif kind is Kind.ADMIT:
            self._runner.admit(read_admission(message))
        elif kind is Kind.PADDING:
            key, warming = message.head
            _padding(self._runner, read_key(key), warming)
        elif kind is Kind.RECORD:
            _record(self._runner, self, read_key(message.head))
        elif kind is Kind.COMPARE:
            self._group.exchange(digest(self._runner))
        elif kind is Kind.FUSE:
            _fuse(self._runner, self._group, *message.head)
        elif kind is Kind.RELEASE:
            self._recordings.pop(read_key(message.head)).release()
        else:
            self._allocate(message.head)

    def _allocate(self, pages: int) -> None:
        runner = self._runner
        states = self._states()
        allocate(states, pages, runner.max_batch + 1, runner.device)
        runner.attach(states)

    def run(self, message: Message) -> None:
        """Stage and run a step."""
        runner = self._runner
        told, slots, chunks = read_step(message)
        for sampler in (told.key.sampler, told.finish):
            if sampler is not None:
                runner.sampler.allocate(sampler)
        if told.key.sampler is None and told.key.rows:
            runner.steps.keep_logits()
        if told.key.phase is Phase.DECODE:
            runner.steps.stage_decode(slots)
            self._again = partial(_launch, runner, self, told, None)
        else:
            runner.steps.stage_prefill(chunks, told.key.tokens, told.key.rows)
        scored = ScoredTokens(chunks, runner.device) if any(chunk.targets for chunk in chunks) else None
        kind = _kind(told)
        if kind in self._known:
            self.launch(told, scored)
            return
        with self._group.progress.long:  # kernels may be compiled, and libraries choose theirs
            self.launch(told, scored)
        self._known.add(kind)

    def launch(self, told: Told, scored: ScoredTokens | None) -> None:
        """Run the step that is staged. Nobody reads its tokens here: rank 0 does."""
        steps, ring = self._runner.steps, self._runner.ring
        if scored is not None:
            steps.run_told(told.key, scored)
        elif told.recorded:
            self._recordings[told.key].replay()
        else:
            steps.run(told.key)
        if told.finish is not None:
            steps.finish(told.key, told.finish, is_told=told.own)
        if told.key.rows:
            ring.launched(told.rows, None, "", "")

    def record(self, key: GraphKey) -> None:
        """Record a step, if all ranks can."""
        runner = self._runner
        recorder = None if self._recorder is None else self._recorder(key, False)
        if recorder is None:
            raise OutOfStepError("rank 0 records steps, and this rank does not")
        try:
            self._prepare(key)
            self._recordings[key] = record_together(recorder, self._group, key, partial(runner.steps.run, key))
        except OutOfStepError:
            raise
        except Exception as error:
            logger.warning("a step is not recorded: %s: %s", type(error).__name__, error)
        finally:
            runner.ring.resynchronize()

    def _prepare(self, key: GraphKey) -> None:
        try:
            self._runner.prepare(key)
        except Exception:
            self._group.say(FAILED)
            raise


def _fuse(runner: ModelRunner, group: Group, max_context: int, equal_bits: bool) -> None:
    """Have the fused executors that all ranks can have; why others are not there is for rank 0 to tell."""
    make_fused(runner, max_context, equal_bits=equal_bits, share=GroupShare.of(group, runner.bound.model))


def _kind(told: Told) -> GraphKey:
    """Steps of a kind take about as long: of prefills those of up to twice the tokens."""
    key = told.key
    if key.phase is Phase.DECODE:
        return key
    return key._replace(tokens=key.tokens.bit_length(), rows=key.rows.bit_length())


@on_its_stream
def _step(runner: ModelRunner, follower: Follower, message: Message) -> None:
    follower.run(message)


@on_its_stream
def _launch(runner: ModelRunner, follower: Follower, told: Told, scored: ScoredTokens | None) -> None:
    follower.launch(told, scored)


@on_its_stream
def _padding(runner: ModelRunner, key: GraphKey, warming: bool) -> None:
    if not warming or runner.compiled is None:
        runner.run_padding(key)
        return
    runner.compiled.install()
    with runner.compiled.warming_up():
        runner.run_padding(key)


@on_its_stream
def _record(runner: ModelRunner, follower: Follower, key: GraphKey) -> None:
    follower.record(key)
