"""Rounding to the nearest code: codes, errors, and what cannot be quantised."""

from __future__ import annotations

import pytest
import torch

from hybridgen.kernels.linear import layout
from hybridgen.models import rounding
from hybridgen.models.rounding import quantise


def weights(outputs: int = 96, inputs: int = 300) -> torch.Tensor:
    """Normal values with a few columns of six times the size."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(outputs, inputs, generator=g)
    values[:, torch.randperm(inputs, generator=g)[:8]] *= 6
    return values


def error(values: torch.Tensor, kind: str, **options: object) -> float:
    x = torch.randn(64, values.shape[1], generator=torch.Generator().manual_seed(1))
    wanted = x @ values.T
    found = x @ quantise(values, kind, torch.float32, **options).dequantise().T  # type: ignore[arg-type]
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("kind", "most"), [("fp8", 0.03), ("int8", 0.015), ("int4", 0.18)])
def test_errors(kind: str, most: float) -> None:
    found = error(weights(), kind)
    assert most / 3 < found < most


def test_zero_points_make_int4_better() -> None:
    assert error(weights() + 1, "int4") < error(weights() + 1, "int4", symmetric=True) / 1.5


@pytest.mark.parametrize("kind", rounding.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_codes_come_back_as_they_are(kind: str, dtype: torch.dtype) -> None:
    """Quantising what was dequantised changes nothing but the last bits, so rows are spread over their codes."""
    once = quantise(weights(), kind, dtype)
    assert layout.problem(once.kind, once.data, once.scales, once.zeros, 300, once.block) is None
    assert once.format.dtype == dtype
    values = once.dequantise(torch.float32)
    again = quantise(values, kind, dtype).dequantise(torch.float32)
    torch.testing.assert_close(again, values, rtol=0.02, atol=0.02 * float(values.abs().max()))


@pytest.mark.parametrize("kind", rounding.KINDS)
def test_parts_are_quantised_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantise(weights(), kind, torch.bfloat16)
    monkeypatch.setattr(rounding, "_PART", 300 * 7)
    parts = quantise(weights(), kind, torch.bfloat16)
    assert torch.equal(parts.dequantise(), whole.dequantise())
    assert parts.data.dtype == whole.data.dtype


@pytest.mark.parametrize("kind", rounding.KINDS)
def test_zeros_stay_zeros(kind: str) -> None:
    values = weights()
    values[3] = 0
    values[5, :128] = 0
    found = quantise(values, kind, torch.float32).dequantise()
    assert bool((found[3] == 0).all())
    assert bool((found[5, :128] == 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(value: float) -> None:
    values = weights()
    values[2, 2] = value
    with pytest.raises(ValueError, match="no numbers"):
        quantise(values, "int8", torch.float32)
