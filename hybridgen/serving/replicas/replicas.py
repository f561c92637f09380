"""Several engines, each in a process with a GPU of its own, behind the methods of one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from hybridgen.arguments import SCORES, Sampling, check_keywords, scores_of, scoring_pairs
from hybridgen.config import EngineConfig
from hybridgen.core import TokenEvent
from hybridgen.engine.requests import Request, make_requests
from hybridgen.errors import ConfigError, DeviceError, HybridgenError, Interrupted, shown
from hybridgen.loading import Checkpoint
from hybridgen.params import SamplingParams
from hybridgen.serving.client.exchange import Call, Results, split
from hybridgen.serving.replicas.member import Member, added, counts
from hybridgen.serving.replicas.work import Work

AHEAD = 2
"""Completions that a replica has at once, as a multiple of those that it runs at once: it never waits for the next."""


class Replicas:
    """Generates with one model in several processes, with the methods of an `Engine`.

    Each process sees one GPU, as device 0, so one entry of the compile cache serves all; on a machine without GPUs they
    share its cores. Prompts go to whichever has room, those that may become longest first, and results come in the
    order of the prompts. Draws depend on seed and position alone, so they are those of one engine. A process that dies
    is started again, and its prompts go to others. Threads may share it. Use it as a context manager, or call
    `close()`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        replicas: int | str = "all",
        config: EngineConfig | None = None,
        **fields: Any,
    ) -> None:
        """Start the processes and wait until all have loaded the model.

        Args:
            model: local path or hub id; None: the demo model. A live module stays in its process.
            replicas: how many, or `"all"`: one for each GPU.
            config, fields: as for `Engine.load()`; functions cannot be given.

        Raises:
            ConfigError: a wrong field, a number that is none, or `"all"` without GPUs.
            DeviceError: there are fewer GPUs.
            HybridgenError: the model cannot be loaded, as `Engine.load()` says it.
        """
        check_keywords(fields, EngineConfig.field_names())
        self.config = EngineConfig.of(config, fields)
        if model is not None and not isinstance(model, str | os.PathLike):
            raise ConfigError(
                f"model={shown(model)} is no path or hub id; each replica reads the weights itself, so save the model "
                "and give its path"
            )
        if replicas != "all" and (isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1):
            raise ConfigError(f"replicas={shown(replicas)}; give a number from 1, or 'all' for one on each GPU")
        order = {
            "model": None if model is None else os.fspath(model),
            "fields": _plain(self.config),
            "queue": max(1024, 4 * AHEAD * self.config.max_batch),
        }
        environments = _environments(replicas, self.config.device)
        self._directory = Path(tempfile.mkdtemp(prefix="hybridgen-"))
        self._undo = ExitStack()
        self._undo.callback(shutil.rmtree, self._directory, ignore_errors=True)
        self._members: list[Member] = []
        try:
            for number, environment in enumerate(environments):
                member = Member(number, self._directory, order, environment)
                self._members.append(member)
                self._undo.callback(member.close)
            for member in reversed(self._members):  # told first, so that they end at the same time
                self._undo.callback(member.tell_end)
            # What is checked here needs no GPU, and its weights are not read.
            self.checkpoint = Checkpoint.open(model, self.config.replace(device="cpu", adapter=None))
            """What is known of the model: prompts are checked with it before any of them runs."""
            for member in self._members:
                member.client()
            self._size(self.last_stats(again=True)["replicas"])
        except BaseException:
            self._undo.close()
            raise
        # At exit too. Where this process is killed, its replicas see the end of their standard input.
        self._finalizer = weakref.finalize(self, self._undo.close)

    def _size(self, each: list[dict[str, Any]]) -> None:
        self.max_context = min(member.client().server["max_context"] for member in self._members)
        """The longest prompt plus output, in tokens."""
        self._cache_tokens = min(stats["engine"]["pages"] * stats["engine"]["page_size"] for stats in each)
        self.description = {**self._members[0].client().server, "max_batch": len(self) * self.config.max_batch}
        """What a replica tells of itself, and how many requests all of them run at once."""

    def __len__(self) -> int:
        return len(self._members)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes, in the order of the GPUs."""
        return tuple(member.pid for member in self._members)

    def generate(self, prompts: Any, sampling: Sampling = None, *, errors: str = "raise", **fields: Any) -> Any:
        """Generate as `Engine.generate` does.

        Raises:
            PromptError, SamplingError, TokenizerError: before anything runs; ConfigError: an unknown keyword.
            RequestError: the one prompt failed while it ran.
            ServerError: no replica can be kept alive.
            Interrupted: Ctrl-C; holds what was finished, and nothing of prompts that ran.
        """
        call = Call(prompts, sampling, fields, errors)
        results = Results(call)
        try:
            for event in self._events(call, stream=False):
                results.add(event)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted with {results.ended} of {len(call.prompts)} requests finished; they are in .completions",
                results.complete(),
            ) from None
        return results.result()

    def stream(
        self, prompts: Any, sampling: Sampling = None, *, errors: str = "raise", **fields: Any
    ) -> Iterator[TokenEvent]:
        """Generate as `Engine.stream` does. Where a replica dies, no token comes twice."""
        return self._events(Call(prompts, sampling, fields, errors), stream=True)

    def _events(self, call: Call, *, stream: bool) -> Iterator[TokenEvent]:
        if not call.prompts:
            return iter(())
        if not call.returns_errors:
            self.check(call.prompts, call.sampling)
        rows = self.config.max_batch
        return Work(call, self._members, rows, AHEAD * rows, stream=stream).events()

    def check(self, prompts: list[Any], sampling: list[SamplingParams]) -> list[Request]:
        """Check prompts as a replica would; returns the requests that an engine would make of them.

        Raises:
            PromptError, SamplingError, TokenizerError: the first thing wrong.
        """
        return make_requests(prompts, sampling, {}, self.checkpoint, self.max_context, self._cache_tokens)

    def work(self) -> Work:
        """A way to run prompts one by one; see `Work.add`."""
        rows = self.config.max_batch
        return Work(None, self._members, rows, AHEAD * rows, report=False)

    def score(self, prompts: Any, completions: Any = None, *, cache_salt: str | None = None) -> Any:
        """Score completions as `Engine.score` does."""
        pairs, single = scoring_pairs(split(prompts), None if completions is None else split(completions))
        return scores_of(self.generate(pairs, replace(SCORES, cache_salt=cache_salt)), single)

    def stats(self) -> dict[str, Any]:
        """`engine`: counts of all replicas added up; `replicas`: each one's `Client.stats()`; `restarts`: how often one
        was started again. Of a process that died they are those of its last report, at the end of a call or at the
        last `stats()`."""
        for member in self._members:
            member.client()
        return self.last_stats(again=True)

    def last_stats(self, *, again: bool = False) -> dict[str, Any]:
        """`stats()` as the processes last reported, without waiting for one that is being started.

        Args:
            again: ask those that run.
        """
        if again:
            for member in self._members:
                member.report()
        each = [member.stats() for member in self._members]
        total: dict[str, Any] = {}
        for stats in each:
            total = added(total, counts(stats, present=True))
        return {"engine": total, "replicas": each, "restarts": sum(member.restarts for member in self._members)}

    def close(self) -> None:
        """End the processes. Closing twice is fine."""
        self._finalizer()

    def __enter__(self) -> Replicas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(config: EngineConfig) -> dict[str, Any]:
    """The fields of a config that differ from the defaults, as JSON values.

    Raises:
        ConfigError: one is a function or another object of this process.
    """
    default = EngineConfig()
    found = {}
    for name in EngineConfig.field_names():
        value = getattr(config, name)
        if value == getattr(default, name):
            continue
        value = (
            os.fspath(value) if isinstance(value, os.PathLike) else list(value) if isinstance(value, tuple) else value
        )
        try:
            json.dumps(value)
        except TypeError:
            raise ConfigError(
                f"{name}={shown(value)} cannot go to another process; replicas take numbers and texts"
            ) from None
        found[name] = value
    return {"progress": False, **found}


def _environments(replicas: int | str, device: str) -> list[dict[str, str]]:
    """What each process has in its environment: its GPU, or its share of the cores.

    Raises:
        ConfigError, DeviceError: see `Replicas`.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={shown(device)} is one device and each replica has its own; leave it out")
    gpus = [] if device == "cpu" else _gpus()
    if not gpus:
        if device == "cuda":
            raise DeviceError("device='cuda', but PyTorch finds no usable GPU; use device='cpu'")
        if not isinstance(replicas, int):
            raise ConfigError("replicas='all' is one on each GPU, and there is none; give a number, such as 2")
        threads = max(1, (os.cpu_count() or 1) // replicas)
        return [{} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}] * replicas
    count = replicas if isinstance(replicas, int) else len(gpus)
    if count > len(gpus):
        raise DeviceError(f"replicas={count}, but there are {len(gpus)} GPUs; give at most that many, or 'all'")
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:count]]


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` takes them."""
    import torch

    count = torch.cuda.device_count()  # makes no context
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in visible.split(",")][:count]


def replicas_of(text: str) -> int | str:
    """The value of an option `--replicas`.

    Raises:
        HybridgenError: it is neither a number from 1 nor `all`.
    """
    if text == "all":
        return text
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise HybridgenError(f"--replicas {text}: give a number from 1, or all for one on each GPU")
    return int(text)
