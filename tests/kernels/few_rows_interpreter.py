"""Triton's product of a few rows against torch's, in Triton's interpreter; run by test_product_of_rows.py."""

from __future__ import annotations

import torch

from hybridgen.kernels.step.linear_kernels import product


def check_products(_: int) -> None:
    """Sizes that no block ends with, one to four rows, with a bias and without."""
    g = torch.Generator().manual_seed(0)
    for outputs, inputs in ((7, 256), (18, 2880), (5, 5208)):
        weight = (torch.randn(outputs, inputs, generator=g) * inputs**-0.5).half()
        for rows in (1, 2, 3, 4):
            bias = torch.randn(outputs, generator=g).half() if rows % 2 else None
            x = torch.randn(rows, inputs, generator=g).half()
            wanted = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
            found = product(x, weight, bias)
            assert found.shape == wanted.shape
            assert float((found - wanted).norm() / wanted.norm()) < 1e-3
            assert torch.equal(product(x[:1], weight, bias)[0], found[0])


def check_a_norm(_: int) -> None:
    """Of one row, in the product."""
    g = torch.Generator().manual_seed(0)
    for (outputs, inputs), shift in zip(((7, 256), (18, 2880), (5, 5208)), (0.0, 1.0, 0.0), strict=True):
        weight = (torch.randn(outputs, inputs, generator=g) * inputs**-0.5).half()
        norm, x = torch.randn(inputs, generator=g).half(), torch.randn(1, inputs, generator=g).half()
        bias = torch.randn(outputs, generator=g).half()
        rows = torch.nn.functional.rms_norm(x.double(), (inputs,), norm.double() + shift, 1e-2)
        wanted = torch.nn.functional.linear(rows, weight.double(), bias.double())
        found = product(x, weight, bias, norm, 1e-2, shift)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-3
