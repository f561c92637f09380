"""Products of FP8 weights with rows that are rounded to FP8 too (W8A8), each row by a scale of its own.

A row's scale is its largest number over 448, so that nothing is cut off (the dynamic activation scales of
FP8-dynamic checkpoints). Products and sums are those of the codes; both scales multiply the sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0
"""Of float8_e4m3fn."""
_SMALLEST = 2.0**-100
"""The scale of a row of zeros."""


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [M, K] as codes float8_e4m3fn [M, K] and scales float32 [M, 1]."""
    values = x.float()
    scales = (values.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=_SMALLEST)
    return (values / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales


def takes(data: Tensor, scales: Tensor) -> str | None:
    """Why a weight does not multiply rounded rows, or None.

    Args:
        data, scales: of a weight as `kernels.linear.layout` has it.
    """
    if data.dtype != torch.float8_e4m3fn:
        return "they are not FP8"
    if scales.shape[1] != 1:
        return "their scales are of blocks of inputs"
    if data.shape[0] % 16 or data.shape[1] % 16:
        return "their sizes are no multiples of 16"
    return None


def row_scales(scales: Tensor, outputs: int, block_outputs: int) -> Tensor:
    """A float32 scale for each output, [outputs]."""
    if scales.shape[0] == 1:
        return scales[0].float().expand(outputs)
    return (scales if block_outputs == 1 else scales.repeat_interleave(block_outputs, 0)[:outputs])[:, 0].float()


def reference(x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, block_outputs: int) -> Tensor:
    """`round_rows(x) @ weight.T + bias`, [M, N] in x's dtype; products and sums in float32."""
    codes, row_scale = round_rows(x)
    out = F.linear(codes.float(), data.float()) * row_scale * row_scales(scales, data.shape[0], block_outputs)
    return (out if bias is None else out + bias.float()).to(x.dtype)
