"""Experts of a mixture: the op `hybridgen::experts`.

For each token the experts that a router chose: two projections of its state (gate and up), an activation, a third
projection (down), and the sum over the experts by the router's weights. Ids are read on the device, and only the
weights of chosen experts are read.

| tensor | shape |
|---|---|
| x | [T, H], float32, bfloat16 or float16 |
| ids | [T, k], int64: experts, all below E; what they say of padding is computed and not looked at |
| weights | [T, k], floating: what each expert's result counts |
| gate_up | dense: [E, 2 I, H], or transposed [E, H, 2 I], in x's dtype; else the data of E weights [2 I, H] of one kind, one after the other, as `layout` has them: [E, 2 I, ...] |
| down | the same of E weights [H, I] |
| scales, zeros | None for dense weights; else [E, ...] of what `layout` has for one |
| biases | [E, 2 I] and [E, H] in x's dtype, or None |

On a CPU it is plain torch, the reference. On CUDA see `experts_kernels`: products sum in float32, and of up to
`FEW_ROWS` tokens the result of each is the same bits whatever the others are.
"""  # noqa: E501

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridgen.kernels.linear import layout
from hybridgen.kernels.linear.experts_form import DENSE, Form, Projection
from hybridgen.kernels.linear.layout import KINDS, Block, dequantise

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "experts(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor? gate_up_scales, Tensor? gate_up_zeros, "
    "Tensor? gate_up_bias, Tensor down, Tensor? down_scales, Tensor? down_zeros, Tensor? down_bias, str kind, "
    "int block_outputs, int block_inputs, bool transposed, bool interleaved, str activation, float alpha, float limit) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Projection,
    down: Projection,
    form: Form,
    kind: str = DENSE,
    block: Block | None = None,
) -> Tensor:
    """Results of chosen experts, [T, H] in x's dtype. See the module for shapes.

    Args:
        kind: `dense`, or one of `layout.KINDS`.
        block: of both projections, for other kinds than dense; 0 inputs say that a scale is a whole row's.
    """
    outputs, inputs = block or Block(0, 0)
    found: Tensor = torch.ops.hybridgen.experts.default(
        x, ids, weights, *gate_up, *down, kind, outputs, inputs,
        form.transposed, form.interleaved, form.activation, form.alpha, form.limit,
    )  # fmt: skip
    return found


def activate(gate_up: Tensor, form: Form) -> Tensor:
    """[..., 2 I] to [..., I].

    `clamped` is gpt-oss's: the gate up to the limit, the other half within it, and
    `(up + 1) * gate * sigmoid(alpha * gate)`.
    """
    if form.interleaved:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=-1)
    if form.activation == "clamped":
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * form.alpha))
    if form.activation == "gelu":
        return F.gelu(gate) * up
    if form.activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if form.activation == "relu":
        return F.relu(gate) * up
    return F.silu(gate) * up


def expert_values(
    one: Projection, expert: int, kind: str, inputs: int, block: Block, transposed: bool, dtype: torch.dtype
) -> Tensor:
    """An expert's weight [outputs, inputs] in a dtype."""
    data = one.data[expert]
    if kind == DENSE:
        return (data.t() if transposed else data).to(dtype)
    assert one.scales is not None
    zeros = None if one.zeros is None else one.zeros[expert]
    return dequantise(
        kind, data, one.scales[expert], zeros, inputs, Block(block.outputs, block.inputs or inputs), dtype
    )


def reference(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    down_zeros: Tensor | None,
    down_bias: Tensor | None,
    kind: str,
    block_outputs: int,
    block_inputs: int,
    transposed: bool,
    interleaved: bool,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """In plain torch, with values in x's dtype. Looks at the ids on the host."""
    form = Form(activation, interleaved, transposed, alpha, limit)
    block = Block(block_outputs, block_inputs)
    first, second = (
        Projection(gate_up, gate_up_scales, gate_up_zeros, gate_up_bias),
        Projection(down, down_scales, down_zeros, down_bias),
    )
    width = (gate_up.shape[2] if transposed else gate_up.shape[1]) // 2
    results = x.new_empty(*ids.shape, x.shape[1])
    for expert in torch.unique(ids).tolist():
        tokens, places = torch.where(ids == expert)
        values = expert_values(first, expert, kind, x.shape[1], block, transposed, x.dtype)
        both = F.linear(x[tokens], values, None if gate_up_bias is None else gate_up_bias[expert].to(x.dtype))
        values = expert_values(second, expert, kind, width, block, transposed, x.dtype)
        bias = None if down_bias is None else down_bias[expert].to(x.dtype)
        results[tokens, places] = F.linear(activate(both, form), values, bias)
    return (results * weights[..., None]).sum(1).to(x.dtype)


def problem(gate_up: Projection, down: Projection, hidden: int, kind: str, block: Block | None) -> str | None:
    """What is wrong with the shapes of packed weights, or None."""
    if kind not in KINDS or block is None:
        return f"{kind!r} is none of {', '.join(KINDS)}, or has no block"
    width = gate_up.data.shape[1] // 2
    for one, inputs in ((gate_up, hidden), (down, width)):
        if one.scales is None:
            return "there are no scales"
        zeros = None if one.zeros is None else one.zeros[0]
        found = layout.problem(
            kind, one.data[0], one.scales[0], zeros, inputs, Block(block.outputs, block.inputs or inputs)
        )
        if found is not None:
            return found
    return None


def _cuda(x: Tensor, ids: Tensor, weights: Tensor, *others: object) -> Tensor:
    from hybridgen.kernels.linear.experts_launch import experts_on_cuda

    return experts_on_cuda(x, ids, weights, *others)  # type: ignore[arg-type]


def _fake(x: Tensor, ids: Tensor, weights: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("experts", reference, "CPU")
_library.impl("experts", _cuda, "CUDA")
torch.library.register_fake("hybridgen::experts", _fake, lib=_library)
