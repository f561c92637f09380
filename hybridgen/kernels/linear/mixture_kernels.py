"""Triton, and `experts_one.cu`: the second half of a layer with a mixture, of one token.

What they compute: `hybridgen.kernels.linear.mixture`. Five kernels, one after the other:

- *norm and logits*: a program has an expert. Each adds and normalises the whole token, which is little beside one more
  kernel to wait for, and writes a part of it as experts read it, in float16.
- *the choice*: `route_kernels`.
- *gate and up*, which starts while the choice is made, and reads its inputs meanwhile.
- *down*.
- *the sum* over the experts and onto the token. What is there before down ends is read before that: only down's results
  are waited for.

Imports Triton; only the CUDA implementation imports this module.
"""

# ruff: noqa: RUF005 - Triton adds tuples, and does not unpack them
# mypy: disable-error-code="misc,assignment,var-annotated"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.device.launcher import Device, Launcher, device_of
from hybridgen.kernels.linear import experts_one
from hybridgen.kernels.linear.experts_few_kernels import FACTOR, _arranged_place
from hybridgen.kernels.linear.experts_form import Form, Normed, Projection, Routed
from hybridgen.kernels.linear.route_kernels import choice_launcher

_MOST_INPUTS = 8192
"""Of a token: a program has all of them."""
_SUMMED = 256
"""Outputs of a program of the sum."""


@triton.jit
def _states(x, added, k, inside):  # type: ignore[no-untyped-def]
    """Their sum, rounded as the model's own code does it."""
    sums = tl.load(x + k, mask=inside, other=0.0).to(tl.float32) + tl.load(added + k, mask=inside, other=0.0).to(
        tl.float32
    )
    return sums.to(x.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["eps", "shift"], do_not_specialize_on_alignment=["bias"])
