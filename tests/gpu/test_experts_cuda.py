"""Experts of a mixture on a GPU: the op against float32 references, and models that decode by it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import families
import pytest
import quantised_formats as formats
import torch

import hybridgen
from hybridgen.kernels.linear.experts import experts, reference
from hybridgen.kernels.linear.experts_form import FEW_ROWS, Normed, Routed, RouteForm
from hybridgen.kernels.linear.layout import Block
from hybridgen.kernels.linear.mixture import normalised
from hybridgen.kernels.linear.route import reference as route_reference
from hybridgen.kernels.linear.route import route
from hybridgen.kernels.step.linear import few_rows
from hybridgen.models import ends, mixtures, mixtures_check, rotating
from hybridgen.models.mixtures_check import by_kernels
from hybridgen.models.packed_experts import pad_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from experts_cases import CASES, CLAMPED, SILU, Case, Made, arguments, choices, make

pytestmark = pytest.mark.gpu

LARGE = [
    Case(16, 4, 512, 384, SILU),
    Case(8, 4, 720, 400, CLAMPED._replace(transposed=True), biased=True),
    Case(8, 4, 576, 544, CLAMPED, "mxfp4", Block(1, 32), biased=True),
    Case(16, 8, 512, 256, SILU, "fp8", Block(128, 128)),
    Case(16, 8, 512, 256, SILU, "fp8", Block(1, 0)),
    Case(16, 8, 512, 256, SILU, "int4", Block(1, 128)),
    Case(16, 8, 512, 256, SILU, "int4", Block(1, 128), zeros=True),
]
ROWS = (1, 2, 7, 16, 17, 40, 64, 65, 200)


def made_for(case: Case, dtype: torch.dtype) -> Made:
    """On the device; exponents lie as loading puts them."""
    made = make(case, "cuda", dtype)
    if case.kind != "mxfp4":
        return made
    gate_up, down = (one._replace(scales=pad_rows(one.scales)) for one in (made.gate_up, made.down))  # type: ignore[arg-type]
    return made._replace(gate_up=gate_up, down=down)


def check_results(case: Case, dtype: torch.dtype, row_counts: tuple[int, ...]) -> None:
    """Errors are those of rounding operands to the dtype; freed memory that the op may get is poisoned before."""
    made = made_for(case, dtype)
    for rows in row_counts:
        x, ids, weights = choices(case, rows, rows, "cuda", dtype)
        sizes = (rows, case.hidden), (rows * case.chosen, case.width), (rows * case.chosen, case.hidden)
        poison = [torch.full(s, torch.nan, device="cuda", dtype=d) for s in sizes for d in (dtype, torch.float32)]
        del poison
        out = experts(x, ids, weights, *made)
        wanted = reference(x.double(), ids, weights.double(), *arguments(made))
        error = float((out.double() - wanted).norm() / wanted.norm())
        limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 3e-6}[dtype]
        assert error < limit, (rows, error)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_ones(case: Case) -> None:
    check_results(case, torch.bfloat16, ROWS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", [LARGE[0], LARGE[2], LARGE[3]], ids=str)
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    check_results(case, dtype, (3, 200))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_odd_ones(case: Case) -> None:
    check_results(case, torch.bfloat16, (3, 70))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_a_row_gets_the_same_bits_again_in_a_graph_and_in_any_company(case: Case) -> None:
    made = made_for(case, torch.bfloat16)
    x, ids, weights = choices(case, FEW_ROWS, 0, "cuda", torch.bfloat16)
    first = experts(x, ids, weights, *made)
    for rows in (slice(0, 1), slice(5, 6), slice(63, 64), slice(3, 11), slice(20, 53)):
        assert torch.equal(experts(x[rows], ids[rows], weights[rows], *made), first[rows])
    shuffled = torch.randperm(FEW_ROWS, device="cuda")
    assert torch.equal(experts(x[shuffled], ids[shuffled], weights[shuffled], *made), first[shuffled])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = experts(x, ids, weights, *made)
    for _ in range(200):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, first)


def test_ids_are_read_on_the_device() -> None:
    """A recorded call goes by the ids that are there when it is replayed; equal ids of padding do no harm."""
    case = LARGE[0]
    made = made_for(case, torch.bfloat16)
    x, ids, weights = choices(case, 8, 0, "cuda", torch.bfloat16)
    experts(x, ids, weights, *made)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = experts(x, ids, weights, *made)
    for seed in range(1, 20):
        other = choices(case, 8, seed, "cuda", torch.bfloat16)
        for tensor, value in zip((x, ids, weights), other, strict=True):
            tensor.copy_(value)
        if seed % 2:
            ids[5:] = seed % case.experts
        graph.replay()
        assert torch.equal(out, experts(x, ids, weights, *made))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "form", [RouteForm(True), RouteForm(False), RouteForm(False, True), RouteForm(False, True, True)], ids=str
)
def test_choices_of_a_router(form: RouteForm, dtype: torch.dtype) -> None:
    """Logits are those of float64 up to rounding; the choice is the largest of them; again in a graph."""
    for experts_, hidden, chosen in ((32, 2880, 4), (128, 2048, 8), (6, 72, 2)):
        g = torch.Generator("cuda").manual_seed(hidden)
        weight = torch.randn(experts_, hidden, device="cuda", generator=g).mul(hidden**-0.5).to(dtype)
        bias = torch.randn(experts_, device="cuda", generator=g).to(dtype) if form.chosen_only else None
        for rows in (1, 3, 64, 65):
            x = torch.randn(rows, hidden, device="cuda", generator=g).to(dtype)
            logits, scores, ids = route(x, weight, bias, chosen, form)
            wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
            error = (logits.double() - wanted).norm() / wanted.norm()
            assert error < (5e-3 if dtype == torch.bfloat16 else 1e-3)
            assert torch.equal(logits.gather(1, ids), logits.topk(chosen).values)
            eye = torch.eye(experts_, device="cuda", dtype=dtype)
            by_logits = route_reference(logits, eye, None, chosen, *form)[1]
            assert scores.dtype == by_logits.dtype
            assert torch.allclose(scores.float(), by_logits.float(), atol=4e-3 if dtype != torch.float32 else 1e-3)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        x = x[:8].clone()
        first = route(x, weight, bias, chosen, form)
        with torch.cuda.graph(graph):
            again = route(x, weight, bias, chosen, form)
        for _ in range(50):
            for each in again:
                each.fill_(-1)
            graph.replay()
            assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


SETTINGS: dict[str, Any] = {"device": "cuda", "max_batch": 4, "page_size": 16, "kv_memory": "64MiB", "max_context": 128}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "gpt_oss in mxfp4"])
def test_every_mode_generates_what_eager_does(name: str, tmp_path: Path) -> None:
    """In float32 token for token; in bfloat16 first logits are close to eager's."""
    path = formats.write_gpt_oss(tmp_path / "packed") if "mxfp4" in name else families.write(name, tmp_path)
    prompts = families.prompts_of((7, 33, 1))
    found = {}
    for mode in ("eager", "jit", "graph", "hybrid"):
        with hybridgen.Engine.load(path, mode=mode, dtype="float32", **SETTINGS) as engine:
            outs = engine.generate(prompts, max_new_tokens=12)
            found[mode] = [list(out.token_ids) for out in outs]
        with hybridgen.Engine.load(path, mode=mode, dtype="bfloat16", **SETTINGS) as engine:
            out = engine.generate(prompts[0], max_new_tokens=3, logprobs=5)
            found[f"{mode} in bfloat16"] = out.logprobs[0].logprob
            assert mode == "eager" or not any("compilation failed" in reason for reason in engine.stats().fallbacks)
    assert len({str(found[mode]) for mode in ("eager", "jit", "graph", "hybrid")}) == 1
    for mode in ("jit", "graph", "hybrid"):
        assert abs(found[f"{mode} in bfloat16"] - found["eager in bfloat16"]) < 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_a_few_rows(dtype: torch.dtype) -> None:
    """Against float64, with the output's memory poisoned before; a row alone and in company; again in a graph."""
    for outputs, inputs in ((5120, 2880), (2880, 4096), (1000, 5208), (4096, 14336), (6, 256)):
        g = torch.Generator("cuda").manual_seed(inputs)
        weight = torch.randn(outputs, inputs, device="cuda", generator=g).mul(inputs**-0.5).to(dtype)
        for rows in (1, 2, 3, 4, 5):
            bias = torch.randn(outputs, device="cuda", generator=g).to(dtype) if rows % 2 else None
            x = torch.randn(rows, inputs, device="cuda", generator=g).to(dtype)
            poison = torch.full((rows, outputs), float("nan"), device="cuda", dtype=dtype)
            del poison
            out = few_rows(x, weight, bias)
            wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
            error = (out.double() - wanted).norm() / wanted.norm()
            assert error < (4e-3 if dtype == torch.bfloat16 else 6e-4), (outputs, inputs, rows, float(error))
        graph = torch.cuda.CUDAGraph()
        x = x[:1].clone()
        first = few_rows(x, weight, None)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            again = few_rows(x, weight, None)
        for _ in range(200):
            again.fill_(float("nan"))
            graph.replay()
            assert torch.equal(first, again)


