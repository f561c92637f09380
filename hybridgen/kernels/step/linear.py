"""The product of a few rows with a weight: the op `hybridgen::few_rows`.

On a CPU oneDNN's kernel where torch has it: with 2 to 16 rows it takes about two thirds of the time of the BLAS behind
`torch.mm` on processors that BLAS is not made for, and with one row nine tenths. On CUDA one row or two go
through a Triton kernel (`linear_kernels`): cuBLAS has too few programs for weights of a few thousand outputs (11.4 us
for 2880 x 4096 on an H200, where the kernel takes 7.8 and reading 5.2).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_ROWS = 32
"""Rows for which this is meant on a CPU."""
_CUDA_ROWS = 2
"""On CUDA; more take cuBLAS no longer than the kernel."""
_MOST_OUTPUTS = 16384
"""On CUDA. Above, cuBLAS has programs enough."""
_LEAST_INPUTS, _MOST_INPUTS = 256, 16384

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "few_rows(Tensor rows, Tensor weight, Tensor? bias=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def few_rows(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [B, in], weight [out, in], bias [out]: [B, out]. All of one dtype: float32 on a CPU, any float on CUDA."""
    found: Tensor = torch.ops.hybridgen.few_rows.default(rows, weight, bias)
    return found


def serves(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel on CUDA is for a weight; what it is given and how many rows is asked when it runs."""
    outputs, inputs = weight.shape
    sizes = outputs <= _MOST_OUTPUTS and _LEAST_INPUTS <= inputs <= _MOST_INPUTS and inputs % 8 == 0
    alike = bias is None or (bias.dtype == weight.dtype and bias.is_contiguous())
    return weight.dtype in (torch.bfloat16, torch.float16) and sizes and alike and weight.is_contiguous()


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


def _few_rows_cuda(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not 0 < rows.shape[0] <= _CUDA_ROWS or rows.dtype != weight.dtype or not serves(weight, bias):
        return F.linear(rows, weight, bias)
    from hybridgen.kernels.step.linear_kernels import product

    return product(rows, weight, bias)


def _few_rows_fake(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0]))


_library.impl("few_rows", _few_rows_cpu, "CPU")
_library.impl("few_rows", _few_rows_cuda, "CUDA")
torch.library.register_fake("hybridgen::few_rows", _few_rows_fake, lib=_library)
