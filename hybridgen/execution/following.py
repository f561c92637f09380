"""At each call: what the model's owner did to it since the last one is taken over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from hybridgen.device.capture import CAPTURING
from hybridgen.device.watched import has_global_hooks, is_unheard
from hybridgen.errors import OutOfMemoryError
from hybridgen.execution.runner import ModelRunner
from hybridgen.execution.stream import on_its_stream
from hybridgen.loading.adapters import Adapters
from hybridgen.models.ends import allow_short_ends, use_own_ends
from hybridgen.models.gated import allow_gated_op, use_own_gate
from hybridgen.models.mixtures import allow_mixture_op, use_own_mixture
from hybridgen.models.rotating import allow_one_op, use_own_rotation
from hybridgen.models.twin import Changes

logger = logging.getLogger(__name__)


def begin_call(
    runner: ModelRunner,
    check: Callable[[], object] | None = None,
    forget: Callable[[], object] | None = None,
    *,
    may_look_later: bool = False,
) -> bool:
    """What comes before a call's requests: its steps run with the model as its owner has left it.

    Args:
        check: raises where other processes that the steps need are gone.
        forget: called where the weights may have other values now, which cannot be seen.
        may_look_later: the caller will `look()` once its first step is launched, and launch that step again where
            something has changed.

    Returns:
        Whether the caller has to do that: nothing that a step could not run with was seen.

    Raises: see `look`.
    """
    if check is not None:
        check()
    following = runner.following
    twins = [twin for twin in (following.twin, following.drafters_twin) if twin is not None]
    later = may_look_later and bool(twins) and all(twin.keeps_memory() for twin in twins)
    if not later:
        look(runner)
    if twins:
        if runner.stream is not None and not runner.is_here():
            # What the caller's stream still writes into the weights comes first.
            runner.stream.wait_stream(torch.cuda.current_stream(runner.device))
        runner.refresh_fused()
    if forget is not None:
        forget()
    return later


def look(runner: ModelRunner) -> bool:
    """Take over what the model's owner changed since the last look; returns whether anything was.

    Raises:
        EngineError: that cannot be, see `Twin.follow`.
        UnsupportedModelError: see `BoundModel.check_forwards`.
    """
    following = runner.following
    changes = following.own_hooks if following.twin is None else following.twin.follow()
    if following.drafters_twin is not None:
        changes = changes.beside(following.drafters_twin.follow())
    if following.twin is not None:
        runner.bound.check_forwards()
    hooks = (has_global_hooks(), changes.hooked)
    if not (changes.moved or changes.settings or hooks != following.hooks):
        return False
    _adapt(runner, changes, hooks)
    return True


@on_its_stream
def _adapt(
    runner: ModelRunner, changes: Changes, hooks: tuple[bool, tuple[nn.Module, ...]], whose: str = "the model's tensors"
) -> None:
    """Make what is compiled, recorded and fused fit the model again.

    Args:
        whose: what lies elsewhere now, for messages.
    """
    following = runner.following
    runner.ring.drain()
    if runner.stream is not None:
        runner.stream.synchronize()  # a graph is not released while it runs
    if changes.moved or changes.settings:
        what = f"{whose} lie elsewhere" if changes.moved else "the model's attributes changed"
        logger.debug("%s: %s", what, ", ".join((changes.moved or changes.settings)[:8]))
        again = [recording.key for recording in runner.graphs.recordings]
        runner.graphs.drop_all(what)
        following.stale = True
        if not runner.graphs.settings.lazy:
            following.again += again
    everywhere, modules = hooks
    kinds = dict.fromkeys(type(module).__name__ for module in modules)
    why = "all modules have a hook" if everywhere else f"a {next(iter(kinds))} has hooks" if kinds else None
    if hooks != following.hooks:
        following.hooks = hooks
        if runner.compiled is not None or runner.graphs.records:  # else steps run as modules anyway
            runner.graphs.suspend(why)
    if changes.settings:  # such as those that were taken to be constants
        use_own_rotation(runner.bound)
        use_own_gate(runner.bound)
        use_own_mixture(runner.bound)
        use_own_ends(runner.bound)
    allow_one_op(runner.bound, is_unheard)
    allow_gated_op(runner.bound, is_unheard)
    allow_mixture_op(runner.bound, is_unheard)
    allow_short_ends(runner.bound, is_unheard)
    if runner.compiled is not None:
        runner.compiled.route()
        if changes.settings:
            runner.compiled.forget_units()
    _use_fused(runner, usable=why is None)
    if why is None and following.again:
        again, following.again = following.again, []
        runner.graphs.capture(map(runner.router.served, again))
    runner.after_capture()


def _use_fused(runner: ModelRunner, *, usable: bool) -> None:
    """Put the fused executors aside, or use them again, made anew where the model changed."""
    following = runner.following
    fused = runner.fused or following.unused
    if fused is None:
        return
    following.unused = None if usable else fused
    runner.use_fused(fused if usable else None)
    if not usable or not following.stale:
        return
    following.stale = False
    chained = 0 if fused.chain is None else fused.chain.most
    few = None if fused.rows is None else (fused.rows.least, fused.rows.most)
    runner.use_fused(None)
    with CAPTURING:
        fused.close()
    runner.fall_back("the model's tensors or attributes changed; the fused kernels are made anew")
    if following.fuse_again is not None:
        # The kernels are compared with the layers' own code: compiled layers would call none of the check's hooks.
        with nullcontext() if runner.compiled is None else runner.compiled.bypassed():
            following.fuse_again()
    made = runner.fused
    if made is not None and made.chain is not None and chained < made.chain.most:
        made.use_chain_up_to(chained, "measured before the model changed")
    if made is not None and made.rows is not None and few not in (None, (made.rows.least, made.rows.most)):
        made.use_rows(*few, "measured before the model changed")


@on_its_stream
def release_cache(runner: ModelRunner) -> None:
    """Give the memory of the layers' states back to torch's allocator; the tensors stay where recordings refer to them,
    without memory. Not while anything is in flight."""
    runner.ring.drain()
    if runner.stream is not None:
        runner.stream.synchronize()
    for tensor in _state_tensors(runner):
        runner.following.released.append(
            (tensor.untyped_storage(), tensor.untyped_storage().nbytes(), tensor.data_ptr())
        )
        tensor.untyped_storage().resize_(0)


@on_its_stream
def resume_cache(runner: ModelRunner) -> None:
    """Take memory for the layers' states again. Where it lies elsewhere than before, what is recorded is made anew.

    Raises:
        OutOfMemoryError: there is too little; nothing is taken.
    """
    released = runner.following.released
    try:
        for storage, size, _ in released:
            storage.resize_(size)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        for storage, _, _ in released:
            storage.resize_(0)
        total = sum(size for _, size, _ in released)
        raise OutOfMemoryError(f"the KV cache of {total:,} bytes does not fit any more; free memory first") from error
    runner.following.released = []
    tensors = _state_tensors(runner)
    for tensor in tensors:
        tensor.zero_()
    if any(storage.data_ptr() != address for storage, _, address in released):
        following = runner.following
        moved = Changes(("keys and values",), (), following.hooks[1])
        _adapt(runner, moved, following.hooks, "the pages of the KV cache")


def _state_tensors(runner: ModelRunner) -> list[torch.Tensor]:
    """The tensors of all layers' states, one for each storage."""
    found = {
        tensor.untyped_storage().data_ptr(): tensor
        for state in runner.all_states
        for tensor in state.tensors().values()
    }
    return list(found.values())


@on_its_stream
def use_adapter(runner: ModelRunner, adapters: Adapters, name: str | None) -> None:
    """Change the adapter in the weights, and what was repacked of them. Not while anything is in flight."""
    runner.ring.drain()
    try:
        adapters.set(name)
    finally:
        if runner.fused is not None:
            runner.fused.refresh()
        if runner.stream is not None:
            runner.stream.synchronize()  # the host's copies are read until then