@pytest.mark.parametrize("case", [
    Case(32, 4, 2880, 2880, CLAMPED, "mxfp4", Block(1, 32), biased=True),
    Case(8, 4, 576, 544, SILU, "mxfp4", Block(1, 32)),
    Case(128, 8, 2048, 768, SILU, "mxfp4", Block(1, 32)),
], ids=str)  # fmt: skip
def test_a_mixture_of_one_token(case: Case) -> None:
    """Against float32, where experts' logits are well apart, with poisoned memory; again in a graph."""
    from hybridgen.kernels.linear.mixture_kernels import mixture_on_cuda

    made, dtype = made_for(case, torch.bfloat16), torch.bfloat16
    g = torch.Generator("cuda").manual_seed(case.hidden)
    bias = torch.zeros(case.experts, device="cuda", dtype=dtype) if case.biased else None
    for form in (RouteForm(True), RouteForm(False, True), RouteForm(False, True, True)):
        x, added = (0.01 * torch.randn(1, case.hidden, device="cuda", generator=g).to(dtype) for _ in range(2))
        norm = Normed(torch.rand(case.hidden, device="cuda", generator=g).to(dtype) + 0.5, 1e-6, 0.0)
        normed = normalised((x + added).float(), norm)
        counts = torch.linspace(-2, 2, case.experts, device="cuda")[torch.randperm(case.experts, device="cuda")]
        router = (counts[:, None] * normed / normed.square().sum()).to(dtype)
        routed = Routed(router, bias, case.chosen, form)
        ids = counts.topk(case.chosen).indices[None]
        scores = route_reference(counts[None], torch.eye(case.experts, device="cuda"), None, case.chosen, *form)[1]
        wanted = (x + added).float() + reference(normed, ids, scores, *arguments(made))
        poison = [torch.full((8, 4096), torch.nan, device="cuda", dtype=d) for d in (torch.float16, torch.float32)]
        del poison
        given = (x, added, norm, routed, made.gate_up, made.down, made.form)
        first = mixture_on_cuda(*given)
        assert first is not None
        error = float((first.float() - wanted).norm() / wanted.norm())
        assert error < 1e-2, (form, error)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = mixture_on_cuda(*given)
        for _ in range(300):
            again.fill_(float("nan"))
            graph.replay()
            assert torch.equal(again, first)


