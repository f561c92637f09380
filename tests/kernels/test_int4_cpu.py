"""Torch's own product with int4 weights on a CPU: its values, and what is kept of weights."""

from __future__ import annotations

import gc

import pytest
import torch
from quantised_cases import Case, Made, make

from hybridgen.kernels.linear import int4_cpu, quantised
from hybridgen.kernels.linear.layout import Block, dequantise
from hybridgen.kernels.linear.quantised import quantised_linear

pytestmark = pytest.mark.skipif(not int4_cpu.has_product(), reason="this torch has no product with int4 on a CPU")

CASES = [
    Case("int4", 64, 128, Block(1, 32), True, torch.bfloat16),
    Case("int4", 96, 256, Block(1, 128), False, torch.bfloat16),
    Case("int4", 32, 64, Block(1, 64), True, torch.bfloat16),
]


def product(case: Case, weight: Made, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return quantised_linear(x, case.kind, *weight, bias, case.inputs, case.block)


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the calls that dequantise; nothing is kept of other tests."""
    monkeypatch.setattr(int4_cpu, "_kept", {})
    rows: list[int] = []
    own = quantised.reference

    def counted(x: torch.Tensor, *others: object) -> torch.Tensor:
        rows.append(x.reshape(-1, x.shape[-1]).shape[0])
        return own(x, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(quantised, "reference", counted)
    return rows


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 6e-3), (torch.float32, 2e-6)])
def test_values(case: Case, dtype: torch.dtype, error: float, reference: list[int]) -> None:
    weight = make(case)
    values = dequantise(case.kind, *weight, case.inputs, case.block, torch.float32)
    for shape in ((1,), (4,), (2, 1)):
        x = torch.randn(*shape, case.inputs).to(dtype)
        bias = torch.randn(case.outputs).to(dtype)
        wanted = x.double() @ values.double().t() + bias.double()
        found = product(case, weight, x, bias)
        assert found.shape == wanted.shape
        assert found.dtype == dtype
        assert float((found.double() - wanted).norm() / wanted.norm()) < error
    assert not reference
    assert len(int4_cpu._kept) == 1


def test_what_is_dequantised(reference: list[int]) -> None:
    """Many rows, sizes and dtypes that it is not for."""
    case = CASES[0]
    weight = make(case)
    for x in (torch.randn(5, 128), torch.randn(65, 128).bfloat16(), torch.randn(2, 128).half()):
        product(case, weight, x)
    for other in (Case("int4", 40, 64, Block(1, 32)), Case("int4", 32, 80, Block(1, 16))):
        product(other, make(other), torch.randn(1, other.inputs))
    assert reference == [5, 65, 2, 1, 1]
    assert not int4_cpu._kept


def test_a_weight_that_was_written_into_is_read_again() -> None:
    case = CASES[0]
    weight, other = make(case), make(Case("int4", 64, 128, Block(1, 32), True, torch.bfloat16))
    x = torch.randn(1, 128)
    before = product(case, weight, x)
    weight.data.bitwise_not_()
    after = product(case, weight, x)
    wanted = x @ dequantise("int4", *weight, 128, case.block, torch.float32).t()
    assert not torch.allclose(before, after)
    assert torch.allclose(after, wanted, atol=1e-4)
    with torch.inference_mode():
        weight = Made(*(None if t is None else t.clone() for t in other))
        product(case, weight, x)
        weight.data.bitwise_not_()  # counts no version
        int4_cpu.forget(weight.data)
        wanted = x @ dequantise("int4", *weight, 128, case.block, torch.float32).t()
        assert torch.allclose(product(case, weight, x), wanted, atol=1e-4)


def test_nothing_is_kept_of_weights_that_are_gone() -> None:
    case = CASES[0]
    for _ in range(3):
        weight = make(case)
        product(case, weight, torch.randn(1, 128))
        del weight
        gc.collect()
    assert len(int4_cpu._kept) <= 1
    int4_cpu.forget()
    assert not int4_cpu._kept
