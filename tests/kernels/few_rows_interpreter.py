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
