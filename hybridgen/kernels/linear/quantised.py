"""A product with a quantised weight: the op `hybridgen::quantised_linear`.

`x @ dequantised.T + bias` for x of any number of rows. On a CPU the weight is dequantised to x's dtype and multiplied
by torch, which is the reference; few rows of weights of 8 and 4 bits go through torch's own products (`int4_cpu`). On
CUDA few rows go through a Triton kernel that unpacks in registers, and many through a dequantised copy and cuBLAS
(`quantised_kernels`). On request many rows are rounded to FP8 too (`rounded_rows`). The weight's layout:
`hybridgen.kernels.linear.layout`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridgen.kernels.linear import int4_cpu, rounded_rows
from hybridgen.kernels.linear.layout import Block, dequantise

_FEW_ROWS = 4
"""Rows that torch's product with 8-bit weights takes on a CPU: its time grows with them, that of unpacking does not."""

MANY_ROWS = 256
"""Above so many, rows are rounded where that is asked for; up to so many, the weight's bytes bound a product's time."""

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "quantised_linear(Tensor x, Tensor data, Tensor scales, Tensor? zeros, Tensor? bias, str kind, int inputs, "
    "int block_outputs, int block_inputs, bool rounds_rows=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def quantised_linear(
    x: Tensor,
    kind: str,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    inputs: int,
    block: Block,
    *,
    rounds_rows: bool = False,
) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: [..., K], float32, bfloat16 or float16; what the values are rounded to before they are multiplied.
        kind: with `data`, `scales`, `zeros` and `block`, a weight [N, K] as `layout` has it.
        bias: [N] in x's dtype.
        inputs: K.
        rounds_rows: more than `MANY_ROWS` rows are rounded to FP8; of a weight that `rounded_rows.takes`.

    Returns:
        [..., N] in x's dtype.
    """
    return torch.ops.hybridgen.quantised_linear.default(
        x, data, scales, zeros, bias, kind, inputs, block.outputs, block.inputs, rounds_rows
    )


def are_many(x: Tensor) -> bool:
    """Whether x has more than `MANY_ROWS` rows."""
    return x.numel() > MANY_ROWS * x.shape[-1]


def reference(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    kind: str,
    inputs: int,
    block_outputs: int,
    block_inputs: int,
    rounds_rows: bool = False,
) -> Tensor:
    """With dequantised values, in plain torch."""
    if rounds_rows and are_many(x):
        rows = x.reshape(-1, inputs)
        return rounded_rows.reference(rows, data, scales, bias, block_outputs).view(*x.shape[:-1], data.shape[0])
    block = Block(block_outputs, block_inputs)
    return F.linear(x, dequantise(kind, data, scales, zeros, inputs, block, x.dtype), bias)


def _cpu(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    kind: str,
    inputs: int,
    block_outputs: int,
    block_inputs: int,
    rounds_rows: bool = False,
) -> Tensor:
    rows = x.numel() // max(1, inputs)
    if kind == "int4" and block_outputs == 1 and rows and not rounds_rows:
        found = int4_cpu.product(x.reshape(rows, inputs), data, scales, zeros, inputs, block_inputs)
        if found is not None:
            found = found.view(*x.shape[:-1], data.shape[0])
            return found if bias is None else found + bias
    plain = kind == "int8" and zeros is None and block_outputs == 1 and scales.shape[1] == 1
    exact = x.dtype in (scales.dtype, torch.float32)
    if not plain or not exact or not 0 < rows <= _FEW_ROWS or not data.is_contiguous():
        return reference(x, data, scales, zeros, bias, kind, inputs, block_outputs, block_inputs, rounds_rows)
    out = torch._weight_int8pack_mm(x.reshape(rows, inputs).contiguous(), data, scales[:, 0].to(x.dtype))
    out = out.view(*x.shape[:-1], data.shape[0])
    return out if bias is None else out + bias


def _cuda(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    kind: str,
    inputs: int,
    block_outputs: int,
    block_inputs: int,
    rounds_rows: bool = False,
) -> Tensor:
    if rounds_rows and are_many(x):
        from hybridgen.kernels.linear import rounded_rows_kernels as rounding

        rows = x.reshape(-1, inputs)
        product = rounding.product if rounding.fits(rows) else rounded_rows.reference
        return product(rows, data, scales, bias, block_outputs).view(*x.shape[:-1], data.shape[0])
    from hybridgen.kernels.linear.quantised_kernels import linear

    return linear(x, kind, data, scales, zeros, bias, inputs, Block(block_outputs, block_inputs))


def _fake(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    kind: str,
    inputs: int,
    block_outputs: int,
    block_inputs: int,
    rounds_rows: bool = False,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], data.shape[0])


_library.impl("quantised_linear", _cpu, "CPU")
_library.impl("quantised_linear", _cuda, "CUDA")
torch.library.register_fake("hybridgen::quantised_linear", _fake, lib=_library)
