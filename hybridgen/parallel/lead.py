"""Rank 0: it schedules and decides, and has the other ranks run the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from hybridgen.cache import LayerState
from hybridgen.core import TokenLogprob
from hybridgen.device.failures import LostRanks
from hybridgen.errors import EngineError, HybridgenError, described
from hybridgen.execution import LaunchedStep, ModelRunner
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.execution.ring import Scores
from hybridgen.graphs import GraphKey, Recorder, Route
from hybridgen.models.attention import Phase
from hybridgen.models.binding import paged
from hybridgen.models.share import Share
from hybridgen.parallel.digest import digest
from hybridgen.parallel.group import Group
from hybridgen.parallel.ranks import STORE, Ranks
from hybridgen.parallel.recording import LeadRecorder, OtherRankError
from hybridgen.parallel.share import GroupShare
from hybridgen.parallel.wire import Kind, Told, admission_message, key_head, pack, step_message
from hybridgen.sampling import SamplerPlan
from hybridgen.sampling.own import OwnRows


class Lead:
    """The group as rank 0 has it."""

    def __init__(self, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> None:
        """Wait until all ranks are there.

        Args:
            dtype: the model's.

        Raises:
            HybridgenError: one is not.
        """
        self.ranks = ranks
        self.progress = ranks.channel.progress(0)
        try:
            ranks.wait_until_open()
            with self.together():
                self.group = Group(0, ranks.size, ranks.directory / STORE, device, dtype, self.progress, ranks.check)
            ranks.on_loss(self.group.abort)
        except BaseException:
            ranks.close(at_once=True)
            raise

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all ranks run at once: if it fails on this one, the group has ended.

        Raises:
            LostRanks: it failed here, or elsewhere.
            HybridgenError: it failed here, for a reason of ours.
        """
        try:
            with self.progress.step:
                yield
        except OtherRankError:  # the ranks agreed on that
            raise
        except Exception as error:
            # A rank that died breaks this rank's collective: what became of it is the better reason.
            if any(isinstance(each, RuntimeError) for each in _chain(error)):
                self.ranks.wait_for_loss()
            lost = self.ranks.lost
            self.ranks.fail(f"rank 0 failed: {described(error)}")
            if lost is None and isinstance(error, HybridgenError):
                raise
            raise LostRanks(str(self.ranks.lost)) from error
        except BaseException:
            self.ranks.fail("rank 0 was interrupted")
            raise

    def tell(self, message: bytes) -> None:
        """Send a message to the other ranks.

        Raises:
            LostRanks: the group has ended.
        """
        try:
            self.ranks.tell(message)
        except EngineError as error:
            raise LostRanks(str(error)) from None

    def check(self) -> None:
        """Raise if the group has ended.

        Raises:
            EngineError: it has, with the reason.
        """
        self.ranks.check()

    def begin(self) -> None:
        """Before a call: wait until all ranks serve.

        Raises:
            EngineError: the group has ended, with the reason.
        """
        self.ranks.wait_for_calls()

    def recorder(
        self, recorder: Callable[[GraphKey, bool], Recorder | None] | None
    ) -> Callable[[GraphKey, bool], Recorder | None] | None:
        """Who records a step on all ranks, from who does on this one."""
        if recorder is None:
            return None
        made: dict[int, LeadRecorder] = {}

        def find(key: GraphKey, lazy: bool) -> Recorder | None:
            own = recorder(key, lazy)
            if own is None:
                return None
            if id(own) not in made:
                made[id(own)] = LeadRecorder(own, self.group, self.together, self._begin_recording, self._release)
            return made[id(own)]

        return find

    def _begin_recording(self, key: GraphKey) -> None:
        self.tell(pack(Kind.RECORD, key_head(key)))

    def _release(self, key: GraphKey) -> None:
        with suppress(EngineError):  # nobody is left who has it
            self.tell(pack(Kind.RELEASE, key_head(key)))

    def close(self) -> None:
        """End the group. Twice is fine. In a fork nothing ends."""
        if self.ranks.is_inherited:
            return
        with suppress(EngineError):
            self.ranks.tell(pack(Kind.END))
        self.group.close()
        self.ranks.close()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class _Checked:
    """Scores that nobody gets if a rank was lost meanwhile."""

    def __init__(self, scores: Scores, check: Callable[[], None]) -> None:
        self._scores, self._check = scores, check

    def read(self) -> list[list[TokenLogprob]]:
        """See `Scores.read`."""
        found = self._scores.read()
        self._check()
        return found


