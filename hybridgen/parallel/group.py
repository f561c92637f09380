"""The processes of a group as torch's collectives see them, and the two collectives that a model calls as ops.

`hybridgen::all_reduce` and `hybridgen::all_gather` are opaque to compilers. They go by a process group of the engine's
own: gloo on a CPU, NCCL on CUDA. What is small goes by a kernel of our own there (`one_shot`). All of it can be
captured in CUDA graphs. torch's default process group is the caller's and is neither made nor used.

The sum of an all-reduce has the same bits on all ranks: each part of it is added up on one rank and copied to the
others, or on all of them in the same order. So all ranks choose the same tokens.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridgen.errors import DeviceError, described, first_line
from hybridgen.parallel.memory import PeerMemory
from hybridgen.parallel.one_shot import DTYPES, OneShot
from hybridgen.parallel.progress import Progress

logger = logging.getLogger(__name__)

JOIN_SECONDS = 120.0
"""For all ranks to find each other."""
STEP_SECONDS = 3600.0
"""For a collective, which waits for the slowest rank, which may compile. `Ranks` notices one that stands still."""

_TURN_SECONDS = 0.005

FAILED, STEP, CAPTURED, DONE = 1, 2, 3, 4
"""What a rank says when it agrees with the others: that it cannot go on, that it runs a step now, that it captured one
and replays it now, that it is done."""

_NCCL = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "NCCL_GRAPH_MIXING_SUPPORT": "0",
}
"""Read when a process group is made. torch's threads would end the process, which is the user's, where a collective
takes long: `Ranks` ends the group instead. A graph and a collective outside one never run at once here: all steps are
on one stream."""

_groups: dict[int, Group] = {}
_numbers = itertools.count()

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define("all_reduce(Tensor x, int group) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("all_gather(Tensor x, int group, int size) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class Group:
    """The ranks of one engine."""

    def __init__(
        self,
        rank: int,
        size: int,
        store: Path,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
        check: Callable[[], object] | None = None,
    ) -> None:
        """Join; waits for the others.

        Args:
            store: a file in a directory of the user's own, through which the ranks find each other.
            device: where this rank's share of the model is.
            dtype: the model's.
            progress: where this rank says what it does; None: nobody looks.
            check: called while others are not there yet; raises where they never will be.

        Raises:
            DeviceError: the others cannot be reached.
        """
        self.rank = rank
        self.size = size
        self.progress = progress or Progress()
        self.number = next(_numbers)
        """By which the ops find it."""
        self.one_shot: OneShot | None = None
        """Adds up what is small on CUDA; None where it cannot be had."""
        self.why_not = ""
        """Why it cannot be had on CUDA."""
        self.endings: list[Callable[[], None]] = []
        """What is called when the group ends while something may still wait for other ranks; from any thread."""
        self._device_of_rank = device
        self._memories: list[PeerMemory] = []
        file = dist.FileStore(str(store), size)
        file.set_timeout(timedelta(seconds=JOIN_SECONDS))
        file.set(f"rank {rank}", "is there")
        while check is not None and not file.check([f"rank {other}" for other in range(size)]):
            check()  # what comes next cannot be called back
            time.sleep(_TURN_SECONDS)
        try:
            self._host: Any = _gloo(dist.PrefixStore("host", file), rank, size)
            self._device: Any = self._host
            if device.type == "cuda":
                with _environment(_NCCL), torch.inference_mode(), torch.cuda.device(device):
                    self._device = _nccl(dist.PrefixStore("device", file), rank, size)
                    self._sum(torch.zeros(8, dtype=dtype, device=device))  # connects, which no capture could
                    torch.cuda.synchronize(device)
        except RuntimeError as error:  # no port, no network interface, a rank that is not there
            raise DeviceError(
                f"rank {rank} of {size} cannot join the group: {first_line(error)}; is the loopback interface up, and "
                "are ports free?"
            ) from error
        if device.type == "cuda" and dtype in DTYPES:
            with torch.cuda.device(device):
                self._find_one_shot(device, dtype)
        _groups[self.number] = self

    def _find_one_shot(self, device: torch.device, dtype: torch.dtype) -> None:
        """Have all ranks map each other's memory, and use it if all of them could."""
        found = None
        try:
            found = OneShot(self.rank, self.size, device, dtype, self.exchange)
            self.why_not = found.try_out() or ""
        except Exception as error:  # no bindings, a driver that does not let memory be mapped, ...
            self.why_not = described(error)
        said = self.say(FAILED if self.why_not else DONE)
        if FAILED in said:
            self.why_not = self.why_not or f"rank {said.index(FAILED)} cannot"
            if found is not None:
                with suppress(DeviceError):
                    found.close()
            logger.info("small sums go by NCCL: %s", self.why_not)
            return
        self.one_shot = found
        assert found is not None
        try:
            why = found.try_adding() or ""
        except Exception as error:  # a driver that knows no early launches, ...
            why = described(error)
        found.adds = FAILED not in self.say(FAILED if why else DONE)
        if not found.adds:
            found.count_anew()
            logger.info("sums of the fused chain go by collectives: %s", why or "another rank cannot")

    def memory(self, size: int) -> list[int]:
        """Zeroed memory of each rank, as this rank's device addresses it; until the group is closed.

        Raises:
            DeviceError: it cannot be had, on this rank or on another; all of them raise.
        """
        found: PeerMemory | None = None
        why = ""
        try:
            if self._device_of_rank.type != "cuda":
                self.exchange(b"")
                raise DeviceError("ranks without GPUs map no memory of each other")
            found = PeerMemory(self.rank, self._device_of_rank, size, self.exchange)
        except Exception as error:  # no bindings, a driver that does not let memory be mapped, ...
            why = described(error)
        said = self.say(FAILED if why else DONE)
        if FAILED in said:
            if found is not None:
                with suppress(DeviceError):
                    found.close()
            raise DeviceError(why or f"rank {said.index(FAILED)} cannot map the memory of the others")
        assert found is not None
        self._memories.append(found)
        return found.addresses

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor of the same shape."""
        with self.progress.waits:
            if self.one_shot is not None and self.one_shot.serves(x):
                return self.one_shot.reduce(x)
            return self._sum(x.clone(memory_format=torch.contiguous_format))

    def _sum(self, total: Tensor) -> Tensor:
        options = dist.AllreduceOptions()
        options.asyncOp = False  # on the current stream
        _wait(self._device.allreduce([total], options))
        return total

    def gather(self, x: Tensor, size: int) -> Tensor:
        """The parts of all ranks one behind the other along the last dimension, which is then cut to `size`."""
        with self.progress.waits:
            if self.one_shot is not None and self.one_shot.serves(x):
                parts = self.one_shot.gather(x)
            else:
                parts = x.new_empty((self.size, *x.shape))
                options = dist.distributed_c10d.AllgatherOptions()
                options.asyncOp = False
                _wait(self._device._allgather_base(parts.view(-1), x.reshape(-1).contiguous(), options))
        return parts.movedim(0, -2).reshape(*x.shape[:-1], -1)[..., :size]

    def of_rank_zero(self, x: Tensor) -> Tensor:
        """Rank 0's tensor on all ranks, which have one of its shape; integers."""
        with self.progress.waits:
            return self._sum(x.clone() if self.rank == 0 else torch.zeros_like(x))

    def exchange(self, value: bytes) -> list[bytes]:
        """What each rank hands in, by rank; on the host. All of one length, or empty."""
        longest = max(self._counts(len(value)))
        own = torch.zeros(longest + 1, dtype=torch.uint8, device="cpu")
        if value:
            own[0] = 1
            own[1:] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self.progress.waits:
            self._host.allgather([found], [own]).wait()
        return [bytes(each[1:].tolist()) if each[0] else b"" for each in found]

    def say(self, word: int) -> list[int]:
        """Tell all ranks one of `FAILED`, `STEP` and `DONE`; returns what each of them said, by rank."""
        return self._counts(word)

    def _counts(self, value: int) -> list[int]:
        values = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        values[self.rank] = value
        with self.progress.waits:
            self._host.allreduce([values]).wait()
        return values.tolist()

    def abort(self) -> None:
        """Let nothing wait for other ranks any more, which are gone: what runs ends, with values that nobody may use.
        From any thread."""
        one_shot = self.one_shot
        if one_shot is not None:
            one_shot.end()
        for call in self.endings:
            call()
        device = self._device
        if device is not None and device is not self._host:
            with suppress(RuntimeError):
                device.abort()

    def close(self) -> None:
        """Leave. Nothing may be under way, and no graph may hold a collective."""
        _groups.pop(self.number, None)
        if self._device is not self._host:
            with suppress(RuntimeError):  # not an orderly end, for which NCCL would wait for the others
                self._device.abort()
        if self.one_shot is not None:
            with suppress(DeviceError):
                self.one_shot.close()
        for memory in self._memories:
            with suppress(DeviceError):
                memory.close()
        self._memories, self.endings = [], []
        self._host = self._device = self.one_shot = None


