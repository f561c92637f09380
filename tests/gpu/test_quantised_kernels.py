"""Products with quantised weights on a GPU against float32 references, and models in quantised formats."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import families
import pytest
import quantised_formats as formats
import torch
import torch.nn.functional as F

import hybridgen
from hybridgen.kernels.linear import rounded_rows
from hybridgen.kernels.linear.layout import Block, dequantise
from hybridgen.kernels.linear.quantised import quantised_linear

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from quantised_cases import CASES, Case, Made, make

pytestmark = pytest.mark.gpu

LARGE = [
    Case("int4", 1024, 2048, Block(1, 128)),
    Case("int4", 1000, 2080, Block(1, 32), True),
    Case("int4", 1000, 4096, Block(1, 128), True),
    Case("int4", 520, 8192, Block(1, 256), True),
    Case("int4", 1000, 4096, Block(1, 4096), True),
    Case("int8", 1024, 2048, Block(1, 128)),
    Case("int8", 1024, 2048, Block(1, 2048)),
    Case("fp8", 1024, 2048, Block(1, 2048), False, torch.float32),
    Case("fp8", 1088, 2048, Block(128, 128), False, torch.float32),
    Case("fp8", 96, 96, Block(48, 48), False, torch.float32),
    Case("mxfp4", 1024, 2048, Block(1, 32), False, torch.uint8),
]
ROWS = (1, 2, 7, 16, 17, 33, 64, 65, 128, 200, 256, 257, 512)


def values_of(case: Case, weight: Made) -> torch.Tensor:
    return dequantise(case.kind, *weight, case.inputs, case.block, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_products(case: Case, dtype: torch.dtype) -> None:
    """Errors are those of rounding operands to the dtype; freed memory that the output may get is poisoned before."""
    weight = make(case, "cuda")
    values = values_of(case, weight)
    for rows in ROWS:
        g = torch.Generator("cuda").manual_seed(rows)
        x = torch.randn(rows, case.inputs, device="cuda", generator=g).to(dtype)
        bias = torch.randn(case.outputs, device="cuda", generator=g).to(dtype) if rows % 2 else None
        poison = torch.full((rows, case.outputs), float("nan"), device="cuda", dtype=dtype)
        del poison
        out = quantised_linear(x, case.kind, *weight, bias, case.inputs, case.block)
        wanted = x.double() @ values.double().T + (0 if bias is None else bias.double())
        error = (out.double() - wanted).norm() / wanted.norm()
        assert error < (6e-3 if dtype == torch.bfloat16 else 1e-3), (rows, float(error))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_dequantised_copies_are_the_references(case: Case) -> None:
    """Rows of the identity give the values themselves."""
    weight = make(case, "cuda")
    eye = torch.eye(case.inputs, device="cuda", dtype=torch.bfloat16)
    rows = eye if case.inputs > 256 else eye.repeat(5, 1)
    out = quantised_linear(rows, case.kind, *weight, None, case.inputs, case.block)[: case.inputs]
    assert torch.equal(out.T, values_of(case, weight).bfloat16())


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_a_product_gives_the_same_bits_again_and_in_a_graph(case: Case) -> None:
    weight = make(case, "cuda")
    for rows in (1, 64, 300):
        x = torch.randn(rows, case.inputs, device="cuda").bfloat16()
        first = quantised_linear(x, case.kind, *weight, None, case.inputs, case.block)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = quantised_linear(x, case.kind, *weight, None, case.inputs, case.block)
        for _ in range(20):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, first)


SETTINGS: dict[str, Any] = {"device": "cuda", "max_batch": 4, "page_size": 16, "kv_memory": "64MiB", "max_context": 128}


@pytest.mark.parametrize(
    "name", ["ct w4 group", "ct w4 zeros", "ct fp8 channel", "fp8 block", "ct int8 channel", "awq"]
)
def test_every_mode_generates_what_eager_does(name: str, tmp_path: Path) -> None:
    """In float32 all modes multiply with the same values; in bfloat16 first logits are close to eager's."""
    formats.write_family(tmp_path, "llama", name, num_hidden_layers=2)
    prompts = families.prompts_of((7, 33, 1))
    found = {}
    for mode in ("eager", "jit", "graph", "hybrid"):
        with hybridgen.Engine.load(tmp_path, mode=mode, dtype="float32", **SETTINGS) as engine:
            outs = engine.generate(prompts, max_new_tokens=12)
            found[mode] = [list(out.token_ids) for out in outs]
        with hybridgen.Engine.load(tmp_path, mode=mode, dtype="bfloat16", **SETTINGS) as engine:
            out = engine.generate(prompts[0], max_new_tokens=1, logprobs=5)
            found[f"{mode} in bfloat16"] = out.logprobs[0].logprob
            assert mode == "eager" or not any("compilation failed" in reason for reason in engine.stats().fallbacks)
    assert len({str(found[mode]) for mode in ("eager", "jit", "graph", "hybrid")}) == 1
    for mode in ("jit", "graph", "hybrid"):
        assert abs(found[f"{mode} in bfloat16"] - found["eager in bfloat16"]) < 0.3


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_memory_while_quantising(kind: str, tmp_path: Path) -> None:
    """The 16-bit model never lies on the device whole."""
    path = families.write("llama", tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    config = hybridgen.EngineConfig(device="cuda", dtype="bfloat16", quantization=kind)
    loaded = hybridgen.loading.Checkpoint.open(path, config).load()
    final, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert loaded.model.device.type == "cuda"
    # One projection of 512 x 2048 in float32, with what rounding makes of it.
    assert peak < final + 20 * 512 * 2048 * 4


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="products of FP8 rows"
)
@pytest.mark.parametrize("rows", [257, 1000, 4096])
@pytest.mark.parametrize(("outputs", "inputs"), [(1536, 2048), (4096, 14336), (48, 80)])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_rounded_to_8_bits(rows: int, outputs: int, inputs: int, biased: bool) -> None:
    from hybridgen.kernels.linear import rounded_rows_kernels

    torch.manual_seed(0)
    data = torch.randn(outputs, inputs, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.rand(outputs, 1, device="cuda") + 0.5
    bias = torch.randn(outputs, device="cuda").bfloat16() if biased else None
    x = (torch.randn(rows, inputs, device="cuda") * torch.logspace(-4, 3, rows, device="cuda")[:, None]).bfloat16()
    codes, row_scales = rounded_rows_kernels.round_rows(x)
    wanted_codes, wanted_scales = rounded_rows.round_rows(x)
    assert torch.allclose(row_scales, wanted_scales, rtol=1e-6)
    # A quotient in the last bit of float32 may be on the other side of a middle.
    assert (codes.view(torch.uint8) != wanted_codes.view(torch.uint8)).float().mean() < 1e-3
    wanted = F.linear(codes.double(), data.double()) * row_scales.double() * scales[:, 0].double()
    wanted = wanted if bias is None else wanted + bias.double()
    found = quantised_linear(x, "fp8", data, scales, None, bias, inputs, Block(1, inputs), rounds_rows=True)
    assert float((found.double() - wanted).norm() / wanted.norm()) < 6e-3
    assert bool(rounded_rows_kernels.round_rows(x.fill_(torch.nan))[1].isnan().all())


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    "case", [each for each in LARGE if each.kind == "int4" and each.block.inputs % 128 == 0], ids=str
)
def test_few_rows_by_the_kernel_in_cuda(case: Case, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridgen.kernels.linear import int4_few

    monkeypatch.setattr(int4_few, "_FASTER_ROWS", int4_few.MOST_ROWS)
    monkeypatch.setattr(int4_few, "_LONG", 0)
    weight = make(case, "cuda")
    values = values_of(case, weight)
    x = torch.randn(rows, case.inputs, device="cuda").bfloat16()
    bias = torch.randn(case.outputs, device="cuda").bfloat16() if rows > 1 else None
    assert int4_few.takes(x, weight.data, weight.scales, weight.zeros, case.block.inputs)
    poison = torch.full((rows, case.outputs), torch.nan, device="cuda", dtype=torch.bfloat16)
    del poison
    out = quantised_linear(x, "int4", *weight, bias, case.inputs, case.block)
    wanted = x.double() @ values.double().T + (0 if bias is None else bias.double())
    assert (out.double() - wanted).norm() / wanted.norm() < 6e-3
    again = [quantised_linear(x, "int4", *weight, bias, case.inputs, case.block) for _ in range(100)]
    assert all(torch.equal(out, each) for each in again)
