"""Gate and up of an MLP: the op `hybridgen::gated_rows`, silu(x @ gate.T) * (x @ up.T).

On CUDA thousands of rows go through a kernel that writes neither product (`many_rows`), where that serves; fewer go
through cuBLAS and a Triton kernel. All round both products to the rows' dtype first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridgen.kernels.attention.ops import on_device_of

LEAST_ROWS = 1024
"""From which on the kernel is used."""

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define("gated_rows(Tensor rows, Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def gated_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [M, K], weight [2 * N, K], gate in front of up: [M, N] in their dtype."""
    found: Tensor = torch.ops.hybridgen.gated_rows.default(rows, weight)
    return found


def _gated_rows_cpu(rows: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(rows, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def _gated_rows_cuda(rows: Tensor, weight: Tensor) -> Tensor:
    with on_device_of(rows):
        if rows.shape[0] >= LEAST_ROWS and _fits(rows, weight) and has_kernel(weight):
            from hybridgen.kernels.linear.many_rows import gated

            return gated(rows, weight)
        return by_cublas(rows, weight)


def _fits(rows: Tensor, weight: Tensor) -> bool:
    return rows.dtype == weight.dtype and rows.is_contiguous() and not rows.data_ptr() % 16


def has_kernel(weight: Tensor) -> bool:
    """Whether there is a kernel for a weight on its device."""
    if not weight.is_cuda:
        return False
    from hybridgen.kernels.linear.many_rows import serves

    return serves(weight)


def by_cublas(rows: Tensor, weight: Tensor) -> Tensor:
    """See `gated_rows`; on CUDA, whatever the number of rows."""
    from hybridgen.kernels.linear.gated_kernels import gate

    return gate(F.linear(rows, weight))


def _gated_rows_fake(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0] // 2))


_library.impl("gated_rows", _gated_rows_cpu, "CPU")
_library.impl("gated_rows", _gated_rows_cuda, "CUDA")
torch.library.register_fake("hybridgen::gated_rows", _gated_rows_fake, lib=_library)