class LeadRunner(ModelRunner):
    """The runner of rank 0: what it runs, the others run too, in the same order and by the routes found here."""

    def __init__(self, *arguments: Any, lead: Lead, **keywords: Any) -> None:
        """`lead`: the group; everything else is as for `ModelRunner`."""
        self._lead = lead
        self._chunks: Sequence[PrefillChunk] = ()
        self._slots: tuple[int, ...] = ()
        self._told: tuple[Route, tuple[int, ...]] | None = None
        """The decode step that was sent last, if nothing came after it."""
        super().__init__(*arguments, **keywords)
        self.ring.check = self._check
        self.ring.waiting = lead.progress.waits
        self.steps.agree = lead.group.of_rank_zero
        if self.compiled is not None:
            self.compiled.strict = False  # what one rank alone finds out while compiling would leave the others waiting

    def _check(self) -> None:
        """After a wait for a step: what ran while a rank was lost is not to be used.

        Raises:
            LostRanks: the group has ended.
        """
        try:
            self._lead.check()
        except EngineError as error:
            raise LostRanks(str(error)) from None

    def attach(self, states: Sequence[LayerState]) -> None:
        """See `ModelRunner.attach`; the other ranks allocate as many pages."""
        super().attach(states)
        first = next(iter(paged(states)[0].tensors().values()))
        self._tell(pack(Kind.ALLOCATE, first.shape[0]))

    def admit(self, *admissions: Admission) -> None:
        """See `ModelRunner.admit`."""
        super().admit(*admissions)  # first here: what is wrong with a request is its own error
        for admission in admissions:
            self._tell(admission_message(admission))

    def prefill(self, chunks: Sequence[PrefillChunk]) -> LaunchedStep:
        """See `ModelRunner.prefill`."""
        self._chunks = chunks
        launched = super().prefill(chunks)
        if launched.scores is not None:
            launched.scores = _Checked(launched.scores, self._check)
        return launched

    def decode(self, slots: tuple[int, ...], query_len: int = 1, *, quiet: bool = False) -> LaunchedStep:
        """See `ModelRunner.decode`."""
        self._slots = slots
        return super().decode(slots, query_len, quiet=quiet)

    def run_padding(self, key: GraphKey) -> None:
        """See `ModelRunner.run_padding`."""
        warming = self.compiled is not None and self.compiled.warming
        self._tell(pack(Kind.PADDING, [key_head(key), warming]))
        with self._lead.together():
            super().run_padding(key)

    def begin_fusing(self, max_context: int, equal_bits: bool) -> Share:
        """Have the other ranks make the fused executors, as this one is to do with what is returned."""
        self._tell(pack(Kind.FUSE, [max_context, equal_bits]))
        return GroupShare.of(self._lead.group, self.bound.model)

    def ranks_agree(self) -> bool:
        """Whether all ranks have the same tokens, positions and texts in their slots. Not while requests run.

        Raises:
            LostRanks: the group has ended.
        """
        self._tell(pack(Kind.COMPARE))
        with self._lead.together():
            return len(set(self._lead.group.exchange(digest(self)))) == 1

    def _launch(self, route: Route, rows: int, sampler: SamplerPlan, own: OwnRows | None = None) -> LaunchedStep:
        if self._told is not None and route is self._told[0] and self._slots is self._told[1]:
            self._lead.tell(pack(Kind.REPEAT))
        else:
            finish = sampler if route.finish is not None or own is not None else None
            told = Told(route.key, route.recording is not None, finish, rows, own is not None)
            self._tell(step_message(told, self._slots, self._chunks))
            if route.key.phase is Phase.DECODE:
                self._told = route, self._slots
        with self._lead.together():
            return super()._launch(route, rows, sampler, own)

    def _run(self, route: Route) -> Route:
        """Run it as it was told to the others: a replay that fails here ends the group."""
        route.run()
        return route

    def _tell(self, message: bytes) -> None:
        self._told = None
        self._lead.tell(message)
