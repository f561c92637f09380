"""Triton's kernels around experts of one token against torch, in Triton's interpreter; run by test_mixture.py."""

from __future__ import annotations

import torch

from hybridgen.device.launcher import device_of
from hybridgen.kernels.linear import experts_one
from hybridgen.kernels.linear.experts_form import Normed, Routed, RouteForm
from hybridgen.kernels.linear.mixture import normalised
from hybridgen.kernels.linear.mixture_kernels import launch_first, launch_last
from hybridgen.kernels.linear.route import reference as route_reference

SHAPES = ((5, 64, 96, 2), (32, 736, 544, 4), (3, 32, 1024, 1))
"""Experts, hidden, width, chosen."""


def made(experts: int, hidden: int, chosen: int, biased: bool) -> tuple[torch.Tensor, torch.Tensor, Normed, Routed]:
    g = torch.Generator().manual_seed(hidden)
    x, added = torch.randn(1, hidden, generator=g), torch.randn(1, hidden, generator=g)
    norm = Normed(torch.randn(hidden, generator=g), 1e-5, 1.0 if biased else 0.0)
    weight = torch.randn(experts, hidden, generator=g) * hidden**-0.5
    bias = torch.randn(experts, generator=g) if biased else None
    return x, added, norm, Routed(weight, bias, chosen, RouteForm(True))


def check_norm_and_logits(_: int) -> None:
    """Logits are the reference's; inputs are in the order of the products, a 16th of them, with noughts behind."""
    for (experts, hidden, width, chosen), biased in zip(SHAPES, (True, False, True), strict=True):
        x, added, norm, routed = made(experts, hidden, chosen, biased)
        logits = torch.full((1, experts), torch.nan)
        arranged = torch.full((1, experts_one.length_of(hidden)), torch.nan, dtype=torch.float16)
        acts = torch.full((chosen, experts_one.length_of(width)), torch.nan, dtype=torch.float16)
        launch_first(x, added, norm, routed, logits, arranged, acts, width, False, device_of(x))
        normed = normalised(x + added, norm)
        wanted = route_reference(normed, routed.weight, routed.bias, chosen, *routed.form)[0]
        assert torch.allclose(logits, wanted, atol=1e-5)
        order = torch.tensor([0, 4, 2, 6, 1, 5, 3, 7])
        inputs = (normed / 16).view(-1, 8)[:, order].reshape(1, -1)
        assert torch.allclose(arranged[:, :hidden].float(), inputs, rtol=2e-3, atol=1e-4)
        assert not arranged[:, hidden:].any()
        assert not acts[:, width:].any()
        assert bool(acts[:, :width].isnan().all())


def check_sum(_: int) -> None:
    """What experts give by their scores, with their biases, on what the layer has."""
    for (experts, hidden, width, chosen), biased in zip(SHAPES, (True, False, True), strict=True):
        x, added, _norm, routed = made(experts, hidden, chosen, biased)
        g = torch.Generator().manual_seed(1)
        parts, scores = torch.randn(chosen, hidden, generator=g), torch.rand(1, chosen, generator=g)
        ids = torch.randperm(experts, generator=g)[None, :chosen].contiguous()
        bias = torch.randn(experts, hidden, generator=g) if biased else None
        out = torch.full((1, hidden), torch.nan)
        launch_last(parts, ids, scores, bias, x, added, out, routed, width, device_of(x))
        values = parts if bias is None else parts + bias[ids[0]]
        wanted = x + added + (values * scores[0, :, None]).sum(0)
        assert torch.allclose(out, wanted, atol=1e-5)