def _norm_logits_kernel(  # type: ignore[no-untyped-def]
    x, added, norm, weight, bias, logits, arranged, acts, eps, shift,
    INPUTS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
    ACTS_LENGTH: tl.constexpr, CHOSEN: tl.constexpr, SLICE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: an expert's logit, and SLICE of the token's inputs as experts read them; noughts behind those, and
    behind the activations of its pairs."""
    expert = tl.program_id(0)
    kind: tl.constexpr = x.dtype.element_ty
    k = tl.arange(0, BLOCK)
    inside = k < INPUTS
    place = expert * SLICE + tl.arange(0, SLICE)
    own = _arranged_place(place)
    # The weights do not change; the rest is there once the kernel before has ended.
    values = tl.load(weight + expert.to(tl.int64) * INPUTS + k, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32) + shift
    own_scale = tl.load(norm + own, mask=own < INPUTS, other=0.0).to(tl.float32) + shift
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    states = _states(x, added, k, inside)
    own_states = _states(x, added, own, own < INPUTS)
    factor = tl.rsqrt(tl.sum(states * states, 0) / INPUTS + eps)
    normed = (states * factor * scale).to(kind).to(tl.float32)
    total = tl.sum(normed * values, 0)
    if BIAS:
        total += tl.load(bias + expert).to(tl.float32)
    tl.store(logits + expert, total.to(kind))
    inputs = (own_states * factor * own_scale).to(kind).to(tl.float32) * FACTOR
    tl.store(arranged + place, tl.where(own < INPUTS, inputs, 0.0).to(tl.float16), mask=place < LENGTH)
    behind = (place >= WIDTH) & (place < ACTS_LENGTH)
    nought = tl.zeros((SLICE,), dtype=tl.float16)
    if expert * SLICE + SLICE > WIDTH:
        for choice in tl.static_range(CHOSEN):
            tl.store(acts + choice * ACTS_LENGTH + place, nought, mask=behind)


@triton.jit(do_not_specialize_on_alignment=["bias", "scores"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    parts, ids, scores, bias, x, added, out,
    CHOSEN: tl.constexpr, ALL: tl.constexpr, BIAS: tl.constexpr, OUTPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Experts' results of a token by their scores, and what they are added to."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = n < ALL
    states = _states(x, added, n, inside)
    biases = ()
    counts = ()
    for choice in tl.static_range(CHOSEN):
        counts = counts + (tl.load(scores + choice, cache_modifier=".cg").to(tl.float32),)
        if BIAS:
            expert = tl.load(ids + choice, cache_modifier=".cg")
            biases = biases + (tl.load(bias + expert * ALL + n, mask=inside, other=0.0).to(tl.float32),)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for choice in tl.static_range(CHOSEN):
        value = tl.load(parts + choice * ALL + n, mask=inside, other=0.0)
        if BIAS:
            value += biases[choice]
        total += value * counts[choice]
    total = total.to(out.dtype.element_ty).to(tl.float32) + states
    tl.store(out + n, total.to(out.dtype.element_ty), mask=inside)


@functools.cache
def _launchers(
    experts: int, inputs: int, width: int, chosen: int, biases: tuple[bool, bool], dtypes: tuple[torch.dtype, ...],
    device: Device,
) -> tuple[Launcher, Launcher]:  # fmt: skip
    overlap = {"OVERLAP": device.overlap, **({"launch_pdl": True} if device.overlap else {})}
    lengths = experts_one.length_of(inputs), experts_one.length_of(width)
    block = triton.next_power_of_2(inputs)
    first = {
        "INPUTS": inputs,
        "BLOCK": block,
        "BIAS": biases[0],
        "LENGTH": lengths[0],
        "WIDTH": width,
        "ACTS_LENGTH": lengths[1],
        "CHOSEN": chosen,
        "SLICE": triton.next_power_of_2(-(-max(lengths) // experts)),
        "num_warps": 8 if block >= 2048 else 4,
    }
    last = {"CHOSEN": chosen, "ALL": inputs, "BIAS": biases[1], "OUTPUTS": _SUMMED, "num_warps": 4}
    return Launcher(_norm_logits_kernel, {**first, **overlap}), Launcher(_sum_kernel, {**last, **overlap})


def mixture_on_cuda(
    x: Tensor, added: Tensor, norm: Normed, routed: Routed, gate_up: Projection, down: Projection, form: Form,
    turns: tuple[int, int] = (0, 0),
) -> Tensor | None:  # fmt: skip
    """See `mixture.mixture`; None, and nothing done, where the kernels are not for a call.

    Args:
        turns: see `experts_one.launch`.
    """
    hidden = x.shape[1]
    vectors = x, added, norm.weight, routed.weight, *(() if routed.bias is None else (routed.bias,))
    usual = x.shape[0] == 1 and all(each.dtype == torch.bfloat16 and each.is_contiguous() for each in vectors)
    contiguous = gate_up.data.is_contiguous() and down.data.is_contiguous()
    bias = down.bias
    biased = bias is None or (bias.dtype == torch.bfloat16 and bias.is_contiguous())
    if not usual or not contiguous or not biased or hidden > _MOST_INPUTS or hidden % 32:
        return None
    kernels = experts_one.launches(x.device, hidden, gate_up, down, form, ahead=True)
    if kernels is None:
        return None
    logits, arranged, acts, scores, ids, parts, out = _memory(x, routed, gate_up, down)
    width, device = gate_up.data.shape[1] // 2, device_of(x)
    launch_first(x, added, norm, routed, logits, arranged, acts, width, bias is not None, device)
    choose = choice_launcher(logits.shape[1], routed.chosen, routed.form, (logits.dtype, scores.dtype), device)
    choose((1, 1, 1), (logits, scores, ids))
    experts_one.launch(kernels, arranged, ids, gate_up, down, acts, parts, turns)
    launch_last(parts, ids, scores, bias, x, added, out, routed, width, device)
    return out


def _memory(x: Tensor, routed: Routed, gate_up: Projection, down: Projection) -> tuple[Tensor, ...]:
    """Logits, inputs and activations as experts read them, scores, ids, each expert's results, and the result."""
    experts, chosen = routed.weight.shape[0], routed.chosen
    hidden, width = x.shape[1], gate_up.data.shape[1] // 2

    def empty(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    return (
        empty(1, experts),
        empty(1, experts_one.length_of(hidden), dtype=torch.float16),
        empty(chosen, experts_one.length_of(width), dtype=torch.float16),
        empty(1, chosen, dtype=torch.float32 if routed.form.wide else x.dtype),
        empty(1, chosen, dtype=torch.int64),
        empty(chosen, hidden, dtype=torch.float32),
        empty(1, hidden),
    )


def _both(
    x: Tensor, routed: Routed, width: int, scores: torch.dtype, bias: bool, device: Device
) -> tuple[Launcher, Launcher]:
    experts, inputs = routed.weight.shape
    return _launchers(experts, inputs, width, routed.chosen, (routed.bias is not None, bias), (x.dtype, scores), device)


def launch_first(
    x: Tensor, added: Tensor, norm: Normed, routed: Routed, logits: Tensor, arranged: Tensor, acts: Tensor,
    width: int, bias: bool, device: Device,
) -> None:  # fmt: skip
    """Norm and logits."""
    scores = torch.float32 if routed.form.wide else x.dtype
    first, _ = _both(x, routed, width, scores, bias, device)
    router_bias = x if routed.bias is None else routed.bias
    first(
        (routed.weight.shape[0], 1, 1),
        (x, added, norm.weight, routed.weight, router_bias, logits, arranged, acts, norm.eps, norm.shift),
    )


def launch_last(
    parts: Tensor, ids: Tensor, scores: Tensor, bias: Tensor | None, x: Tensor, added: Tensor, out: Tensor,
    routed: Routed, width: int, device: Device,
) -> None:  # fmt: skip
    """The sum."""
    _, last = _both(x, routed, width, scores.dtype, bias is not None, device)
    grid = -(-x.shape[1] // _SUMMED), 1, 1
    last(grid, (parts, ids, scores, x if bias is None else bias, x, added, out))