def test_gpt_oss_decodes_one_token_by_the_op_for_mixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And first logits are close to eager's, alone and beside another request."""
    path = formats.write_gpt_oss(tmp_path / "packed")
    prompts = families.prompts_of((7, 33))
    with hybridgen.Engine.load(path, mode="eager", dtype="bfloat16", **SETTINGS) as engine:
        wanted = engine.generate(prompts[0], max_new_tokens=3, logprobs=5).logprobs
    monkeypatch.setattr(mixtures_check, "by_parts", lambda given: [by_kernels(given) for _ in range(9)])  # slower
    for mode in ("jit", "hybrid"):
        with hybridgen.Engine.load(path, mode=mode, dtype="bfloat16", **SETTINGS) as engine:
            assert all(isinstance(layer, mixtures.MixtureLayer) for layer in engine._runner.bound.layers)
            found = engine.generate(prompts[0], max_new_tokens=3, logprobs=5).logprobs
            assert all(abs(a.logprob - b.logprob) < 0.3 for a, b in zip(found[:2], wanted[:2], strict=True))
            assert len(engine.generate(prompts, max_new_tokens=9, ignore_eos=True)) == 2
            assert not engine.stats().fallbacks


@pytest.mark.parametrize("name", ["gpt_oss", "gpt_oss in mxfp4"])
def test_sinks_and_ends_of_gpt_oss(name: str, tmp_path: Path) -> None:
    """With heads rotated by the op and both ends short: in float32 the tokens of mode eager."""
    path = formats.write_gpt_oss(tmp_path / "packed") if "mxfp4" in name else families.write(name, tmp_path)
    prompts = families.prompts_of((7, 33, 1))
    with hybridgen.Engine.load(path, mode="eager", dtype="float32", **SETTINGS) as engine:
        wanted = [out.token_ids for out in engine.generate(prompts, max_new_tokens=12)]
    for mode in ("jit", "hybrid"):
        with hybridgen.Engine.load(path, mode=mode, dtype="float32", **SETTINGS) as engine:
            bound = engine._runner.bound
            assert all(isinstance(site.module, rotating.RotatingAttention) for site in bound.sites)
            assert sum(isinstance(module, ends.EndModule) for module in bound.around) == 2
            assert [out.token_ids for out in engine.generate(prompts, max_new_tokens=12)] == wanted
            assert engine.generate(prompts[0], max_new_tokens=12).token_ids == wanted[0]
            # In float32 transformers' product of experts, which prefill keeps, copies from the host: none is captured.
            assert all("capture" in each for each in engine.stats().fallbacks)


