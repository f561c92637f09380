"""The process of one of the ranks 1 and up: it loads its share of a model, and runs what rank 0 tells it."""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from hybridgen.cache import pages_for_tokens
from hybridgen.compilation.layers import switched_off
from hybridgen.config import EngineConfig
from hybridgen.engine.preflight import resolve_config
from hybridgen.engine.ready import device_of, make_ready
from hybridgen.errors import HybridgenError
from hybridgen.execution import ModelRunner
from hybridgen.graphs.setup import GraphSetup
from hybridgen.loading import Checkpoint
from hybridgen.parallel.channel import Channel, arrivals
from hybridgen.parallel.follow import Follower
from hybridgen.parallel.group import Group
from hybridgen.parallel.progress import State, Worked
from hybridgen.parallel.ranks import MEMORY, ORDER, STORE, kind_of
from hybridgen.parallel.weights import load_share
from hybridgen.parallel.wire import unpack
from hybridgen.speculation.ngram import NgramDrafter

_BEAT_SECONDS = 0.25
_GONE_MILLISECONDS = 200
"""Between the end of rank 0's connections and that of its pipe, at most."""
ORPHAN_SECONDS = 2.0
"""Once rank 0 has closed the pipe, or is gone; then this process ends, whatever it does."""


def main(directory: str, rank: int) -> int:
    """Run as a rank until rank 0 ends it, or ends itself; returns the exit status.

    Args:
        directory: the group's, with what there is to do in `order.json`.
    """
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    logging.basicConfig(level=logging.WARNING)
    place = Path(directory)
    order = json.loads((place / ORDER).read_text())
    channel = Channel(place / MEMORY, order["size"], order["ring_bytes"])
    progress = channel.progress(rank)
    progress.enter(State.LONG)
    pipe = select.poll()
    pipe.register(0, 0)  # its end is reported whatever is asked for
    keep_beating(channel, rank, lambda: bool(pipe.poll(0)), lambda: _end_with_rank_zero(place))
    try:
        device = order["device"] if order["device"] == "cpu" else f"{order['device']}:{rank}"
        config = EngineConfig(device=device, **order["config"])
        checkpoint = Checkpoint.open(order["model"], config)
    except HybridgenError as error:
        _answer(answers, {"error": {"kind": kind_of(error), "message": str(error)}})
        return 2
    if checkpoint.device.type == "cuda":
        torch.cuda.set_device(checkpoint.device)  # pinned memory belongs to the device that is current
    _answer(answers, {"ready": True})
    try:
        group = Group(rank, order["size"], place / STORE, checkpoint.device, checkpoint.dtype, progress)
        _follow(channel, rank, group, checkpoint, config)
    except BaseException:
        traceback.print_exc()  # into the log, which rank 0 quotes
        sys.stderr.flush()
    return _end_alone(place)


def _follow(channel: Channel, rank: int, group: Group, checkpoint: Checkpoint, config: EngineConfig) -> None:
    """Do what rank 0 says until it is gone."""
    with device_of(checkpoint.device):
        follower = make_follower(checkpoint, config, group, ExitStack())
        group.progress.enter(State.AWAY)
        for _ in arrivals(0):
            if not follower.do(unpack(channel.read(rank))):
                if checkpoint.device.type == "cuda":
                    torch.cuda.synchronize()  # what this rank launched last, others may still wait for
                os._exit(0)  # orderly: rank 0 removes the files


def make_follower(checkpoint: Checkpoint, config: EngineConfig, group: Group, undo: ExitStack) -> Follower:
    """What `Engine` and `Builder` make on rank 0, as far as other ranks have it; in the same order, because the model
    is called in between.

    Args:
        undo: gets what gives back what it has.
    """
    resolved = resolve_config(checkpoint, config)
    loaded = load_share(checkpoint, group)
    bound, _ = make_ready(checkpoint, loaded, config, resolved, undo)
    runner = ModelRunner(
        bound,
        compile_backend=config.compile_backend if resolved.mode.compiles and switched_off() is None else None,
        vocab_size=checkpoint.vocab_size,
        max_batch=resolved.slots,
        max_pages=pages_for_tokens(resolved.max_context, config.page_size),
        token_budget=resolved.token_budget,
        max_context=resolved.max_context,
        query_len=resolved.query_len,
        drafter=NgramDrafter() if config.speculation == "ngram" else None,
        one_copy=config.metadata_copy,
        buffers=2 if config.double_buffer else 1,
    )
    undo.callback(runner.close)
    setup = GraphSetup(
        config=config,
        mode=resolved.mode,
        device=checkpoint.device,
        token_budget=resolved.token_budget,
        max_tokens=resolved.max_tokens,
        query_len=resolved.query_len,
    )
    dtype = checkpoint.dtype if config.kv_dtype is None else torch.float8_e4m3fn
    states = partial(bound.layer_states, config.page_size, dtype, loaded.kv_scales)
    return Follower(runner, group, setup.recorder(runner.steps), states)


def _answer(descriptor: int, value: dict[str, Any]) -> None:
    os.write(descriptor, (json.dumps(value) + "\n").encode())


def keep_beating(channel: Channel, rank: int, is_over: Callable[[], bool], end: Callable[[], object]) -> None:
    """Show that this process lives until rank 0 has ended the group or is gone, then call `end`; in a thread of its
    own, because steps may take long."""
    progress = channel.progress(rank)

    def beat() -> None:
        worked = Worked()
        while not is_over():
            channel.beat(rank)
            if worked() and progress.state is State.LONG:
                progress.move()
            time.sleep(_BEAT_SECONDS)
        end()

    threading.Thread(target=beat, daemon=True, name="hybridgen-pulse").start()


def _end_with_rank_zero(place: Path) -> None:
    time.sleep(ORPHAN_SECONDS)
    _end_alone(place)


def _end_alone(place: Path) -> NoReturn:
    """End with an error, and remove the group's files if rank 0 is gone, which would do it."""
    pipe = select.poll()
    pipe.register(0, 0)
    if pipe.poll(_GONE_MILLISECONDS):
        shutil.rmtree(place, ignore_errors=True)
    os._exit(1)
