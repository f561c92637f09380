"""Triton's kernels of routers against the reference, in Triton's interpreter; run by test_route.py."""

from __future__ import annotations

import torch

from hybridgen.kernels.linear.experts_form import RouteForm
from hybridgen.kernels.linear.route import reference
from hybridgen.kernels.linear.route_kernels import route_on_cuda

FORMS = (
    RouteForm(True),
    RouteForm(False),
    RouteForm(False, True),
    RouteForm(False, True, True),
)


def check_forms(_: int) -> None:
    """Odd numbers of experts and of chosen ones, inputs that are no power of two."""
    g = torch.Generator().manual_seed(0)
    for experts, hidden, chosen in ((5, 40, 2), (32, 72, 4), (33, 1100, 3), (4, 16, 4)):
        weight = torch.randn(experts, hidden, generator=g)
        for form in FORMS:
            bias = torch.randn(experts, generator=g) if form.chosen_only else None
            x = torch.randn(3, hidden, generator=g)
            found = route_on_cuda(x, weight, bias, chosen, form)
            wanted = reference(x, weight, bias, chosen, *form)
            assert torch.allclose(found[0], wanted[0], atol=1e-4)
            assert torch.allclose(found[1], wanted[1], atol=1e-5), (form, found, wanted)
            assert torch.equal(found[2], wanted[2])
            assert [(each.dtype, each.shape) for each in found] == [(each.dtype, each.shape) for each in wanted]


def check_what_is_no_number(_: int) -> None:
    """NaN chooses experts that there are, and makes scores NaN; of equal logits the first experts are chosen."""
    x, weight = torch.ones(3, 16), torch.zeros(6, 16)
    weight[2] = 1.0
    weight[4] = 1.0
    x[1, 3] = torch.nan
    x[2] = torch.inf
    logits, scores, ids = route_on_cuda(x, weight, None, 3, RouteForm(True))
    assert ids[0].tolist() == [2, 4, 0]
    assert abs(float(scores[0].sum()) - 1) < 1e-6
    for numbers in (logits[1], scores[1], scores[2]):
        assert bool(numbers.isnan().all())
    for row in ids.tolist():
        assert len(set(row)) == 3
        assert max(row) < 6
