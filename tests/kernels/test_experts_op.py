"""The experts of a mixture: the op on a CPU, and its Triton kernels in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from experts_cases import CASES, arguments, choices, make
from interpreter import Interpreter

from hybridgen.kernels.linear import experts as op
from hybridgen.kernels.linear.experts_form import Form
from hybridgen.kernels.linear.layout import Block


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_op_adds_up_what_chosen_experts_give(number: int) -> None:
    case = CASES[number]
    made = make(case)
    x, ids, weights = choices(case, 7, number)
    out = op.experts(x, ids, weights, *made)
    block = made.block or Block(0, 0)
    for token in range(7):
        total = torch.zeros(case.hidden)
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            sizes = case.hidden, case.width
            up, down = (
                op.expert_values(one, expert, made.kind, size, block, made.form.transposed, torch.float32)
                for one, size in zip((made.gate_up, made.down), sizes, strict=True)
            )
            biases = [None if one.bias is None else one.bias[expert] for one in (made.gate_up, made.down)]
            both = F.linear(x[token], up, biases[0])
            total += weight * F.linear(op.activate(both, made.form), down, biases[1])
        torch.testing.assert_close(out[token], total, rtol=1e-5, atol=1e-5)
    assert op.experts(x[:0], ids[:0], weights[:0], *made).shape == (0, case.hidden)


def test_activations() -> None:
    values = torch.tensor([[-9.0, -0.5, 9.0, 8.0], [1.0, 2.0, -8.0, 0.5]])
    gate, up = values[:, :2], values[:, 2:]
    assert torch.equal(op.activate(values, Form("silu")), F.silu(gate) * up)
    assert torch.equal(op.activate(values, Form("relu", interleaved=True)), values[:, ::2].relu() * values[:, 1::2])
    clamped = op.activate(values, Form("clamped", alpha=1.702, limit=7.0))
    assert torch.equal(clamped, (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * (gate.clamp(max=7) * 1.702).sigmoid())


@pytest.mark.parametrize("number", [0, 3, 5])
def test_the_op_is_one_that_compilers_can_trace(number: int) -> None:
    case = CASES[number]
    torch.library.opcheck(torch.ops.hybridgen.experts.default, (*choices(case, 3, 0), *arguments(make(case))))


@pytest.mark.parametrize(
    "number", [n if n in (2, 4, 7) else pytest.param(n, marks=pytest.mark.slow) for n in range(len(CASES))]
)
def test_kernels_in_the_interpreter(number: int, triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("experts_interpreter.py"), "check_case", number)


def test_many_pairs_of_one_expert_in_the_interpreter(triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    path = Path(__file__).with_name("experts_interpreter.py")
    triton_interpreter.run(path, "check_many_of_one_expert", 4)
    triton_interpreter.run(path, "check_plan", 0)


def test_mxfp4_codes_go_from_registers_to_the_product_on_hopper() -> None:
    """Loads are asynchronous and of 16 bytes, and nothing spills: what a change loses easily."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hybridgen.kernels.linear.experts_form import Projection
    from hybridgen.kernels.linear.experts_kernels import down_kernel
    from hybridgen.kernels.linear.experts_launch import constants_of, default_tile, shape_of

    scales = torch.empty(32, 2880, 92, dtype=torch.uint8, device="meta")[..., :90]
    stored = Projection(torch.empty(32, 2880, 1440, dtype=torch.uint8, device="meta"), scales)
    shape = shape_of(stored, "mxfp4", 2880, (1, 32), False)
    tile = default_tile(shape, 4, False, torch.bfloat16, 132, cuts=True)
    constants = {"PLANNED": False, "PAIRS": 4, "OVERLAP": False, **constants_of(shape, tile, torch.bfloat16)}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    types = {"x": "*bf16", "ids": "*i64", "order": "*i64", "blocks": "*i64", "data": "*i32", "scales": "*i32"}
    types |= {"zeros": "*bf16", "out": "*fp32", "pairs": "i32"}
    names = down_kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"}
    source = ASTSource(down_kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except RuntimeError as error:  # a Triton without this backend
        pytest.skip(str(error))
    ptx = kernel.asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx
    assert "ld.local" not in ptx
    assert ptx.count("st.shared") < 16  # of the ends alone
    assert "ld.global.b8" not in ptx
