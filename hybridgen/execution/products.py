"""Which of cuBLAS's two interfaces multiplies in decode steps of middle sizes.

Both choose among the same kernels by other rules. On an H200 whole steps of 32 to 96 rows of an 8B take 3 to 5 % less
by cublasLt, those of 24 and of 256 rows 0 to 1 % more. Torch asks for one of them by a setting of the process, which is
changed around a step's launch and put back. Steps of one size are always launched alike, recorded or not, so that they
have equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

IS_ON = False
"""Off until a whole mix has run with it on a GPU."""
_SIZES = range(24, 209)
"""Rows of steps that are tried."""
_ENOUGH = 256 * 2**20
"""Bytes of weights that a trial goes through: several times what a cache holds."""
_ROUNDS = 4
_GAIN = 0.99
"""Of cuBLAS's time, which cublasLt has to stay below."""


@contextmanager
def by_cublaslt() -> Iterator[None]:
    """Inside, torch multiplies by cublasLt."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def choose(
    layers: Sequence[nn.Module], sizes: Sequence[int], seconds: Callable[[Sequence[Tensor], int], float]
) -> frozenset[int]:
    """The sizes of decode steps whose products are faster by cublasLt.

    Args:
        layers: whose weights are multiplied with, as many of them as are needed.
        sizes: rows of steps.
        seconds: what products of these weights with so many rows take.
    """
    weights = _weights(layers)
    found = set()
    for rows in sizes if weights else ():
        if rows not in _SIZES:
            continue
        usual = seconds(weights, rows)
        with by_cublaslt():
            other = seconds(weights, rows)
        if other < _GAIN * usual:
            found.add(rows)
    return frozenset(found)


def _weights(layers: Sequence[nn.Module]) -> list[Tensor]:
    """16-bit weights of projections, layer by layer, until there are enough; none where there are not."""
    weights: list[Tensor] = []
    total = 0
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.weight.dtype.itemsize == 2 and module.weight.dim() == 2:
                weights.append(module.weight.detach())
                total += module.weight.nbytes
        if total >= _ENOUGH:
            return weights
    return []


def seconds_of(weights: Sequence[Tensor], rows: int) -> float:
    """What products of these weights with so many rows take on their device, each after the others."""
    inputs = {weight.shape[1]: weight.new_zeros(rows, weight.shape[1]).normal_() for weight in weights}

    def multiply() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[1]], weight.t())

    multiply()  # it chooses an algorithm, and loads its kernel
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(_ROUNDS):
        begin.record()
        multiply()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best / 1e3
