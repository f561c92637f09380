"""The second half of a decoder layer with a mixture of experts: the op `hybridgen::mixture`.

What attention gives is added to the layer's input, the sum is normalised (RMSNorm, arXiv:1910.07467), a router chooses
experts for it, and their weighted results are added to the sum. As ops of their own these are a norm,
`hybridgen::route`, `hybridgen::experts` and a sum; of one token with experts in MXFP4 `mixture_kernels` does them in
five kernels, which start while the ones before them end.

| tensor | shape |
|---|---|
| x, added | [T, H]: the layer's input, and attention's result |
| norm | [H]: the norm's weight |
| router, router_bias | see `hybridgen.kernels.linear.route` |
| gate_up, down, scales, biases | see `hybridgen.kernels.linear.experts`; MXFP4 in blocks of 32 inputs |
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridgen.kernels.linear import experts as experts_op
from hybridgen.kernels.linear import route as route_op
from hybridgen.kernels.linear.experts_form import Form, Normed, Projection, Routed, RouteForm
from hybridgen.kernels.linear.layout import Block

KIND, BLOCK = "mxfp4", Block(1, 32)
"""Of the experts."""

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "mixture(Tensor x, Tensor added, Tensor norm, float eps, float shift, Tensor router, Tensor? router_bias, "
    "int chosen, bool chosen_only, bool normalised, bool wide, Tensor gate_up, Tensor gate_up_scales, "
    "Tensor? gate_up_bias, Tensor down, Tensor down_scales, Tensor? down_bias, bool interleaved, str activation, "
    "float alpha, float limit) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def mixture(
    x: Tensor, added: Tensor, norm: Normed, routed: Routed, gate_up: Projection, down: Projection, form: Form
) -> Tensor:
    """[T, H] in x's dtype. See the module for shapes."""
    assert gate_up.scales is not None
    assert down.scales is not None
    weight, bias, chosen, route_form = routed
    found: Tensor = torch.ops.hybridgen.mixture.default(
        x, added, *norm, weight, bias, chosen, *route_form, gate_up.data, gate_up.scales, gate_up.bias,
        down.data, down.scales, down.bias, form.interleaved, form.activation, form.alpha, form.limit,
    )  # fmt: skip
    return found


def normalised(x: Tensor, norm: Normed) -> Tensor:
    """States, normalised in float32 (float64 of float64) and rounded once."""
    rows = x if x.dtype == torch.float64 else x.float()
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + norm.eps)
    return (rows * (norm.weight.to(rows.dtype) + norm.shift)).to(x.dtype)


def by_ops(
    x: Tensor, added: Tensor, norm: Normed, routed: Routed, gate_up: Projection, down: Projection, form: Form
) -> Tensor:
    """The same by one op after the other."""
    states = x + added
    normed = normalised(states, norm)
    _, scores, ids = route_op.route(normed, routed.weight, routed.bias, routed.chosen, routed.form)
    return states + experts_op.experts(normed, ids, scores, gate_up, down, form, KIND, BLOCK)


def _unpacked(
    x: Tensor, added: Tensor, norm: Tensor, eps: float, shift: float, router: Tensor, router_bias: Tensor | None,
    chosen: int, chosen_only: bool, normalised: bool, wide: bool, gate_up: Tensor, gate_up_scales: Tensor,
    gate_up_bias: Tensor | None, down: Tensor, down_scales: Tensor, down_bias: Tensor | None, interleaved: bool,
    activation: str, alpha: float, limit: float,
) -> tuple[Tensor, Tensor, Normed, Routed, Projection, Projection, Form]:  # fmt: skip
    return (
        x,
        added,
        Normed(norm, eps, shift),
        Routed(router, router_bias, chosen, RouteForm(chosen_only, normalised, wide)),
        Projection(gate_up, gate_up_scales, None, gate_up_bias),
        Projection(down, down_scales, None, down_bias),
        Form(activation, interleaved, False, alpha, limit),
    )


def _cpu(*arguments: object) -> Tensor:
    return by_ops(*_unpacked(*arguments))  # type: ignore[arg-type]


def _cuda(*arguments: object) -> Tensor:
    from hybridgen.kernels.linear.mixture_kernels import mixture_on_cuda

    given = _unpacked(*arguments)  # type: ignore[arg-type]
    found = mixture_on_cuda(*given)
    return by_ops(*given) if found is None else found


def _fake(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("mixture", _cpu, "CPU")
_library.impl("mixture", _cuda, "CUDA")
torch.library.register_fake("hybridgen::mixture", _fake, lib=_library)