def _wait(work: Any) -> None:
    if work is not None:  # what ran on the current stream may have none
        work.wait()


def _nccl(store: dist.Store, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=STEP_SECONDS)
    return dist.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set what the user has not set, meanwhile."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _gloo(store: dist.Store, rank: int, size: int) -> Any:
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname="127.0.0.1")]  # nobody else can connect
    options._timeout = timedelta(seconds=JOIN_SECONDS)
    group = kind(store, rank, size, options)
    group._set_default_timeout(timedelta(seconds=STEP_SECONDS))
    return group


def all_reduce(x: Tensor, group: int) -> Tensor:
    """The sum of a tensor over the ranks of a group, by its number."""
    found: Tensor = torch.ops.hybridgen.all_reduce.default(x, group)
    return found


def all_gather(x: Tensor, group: int, size: int) -> Tensor:
    """[..., part] of each rank -> [..., size] on all: one behind the other, by rank, without the padding at the end."""
    found: Tensor = torch.ops.hybridgen.all_gather.default(x, group, size)
    return found


_library.impl("all_reduce", lambda x, group: _groups[group].reduce(x), "CompositeExplicitAutograd")
_library.impl("all_gather", lambda x, group, size: _groups[group].gather(x, size), "CompositeExplicitAutograd")


@torch.library.register_fake("hybridgen::all_reduce", lib=_library)
def _fake_all_reduce(x: Tensor, group: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("hybridgen::all_gather", lib=_library)
def _fake_all_gather(x: Tensor, group: int, size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], size))