@pytest.mark.parametrize("turns", [(0, 0), (1, 1), (3, 2)])
@pytest.mark.parametrize("form", [CLAMPED, SILU], ids=str)
def test_one_token_by_the_kernel_in_cuda_gives_the_same_bits(
    form: Any, turns: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernels for few tokens, many times; sizes that fill no tile and no step."""
    from hybridgen.kernels.linear import experts_one

    product, ran = experts_one.product, []
    monkeypatch.setattr(experts_one, "product", lambda *args: ran.append(product(*args, turns)) or ran[-1])
    for case in (Case(8, 4, 2880, 2880, form, "mxfp4", Block(1, 32), biased=True),
                 Case(8, 4, 576, 544, form, "mxfp4", Block(1, 32), biased=True)):  # fmt: skip
        made = made_for(case, torch.bfloat16)
        x, ids, weights = choices(case, 1, 3, "cuda", torch.bfloat16)
        monkeypatch.setattr(experts_one, "IS_ON", False)
        wanted = experts(x, ids, weights, *made)
        monkeypatch.setattr(experts_one, "IS_ON", True)
        poison = [torch.full((4, 4096), torch.nan, device="cuda", dtype=d) for d in (torch.float16, torch.float32)]
        del poison
        assert all(torch.equal(experts(x, ids, weights, *made), wanted) for _ in range(100))
        assert ran[-1]
