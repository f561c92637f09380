"""Which of cuBLAS's two interfaces multiplies in steps of a middle number of tokens.

Both choose among the same kernels by other rules. On an H200 whole steps of 32 to 96 rows of an 8B take 3 to 5 % less
by cublasLt, those of 24 and of 256 rows 0 to 1 % more. Torch asks for one of them by a setting of the process, which is
changed around a step's launch and put back. Steps of one size are always launched alike, recorded or not, so that they
have equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hybridgen.models.measured import Measured

_SIZES = range(24, 209)
"""Tokens of steps that are tried."""
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
    layers: Sequence[nn.Module],
    sizes: Sequence[int],
    seconds: Callable[[Sequence[Tensor], int], float],
    measured: Measured,
) -> frozenset[int]:
    """The sizes of steps whose products are faster by cublasLt.

    Args:
        layers: whose weights are multiplied with, as many of them as are needed.
        sizes: tokens of steps.
        seconds: what products of these weights with so many rows take.
        measured: what earlier trials chose.
    """
    weights = _weights(layers)

    def slower(rows: int) -> str | None:
        usual = seconds(weights, rows)
        with by_cublaslt():
            other = seconds(weights, rows)
        return None if other < _GAIN * usual else "cuBLAS is as fast"

    tried = [rows for rows in sizes if rows in _SIZES] if weights else []
    return frozenset(
        rows for rows in tried if measured.slower(f"{rows} tokens by cublasLt", partial(slower, rows)) is None
    )


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
