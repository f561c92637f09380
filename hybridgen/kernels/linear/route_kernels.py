"""Triton: which experts a token goes to.

What they compute: `hybridgen.kernels.linear.route`. Two kernels: the logits, of a few experts for a program, so that
reading the weight is spread over the device; and the choice with its scores, a token for a program. Logits are rounded
to x's dtype as the module's own are, and the choice goes by the rounded ones. A logit that is no number counts as the
largest, as in `torch.topk`, and makes scores that are none.

Imports Triton; only the CUDA implementation imports this module.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.device.launcher import Device, Launcher, device_of
from hybridgen.kernels.linear.experts_form import RouteForm

MOST_TOKENS = 64
"""More are left to cuBLAS and torch."""
_EXPERTS = 2
"""Of a program: a row of gpt-oss's or Qwen3's is 4 to 6 KB."""
_BLOCK = 1024


@triton.jit(do_not_specialize_on_alignment=["bias"])
def _logits_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, logits,
    EXPERTS: tl.constexpr, INPUTS: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * EACH + tl.arange(0, EACH)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    sums = tl.zeros((EACH, BLOCK), dtype=tl.float32)
    for at in tl.static_range(0, INPUTS, BLOCK):
        k = at + tl.arange(0, BLOCK)
        states = tl.load(x + token * INPUTS + k, mask=k < INPUTS, other=0.0).to(tl.float32)
        mask = (expert < EXPERTS)[:, None] & (k < INPUTS)[None, :]
        values = tl.load(weight + expert[:, None] * INPUTS + k[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += values * states[None, :]
    total = tl.sum(sums, 1)
    if BIAS:
        total += tl.load(bias + expert, mask=expert < EXPERTS, other=0.0).to(tl.float32)
    tl.store(logits + token * EXPERTS + expert, total.to(logits.dtype.element_ty), mask=expert < EXPERTS)


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits, scores, ids,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, CHOSEN: tl.constexpr, PADDED_CHOSEN: tl.constexpr,
    CHOSEN_ONLY: tl.constexpr, NORMALISED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, PADDED)
    place = tl.arange(0, PADDED_CHOSEN)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    real = expert < EXPERTS
    own = tl.load(logits + token * EXPERTS + expert, mask=real, other=float("-inf")).to(tl.float32)
    size = tl.where(own == own, own, float("inf"))
    free = real
    values = tl.full((PADDED_CHOSEN,), float("-inf"), tl.float32)
    numbers = tl.zeros((PADDED_CHOSEN,), dtype=tl.int32)
    for choice in tl.static_range(CHOSEN):
        most = tl.max(tl.where(free, size, float("-inf")), 0)
        number = tl.min(tl.where(free & (size == most), expert, PADDED), 0)
        free = free & (expert != number)
        value = tl.sum(tl.where(expert == number, own, 0.0), 0)
        values = tl.where(place == choice, value, values)
        numbers = tl.where(place == choice, number, numbers)
    # The largest comes first.
    top = tl.sum(tl.where(place == 0, values, 0.0), 0)
    found = tl.exp(values - top)
    if CHOSEN_ONLY:
        found = found / tl.sum(found, 0)
    else:
        found = found / tl.sum(tl.where(real, tl.exp(own - top), 0.0), 0)
        if NORMALISED:
            found = found / tl.sum(found, 0)
    tl.store(scores + token * CHOSEN + place, found.to(scores.dtype.element_ty), mask=place < CHOSEN)
    tl.store(ids + token * CHOSEN + place, numbers.to(tl.int64), mask=place < CHOSEN)


@functools.cache
def _launchers(
    experts: int, inputs: int, chosen: int, form: RouteForm, bias: bool, dtypes: tuple[torch.dtype, ...], device: Device
) -> tuple[Launcher, Launcher]:
    overlap = {"OVERLAP": device.overlap, **({"launch_pdl": True} if device.overlap else {})}
    block = min(_BLOCK, triton.next_power_of_2(inputs))
    sizes = {"EXPERTS": experts, "INPUTS": inputs, "EACH": _EXPERTS, "BLOCK": block, "BIAS": bias}
    first = Launcher(_logits_kernel, {**sizes, **overlap, "num_warps": 4})
    return first, choice_launcher(experts, chosen, form, dtypes, device)


@functools.cache
def choice_launcher(
    experts: int, chosen: int, form: RouteForm, dtypes: tuple[torch.dtype, ...], device: Device
) -> Launcher:
    """The choice, of logits and scores in these dtypes."""
    constants = {"EXPERTS": experts, "PADDED": triton.next_power_of_2(experts), "CHOSEN": chosen}
    constants |= {"PADDED_CHOSEN": triton.next_power_of_2(chosen)}
    constants |= {"CHOSEN_ONLY": form.chosen_only, "NORMALISED": form.normalised, "OVERLAP": device.overlap}
    return Launcher(_choose_kernel, {**constants, **({"launch_pdl": True} if device.overlap else {}), "num_warps": 1})


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels are for such a call."""
    alike = weight.dtype == x.dtype and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
    return alike and 0 < x.shape[0] <= MOST_TOKENS and weight.is_contiguous()


def route_on_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: int, form: RouteForm
) -> tuple[Tensor, Tensor, Tensor]:
    """See `route.route`; on CUDA, for calls that `takes` says yes to."""
    x = x.contiguous()
    (tokens, inputs), experts = x.shape, weight.shape[0]
    logits = torch.empty(tokens, experts, dtype=x.dtype, device=x.device)
    scores = torch.empty(tokens, chosen, dtype=torch.float32 if form.wide else x.dtype, device=x.device)
    ids = torch.empty(tokens, chosen, dtype=torch.int64, device=x.device)
    dtypes = x.dtype, scores.dtype
    first, second = _launchers(experts, inputs, chosen, form, bias is not None, dtypes, device_of(x))
    first((tokens, -(-experts // _EXPERTS), 1), (x, weight, x if bias is None else bias, logits))
    second((tokens, 1, 1), (logits, scores, ids))
    return logits, scores, ids
