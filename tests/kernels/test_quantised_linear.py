"""The product with quantised weights: the op on a CPU, and its Triton kernels in the interpreter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from interpreter import Interpreter
from quantised_cases import CASES, make

from hybridgen.kernels.linear.layout import Block, dequantise, pack_int4
from hybridgen.kernels.linear.quantised import quantised_linear


@pytest.mark.parametrize("case", CASES)
def test_the_op_multiplies_with_the_values(case: object) -> None:
    assert isinstance(case, type(CASES[0]))
    weight = make(case)
    values = dequantise(case.kind, weight.data, weight.scales, weight.zeros, case.inputs, case.block, torch.float32)
    x, bias = torch.randn(2, 3, case.inputs), torch.randn(case.outputs)
    for rows, added in ((x, None), (x, bias), (x[0], bias), (x[:0], bias)):
        out = quantised_linear(rows, case.kind, *weight, added, case.inputs, case.block)
        wanted = torch.nn.functional.linear(rows, values, added)
        # torch's product of few rows with 8-bit weights adds in another order.
        tolerance = 1e-5 if rows is not x and case.kind == "int8" else 0.0
        torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)


def test_the_op_is_one_that_compilers_can_trace() -> None:
    case = CASES[1]
    weight = make(case)
    arguments = (torch.randn(3, case.inputs), *weight, None, case.kind, case.inputs, *case.block)
    torch.library.opcheck(torch.ops.hybridgen.quantised_linear.default, arguments)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_kernels_in_the_interpreter(case: int, triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("quantised_interpreter.py"), "check_case", case)


@pytest.mark.parametrize("check", ["check_pairs", "check_few", "check_values_of_pairs"])
def test_pairs_of_codes_in_the_interpreter(check: str, triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("quantised_interpreter.py"), check, 0)


def test_where_scales_are_applied() -> None:
    kernels = pytest.importorskip("hybridgen.kernels.linear.quantised_kernels")
    for group, columns, where, step in ((4096, 1, 0, 128), (128, 32, 1, 128), (96, 43, 1, 32), (32, 128, 2, 128)):
        found = kernels.layout_of("int4", False, 4096, Block(1, group), columns)
        assert (found.where, found.step) == (where, step)
    assert kernels.layout_of("fp8", False, 4096, Block(48, 48), 86) is None
    for rows in (1, 8, 64, 256):
        for outputs, inputs in ((4096, 14336), (28672, 4096), (64, 64)):
            for kind in ("int4", "fp8"):
                layout = kernels.layout_of(kind, False, inputs, Block(1, 128), -(-inputs // 128))
                tile = kernels.default_tile(layout, rows, outputs, inputs, 132)
                assert tile.rows >= min(rows, 128)
                assert tile.inputs == 128
                assert 1 <= tile.splits <= max(1, inputs // 128)


def test_what_comes_next_starts_when_a_product_has_ended() -> None:
    """What starts while programs fill all multiprocessors but a few crowds those few: adding up parts took 20 us."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from hybridgen.kernels.linear.quantised_kernels import _product_kernel as kernel

    constants = {"KIND": "int4", "ZEROS": True, "BIAS": False, "WHERE": 1, "BLOCK_OUT": 1, "GROUP": 128, "EVEN": True}
    constants |= {"OUTPUTS": 64, "ROWS": 16, "INPUTS": 128, "PAIRS": True, "PRECISION": "tf32", "OVERLAP": True}
    types = {"x": "*bf16", "data": "*i32", "scales": "*bf16", "zeros": "*u8", "bias": "*bf16"}
    types["out"] = "*fp32"
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    try:
        ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True}).asm["ptx"]
    except RuntimeError as error:  # a Triton without this backend
        pytest.skip(str(error))
    assert "griddepcontrol.wait" in ptx
    assert "griddepcontrol.launch_dependents" not in ptx


def run_ptx(text: str, inputs: dict[str, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """What a few PTX instructions leave in `$0` to `$7`, as numbers of a 16-bit dtype."""
    registers = dict(inputs)
    outputs: dict[str, int] = {}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def halves(bits: int) -> torch.Tensor:
        signed = bits - 2**32 if bits >= 2**31 else bits
        return torch.tensor([signed], dtype=torch.int32).view(torch.int16).view(dtype)

    for instruction in re.split(r"[;\n]", text.replace("{ .reg .b32 word, pair, one;", "")):
        name, _, rest = instruction.strip().partition(" ")
        operands = [each.strip() for each in rest.split(",")]
        if not name or name == "}":
            continue
        if name == "mov.b32" and operands[0].startswith("{"):
            low, high = (each.strip("{} ") for each in operands[:2])
            outputs[low], outputs[high] = value(operands[2]) & 0xFFFF, value(operands[2]) >> 16
        elif name == "mov.b32":
            registers[operands[0]] = value(operands[1])
        elif name == "shr.u32":
            registers[operands[0]] = value(operands[1]) >> value(operands[2])
        elif name == "lop3.b32":
            assert value(operands[4]) == (0xF0 & 0xCC) | 0xAA  # (a & b) | c
            registers[operands[0]] = value(operands[1]) & value(operands[2]) | value(operands[3])
        else:
            assert name == ("fma.rn.bf16x2" if dtype == torch.bfloat16 else "fma.rn.f16x2")
            a, b, c = (halves(value(each)) for each in operands[1:])
            bits = (a.double() * b.double() + c.double()).to(dtype).view(torch.int16).view(torch.int32)
            registers[operands[0]] = int(bits) % 2**32
    numbers = torch.tensor([outputs[f"${place}"] for place in range(8)], dtype=torch.int32)
    return list(numbers.to(torch.int16).view(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_unpacking_instructions_give_codes_less_their_zero(dtype: torch.dtype) -> None:
    """The interpreter does not run them."""
    kernels = pytest.importorskip("hybridgen.kernels.linear.codes_kernels")
    text = (kernels._UNPACK_BF16 if dtype == torch.bfloat16 else kernels._UNPACK_F16).value
    base = -0x3CFF3D00 if dtype == torch.bfloat16 else -0x1BFF1C00
    codes = torch.randint(0, 16, (40, 8), generator=torch.Generator().manual_seed(0))
    for row, word in zip(codes, pack_int4(codes)[:, 0].tolist(), strict=True):
        for zero in (0, 1, 7, 8, 15, 16):
            shift = (base | zero | zero << 16) % 2**32
            found = run_ptx(text, {"$8": word % 2**32, "$9": shift}, dtype)
            assert [float(number) for number in found] == (row - zero).tolist()
