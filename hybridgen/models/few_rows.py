"""Projections in 16 bits on CUDA: in recorded decode steps of a few rows the op `hybridgen::few_rows` multiplies.

cuBLAS has too few programs for weights of a few thousand outputs and one row. The op asks for the number of rows when
it runs, and gives more of them to cuBLAS; so does prefill, whose calls the op would only make longer on the host.
Modules become `RowsLinear`, or are joined ones (`FusedHead`), and go by what hangs on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridgen.kernels.step.linear import few_rows, serves
from hybridgen.models.attention import Phase, StepMetadata
from hybridgen.models.projections import FusedHead, RowsLinear

_TOLERANCE = 1e-2
"""Of the norm of the results: rounding inputs and results to bfloat16 gives a fifth of it."""


class RowsBinding:
    """What a projection needs to know of a step; an attribute of the module."""

    __slots__ = ("step",)

    def __init__(self, step: StepMetadata) -> None:
        self.step = step

    @property
    def decodes(self) -> bool:
        """Whether the step is one of decode."""
        return self.step.phase is Phase.DECODE


class RowsSite(NamedTuple):
    """A projection that the op serves."""

    module: nn.Linear
    kind: type[nn.Linear]
    """Its class as it was."""


def find_rows(model: nn.Module, allowed: Callable[[Tensor, Tensor | None], bool]) -> Iterator[RowsSite]:
    """The projections that the op serves.

    Args:
        allowed: asked of each weight and bias.
    """
    for module in model.modules():
        kind = type(module)
        if kind not in (nn.Linear, RowsLinear, FusedHead) or "forward" in vars(module):
            continue
        own: Any = module
        weight, bias = (own.fused_weight, own.fused_bias) if kind is FusedHead else (own.weight, own.bias)
        if type(weight) is nn.Parameter and allowed(weight, bias):
            yield RowsSite(own, kind)


def use_rows_of(site: RowsSite) -> None:
    """From now on the module multiplies by the op in decode, once a `RowsBinding` hangs on it."""
    if site.kind is nn.Linear:
        site.module.__class__ = RowsLinear


def use_own_product(site: RowsSite) -> None:
    """Undo `use_rows_of`."""
    site.module.__class__ = site.kind


class RowsCheck:
    """Which weights the op serves on their device: those for which its kernel gives what torch does, tried once for
    each kind."""

    def __init__(self, fall_back: Callable[[str], None] | None) -> None:
        self._fall_back = fall_back
        self._known: dict[Any, bool] = {}

    def __call__(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the op serves a weight."""
        if not weight.is_cuda or not serves(weight, bias):
            return False
        key = weight.device, weight.dtype, weight.shape, bias is None
        if key not in self._known:
            problem = _problem(weight, bias)
            self._known[key] = problem is None
            if problem is not None and self._fall_back is not None:
                self._fall_back(f"a projection of few rows is left to cuBLAS: {problem}")
        return self._known[key]


@torch.inference_mode()
def _problem(weight: Tensor, bias: Tensor | None) -> str | None:
    for number in (1, 2):
        g = torch.Generator().manual_seed(number)
        x = torch.randn(number, weight.shape[1], generator=g).to(weight.device, weight.dtype)
        try:
            with torch.cuda.device(weight.device):
                found = few_rows(x, weight, bias)
        except Exception as error:  # whatever Triton raises
            return f"its kernel failed: {type(error).__name__}: {error}"
        wanted = nn.functional.linear(x, weight, bias).float()
        size, error_size = float(wanted.norm()), float((found.float() - wanted).norm())
        if not error_size <= _TOLERANCE * size:
            return f"of {number} random rows its results are off by {error_size / size if size else error_size:.3g}"
    return None
