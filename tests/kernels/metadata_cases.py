"""Cases of `copy_metadata`, for its tests, and the Triton kernel on them in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = [torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int16]
Pairs = list[tuple[Tensor, Tensor]]
Copy = Callable[[list[Tensor], list[Tensor]], None]


class Maker:
    """Makes tensors of any bits, the same ones for the same seed, and remembers them."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self.made: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        size = 1
        for length in shape:
            size *= length
        bits = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=self._generator)
        tensor = bits % 2 == 1 if dtype == torch.bool else bits.view(dtype)
        self.made.append(tensor.reshape(shape).to(self.device))
        return self.made[-1]


def _mixed(make: Maker) -> Pairs:
    return [(make(37 + i, dtype=d), make(37 + i, dtype=d)) for i, d in enumerate(DTYPES)]


def _slices(make: Maker) -> Pairs:
    return [(make(33, dtype=d)[1:], make(40, dtype=d)[3:35]) for d in DTYPES]


def _blocks(make: Maker) -> Pairs:
    return [
        (make(5, 70), make(8, 100)[:5, :70]),
        (make(9, 90)[2:7, 1:71], make(5, 70)),
        (make(9, 90, dtype=torch.int64)[2:7, 1:71], make(8, 100, dtype=torch.int64)[:5, 30:]),
        (make(3, 1500, dtype=torch.bool), make(4, 2048, dtype=torch.bool)[1:, 5:1505]),
        (make(1, 1), make(2, 2)[1:, 1:]),
    ]


def _strided(make: Maker) -> Pairs:
    return [
        (make(100)[::3], make(34)),
        (make(34), make(70)[1:69:2]),
        (make(20, 30).t(), make(30, 20)),
        (make(30, 20)[::2, 1::3], make(7, 15).t()),
        (make(1).expand(50), make(50)),
        (make(40).expand(6, 40), make(6, 64)[:, :40]),
        (make(6, 1).expand(6, 40), make(6, 40)),
    ]


def _small(make: Maker) -> Pairs:
    empty = (make(9)[5:5], make(9)[:0]), (make(4, 3)[:, :0], make(4, 0)), (make(4, 3)[:0], make(0, 3))
    return [empty[0], (make(dtype=torch.int64), make(dtype=torch.int64)), empty[1], (make(1), make(1)), empty[2]]


CASES: dict[str, Callable[[Maker], Pairs]] = {
    "one": lambda make: [(make(32), make(32))],
    "seven": lambda make: [(make(32), make(32)) for _ in range(7)],
    "eight": lambda make: [(make(32), make(32)) for _ in range(8)],
    "32": lambda make: [(make(i + 1, dtype=DTYPES[i % 8]), make(i + 1, dtype=DTYPES[i % 8])) for i in range(32)],
    "70": lambda make: [(make(i), make(i)) for i in range(70)],
    "long": lambda make: [(make(n), make(n)) for n in (1023, 1024, 1025, 5000, 1)],
    "mixed dtypes": _mixed,
    "slices": _slices,
    "blocks": _blocks,
    "strided": _strided,
    "small": _small,
    "nothing": lambda make: [(make(0), make(0))],
}


class Case(NamedTuple):
    sources: list[Tensor]
    destinations: list[Tensor]
    made: list[Tensor]
    """The whole tensors that those are parts of."""


def build(name: str, device: str) -> Case:
    make = Maker(device)
    pairs = CASES[name](make)
    return Case([s for s, _ in pairs], [d for _, d in pairs], make.made)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def check(name: str, device: str, copy: Copy) -> None:
    """The same bits as torch's copies everywhere, also around the destinations."""
    ours, expected = build(name, device), build(name, device)
    for source, destination in zip(expected.sources, expected.destinations, strict=True):
        destination.copy_(source)
    copy(ours.sources, ours.destinations)
    for a, b in zip(ours.made, expected.made, strict=True):
        assert torch.equal(bits(a), bits(b)), name


def _interpret(sources: list[Tensor], destinations: list[Tensor]) -> None:
    from hybridgen.kernels.step.metadata_copy import BLOCK, copy_kernel, work_of

    for programs, words in work_of(sources, destinations):
        copy_kernel[programs, 1, 1](words, len(words) // 8, BLOCK, False)


def check_kernel() -> None:
    """The kernel on all cases; only in the interpreter, where test_metadata.py runs it."""
    for case in CASES:
        check(case, "cpu", _interpret)
