"""The processes of a group as torch's collectives see them, and the two collectives that a model calls as ops.

`hybridgen::all_reduce` and `hybridgen::all_gather` are opaque to compilers. They go by a process group of the engine's
own: gloo on a CPU, NCCL on CUDA (which has not been run yet). torch's default process group is the caller's and is
neither made nor used.

The sum of an all-reduce has the same bits on all ranks, because each part of it is added up on one rank and copied to
the others. So all ranks choose the same tokens.
"""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridgen.errors import DeviceError, first_line

JOIN_SECONDS = 120.0
"""For all ranks to find each other."""
STEP_SECONDS = 120.0
"""For a collective, which waits for the slowest rank. `Ranks` notices within seconds one that died or stands still."""

FAILED, STEP, DONE = 1, 2, 3
"""What a rank says when it agrees with the others: that it cannot go on, that it runs a step now, that it is done."""

_groups: dict[int, Group] = {}
_numbers = itertools.count()

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define("all_reduce(Tensor x, int group) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("all_gather(Tensor x, int group, int size) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class Group:
    """The ranks of one engine."""

    def __init__(self, rank: int, size: int, store: Path, device: torch.device) -> None:
        """Join; waits for the others.

        Args:
            store: a file in a directory of the user's own, through which the ranks find each other.
            device: where this rank's share of the model is.

        Raises:
            DeviceError: the others cannot be reached.
        """
        self.rank = rank
        self.size = size
        self.number = next(_numbers)
        """By which the ops find it."""
        file = dist.FileStore(str(store), size)
        file.set_timeout(timedelta(seconds=JOIN_SECONDS))
        try:
            self._host: Any = _gloo(dist.PrefixStore("host", file), rank, size)
            self._device: Any = self._host
            if device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timedelta(seconds=STEP_SECONDS)
                self._device = dist.ProcessGroupNCCL(dist.PrefixStore("device", file), rank, size, options)
        except RuntimeError as error:  # no port, no network interface, a rank that is not there
            raise DeviceError(
                f"rank {rank} of {size} cannot join the group: {first_line(error)}; is the loopback interface up, and "
                "are ports free?"
            ) from error
        _groups[self.number] = self

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor of the same shape."""
        total = x.clone(memory_format=torch.contiguous_format)
        self._device.allreduce([total]).wait()
        return total

    def gather(self, x: Tensor, size: int) -> Tensor:
        """The parts of all ranks one behind the other along the last dimension, which is then cut to `size`."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        self._device.allgather([parts], [x.contiguous()]).wait()
        return torch.cat(parts, dim=-1)[..., :size]

    def say(self, word: int) -> list[int]:
        """Tell all ranks one of `FAILED`, `STEP` and `DONE`; returns what each of them said, by rank."""
        words = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        words[self.rank] = word
        self._host.allreduce([words]).wait()
        return words.tolist()

    def close(self) -> None:
        """Leave. Nothing may be under way."""
        _groups.pop(self.number, None)
        self._host = self._device = None


def _gloo(store: dist.Store, rank: int, size: int) -> Any:
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname="127.0.0.1")]  # nobody else can connect
    options._timeout = timedelta(seconds=STEP_SECONDS)
    return kind(store, rank, size, options)


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
