"""Whether the kernel for few rows and int4 weights computes on this device what dequantised weights do.

It is tried before an engine uses it, with one projection of each kind. Where it is wrong, a slower kernel serves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hybridgen.device.failures import is_fatal
from hybridgen.errors import described
from hybridgen.kernels.hopper import OF_FEW_ROWS, refuse, serves
from hybridgen.kernels.linear.quantised import quantised_linear
from hybridgen.models.quantised import QuantisedHead, QuantisedTail, QuantisedWeight, quantised_modules

_ROWS = (1, 4)
_OUTPUTS = 256
"""The first and the last so many outputs are compared; to compare all, all weights would have to be dequantised."""
_TOLERANCE = 2e-2
"""Of the norm of the results; rounding them to bfloat16 gives a third of a percent."""


def check_few_rows(model: nn.Module, fall_back: Callable[[str], None] | None) -> None:
    """Try the kernel with the model's int4 projections, and refuse it where it is wrong.

    Args:
        fall_back: told what takes a slower kernel.
    """
    tried = set()
    for _, module in quantised_modules(model):
        if isinstance(module, QuantisedTail) or module.kind != "int4" or not serves(OF_FEW_ROWS, module.data.device):
            continue
        weight = module.stacked if isinstance(module, QuantisedHead) else module.weight_stored
        key = weight.data.device, weight.shape, weight.block, weight.scales.dtype, weight.zeros is None
        if key in tried:
            continue
        tried.add(key)
        problem = _problem(weight)
        if problem is not None:
            refuse(OF_FEW_ROWS, weight.data.device)
            if fall_back is not None:
                fall_back(f"int4 weights times few rows take a slower kernel: {problem}")


@torch.inference_mode()
def _problem(weight: QuantisedWeight) -> str | None:
    """How far a product is from that with dequantised values, if further than rounding; else None."""
    outputs = weight.shape[0]
    few = min(_OUTPUTS, outputs)
    ends = weight.rows(0, few), weight.rows(outputs - few, outputs)
    values = torch.cat([end.dequantise(torch.float32) for end in ends])
    for rows in _ROWS:
        g = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, weight.inputs, generator=g).to(weight.data.device, torch.bfloat16)
        try:
            found = quantised_linear(
                x, weight.kind, weight.data, weight.scales, weight.zeros, None, weight.inputs, weight.block
            ).float()
        except Exception as error:  # whatever the driver raises
            if is_fatal(error):
                raise
            return f"it failed: {described(error)}"
        found = torch.cat((found[:, :few], found[:, outputs - few :]), 1)
        wanted = F.linear(x.float(), values)
        size, error_size = float(wanted.norm()), float((found - wanted).norm())
        if not error_size <= _TOLERANCE * size:
            return f"of {rows} random rows its results are off by {error_size / size if size else error_size:.3g}"
    return None
