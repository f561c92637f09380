"""The product of a few rows with a weight on a CPU: the op `hybridgen::few_rows`.

oneDNN's kernel where torch has it: with 2 to 16 rows it takes about two thirds of the time of the BLAS behind
`torch.mm` on processors that BLAS is not made for, and with one row nine tenths.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_ROWS = 32
"""Rows for which this is meant."""

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "few_rows(Tensor rows, Tensor weight, Tensor? bias=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def few_rows(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [B, in], weight [out, in], bias [out], all float32: [B, out]."""
    found: Tensor = torch.ops.hybridgen.few_rows.default(rows, weight, bias)
    return found


def takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is meant for such a product."""
    count = rows.numel() // max(1, rows.shape[-1])
    if rows.dtype is not torch.float32 or weight.dtype is not torch.float32 or not rows.is_contiguous():
        return False
    return 0 < count <= MOST_ROWS and has_onednn()


@functools.cache
def has_onednn() -> bool:
    """Whether this torch has oneDNN's product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    return found


def _few_rows_cpu(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not has_onednn():
        return F.linear(rows, weight, bias)
    return _onednn(rows, weight, bias)


def _few_rows_fake(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0]))


_library.impl("few_rows", _few_rows_cpu, "CPU")
torch.library.register_fake("hybridgen::few_rows", _few_rows_fake, lib=_library)
