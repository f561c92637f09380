"""Which experts a token goes to: the op `hybridgen::route`.

A projection to one number for each expert, the largest of them, and what each of the chosen counts. A module for it
runs five kernels or more in a decode step; on CUDA these are two (`route_kernels`).

| tensor | shape |
|---|---|
| x | [T, H], float32, bfloat16 or float16 |
| weight, bias | [E, H], and [E] or None, in x's dtype |
| logits | [T, E] in x's dtype |
| scores | [T, k] in x's dtype, or float32: of the experts in `ids` |
| ids | [T, k] int64, the largest first; of equal ones those of the first experts |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridgen.kernels.linear.experts_form import RouteForm

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "route(Tensor x, Tensor weight, Tensor? bias, int chosen, bool chosen_only, bool normalised, bool wide) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: int, form: RouteForm
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, scores, ids). See the module for shapes.

    Args:
        chosen: experts of a token, k.
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.hybridgen.route.default(x, weight, bias, chosen, *form)
    return found


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: int, chosen_only: bool, normalised: bool, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """In plain torch."""
    logits = F.linear(x, weight, bias)
    if chosen_only:
        values, ids = torch.topk(logits, chosen, dim=-1)
        scores = F.softmax(values, dim=-1)
    else:
        scores, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float32), chosen, dim=-1)
        if normalised:
            scores = scores / scores.sum(-1, keepdim=True)
    return logits, scores.to(torch.float32 if wide else x.dtype), ids


def _cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: int, chosen_only: bool, normalised: bool, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from hybridgen.kernels.linear.route_kernels import route_on_cuda, takes

    if takes(x, weight, bias):
        return route_on_cuda(x, weight, bias, chosen, RouteForm(chosen_only, normalised, wide))
    return reference(x, weight, bias, chosen, chosen_only, normalised, wide)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: int, chosen_only: bool, normalised: bool, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    scores = x.new_empty(tokens, chosen, dtype=torch.float32 if wide else x.dtype)
    return x.new_empty(tokens, weight.shape[0]), scores, x.new_empty(tokens, chosen, dtype=torch.int64)


_library.impl("route", reference, "CPU")
_library.impl("route", _cuda, "CUDA")
torch.library.register_fake("hybridgen::route", _fake, lib=_library)
