"""The experts of a mixture: the op on a CPU, and its Triton kernels in the interpreter."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from experts_cases import CASES, arguments, choices, make
from interpreter import Interpreter
from torch import Tensor

from hybridgen.kernels.linear import experts as op
from hybridgen.kernels.linear.experts_form import Form
from hybridgen.kernels.linear.layout import Block, unpack_e2m1
from hybridgen.models.packed_experts import pad_rows


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


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_mxfp4_of_few_tokens_in_the_interpreter(number: int, triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("experts_interpreter.py"), "check_few", number)


_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float16: "*fp16",
}


def launches(monkeypatch: pytest.MonkeyPatch, hidden: int, width: int, tokens: int) -> list[tuple[Any, ...]]:
    """Kernel, constants and arguments of each launch for gpt-oss's experts in MXFP4, as an H200 would get them."""
    from hybridgen.device.launcher import Device
    from hybridgen.kernels.linear import experts_few, experts_launch

    found: list[tuple[Any, ...]] = []

    class Noted:
        def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
            self.launched = kernel, constants

        def __call__(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
            found.append((*self.launched, args))

    for module in (experts_launch, experts_few):
        monkeypatch.setattr(module, "Launcher", Noted)
        monkeypatch.setattr(module, "device_of", lambda tensor: Device(132, 227 * 2**10, True))
    kept = experts_launch._gate_up, experts_launch._down, experts_launch._combine, experts_few._calls
    for each in kept:
        each.cache_clear()
    try:
        with torch.device("meta"):
            bf16 = partial(torch.empty, dtype=torch.bfloat16)
            packed = partial(torch.empty, dtype=torch.uint8)
            scales = [pad_rows(packed(32, outputs, k // 32)) for outputs, k in ((2 * width, hidden), (hidden, width))]
            experts_launch.experts_on_cuda(
                bf16(tokens, hidden), torch.empty(tokens, 4, dtype=torch.int64), bf16(tokens, 4),
                packed(32, 2 * width, hidden // 2), scales[0], None, bf16(32, 2 * width),
                packed(32, hidden, width // 2), scales[1], None, bf16(32, hidden),
                "mxfp4", 1, 32, False, True, "clamped", 1.702, 7.0,
            )  # fmt: skip
    finally:
        for each in kept:
            each.cache_clear()
    return found


@pytest.mark.parametrize(("hidden", "width", "tokens"), [(2880, 2880, 65), (576, 544, 70)])
def test_mxfp4_is_read_by_words(hidden: int, width: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and exponents both: the kernel counts in words, so that bytes would be others' exponents."""
    pytest.importorskip("triton")
    for kernel, constants, args in launches(monkeypatch, hidden, width, tokens)[:2]:
        given = dict(zip(kernel.arg_names, args, strict=False))
        assert constants["UNPACKS"]
        assert given["data"].dtype == given["scales"].dtype == torch.int32
        assert given["data"].shape == (32, constants["ALL"], constants["WIDTH"])
        assert given["scales"].shape == (32, constants["LINES"], constants["COLUMNS"])
        assert given["scales"].is_contiguous()
        assert constants["COLUMNS"] * 4 * 32 >= constants["INPUTS"]


def compiled_for_hopper(kernel: Any, constants: dict[str, Any], args: tuple[Any, ...]) -> Any:
    """What Triton makes of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    names = ("num_warps", "num_stages", "launch_pdl", "maxnreg")
    options = {name: constants.pop(name) for name in names if name in constants}
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    for name, arg in zip(names, args, strict=False):
        signature[name] = _POINTERS[arg.dtype] if isinstance(arg, torch.Tensor) else "i32"
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    try:
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except RuntimeError as error:  # a Triton without this backend
        pytest.skip(str(error))


@pytest.mark.parametrize("tokens", [1, 8])
def test_mxfp4_of_few_tokens_is_asked_for_before_the_wait(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a program's codes, by 16 bytes, and nothing spills: what a change loses easily."""
    pytest.importorskip("triton")
    _, gate_up, down, _ = launches(monkeypatch, 2880, 2880, tokens)
    for launch in (gate_up, down):
        compiled, steps = compiled_for_hopper(*launch), launch[1]["STEPS"]
        # A tensor's elements are the threads in their order: what `mma.sync` goes by.
        layouts = set(re.findall(r"elementwise_inline_asm.*-> .*(#\w+)>", compiled.asm["ttgir"]))
        (layout,) = layouts
        line = next(line for line in compiled.asm["ttgir"].splitlines() if line.startswith(f"{layout} = "))
        assert "sizePerThread = [1], threadsPerWarp = [32]" in line
        ptx = compiled.asm["ptx"]
        before, after = ptx.split("griddepcontrol.wait", 1)
        assert before.count("ld.global.L1::no_allocate.v4.b32") == 2 * steps
        assert before.count("ld.global.b8") == 2 * steps
        assert "no_allocate" not in after
        assert after.count("mma.sync") == 8 * steps
        assert "ld.local" not in ptx


def test_mxfp4_codes_go_from_registers_to_the_product_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads are asynchronous, of codes by 16 bytes, and nothing spills: what a change loses easily."""
    pytest.importorskip("triton")
    ptx = compiled_for_hopper(*launches(monkeypatch, 2880, 2880, 65)[1]).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx
    assert "ld.local" not in ptx
    assert ptx.count("st.shared") < 16  # of the ends alone
    assert "ld.global.b8" not in ptx


def bfloat16_pairs(registers: Tensor) -> Tensor:
    """Registers int64 [N] as the two bfloat16 numbers in each, [N, 2]."""
    return registers.to(torch.uint32).view(torch.int32).view(torch.bfloat16).view(-1, 2)


def run_ptx(text: str, words: Tensor, powers: Tensor) -> Tensor:
    """What the eight results of `_UNPACK_MXFP4` hold, bfloat16 [N, 8], by the manual's words for each instruction."""
    registers = {"$8": words, "$9": powers}
    body = text.strip().strip("{}")

    def value(operand: str) -> Tensor:
        return registers[operand] if operand in registers else torch.full_like(words, int(operand, 0))

    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, rest = line.split(maxsplit=1)
        if name == ".reg":
            continue
        if name == "mov.b32" and rest.startswith("{"):
            halves, source = rest[1:].split("}")
            low, high = halves.split(",")
            number = value(source.strip(", "))
            registers[low.strip()], registers[high.strip()] = number & 0xFFFF, number >> 16
            continue
        to, *operands = (each.strip() for each in rest.split(","))
        given = [value(each) for each in operands]
        if name == "mov.b32":
            result = given[0]
        elif name == "and.b32":
            result = given[0] & given[1]
        elif name == "or.b32":
            result = given[0] | given[1]
        elif name == "shr.u32":
            result = given[0] >> given[1]
        elif name == "prmt.b32":
            both = given[0] | (given[1] << 32)
            result = torch.zeros_like(words)
            for byte in range(4):
                choice = (given[2] >> (4 * byte)) & 15
                assert int(choice.max()) < 8  # else a sign is repeated
                result |= ((both >> (8 * choice)) & 255) << (8 * byte)
        else:
            assert name == "fma.rn.bf16x2"
            a, b, c = (bfloat16_pairs(each).double() for each in given)
            result = (a * b + c).bfloat16().view(torch.int32).view(torch.uint32).to(torch.int64).flatten()
        registers[to] = result
    halves = torch.stack([registers[f"${place}"] for place in range(8)], 1)
    return halves.to(torch.uint16).view(torch.bfloat16)


def test_words_of_mxfp4_become_numbers() -> None:
    """Every code at every place, with every exponent: the instructions, run here, give what the layout says."""
    pytest.importorskip("triton")
    from hybridgen.kernels.linear.experts_kernels import _UNPACK_MXFP4

    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (4096, 4), generator=g, dtype=torch.uint8)
    codes[:16] = torch.arange(16, dtype=torch.uint8)[:, None] * 17
    exponents = torch.arange(4096) % 253
    words = codes.view(torch.uint32).flatten().to(torch.int64)
    powers = torch.where(exponents == 0, 0x00400040, exponents * 0x00800080)
    found = run_ptx(_UNPACK_MXFP4.value, words, powers)
    wanted = unpack_e2m1(codes, 8).double() * torch.ldexp(torch.ones(4096, 1).double(), exponents[:, None] - 127)
    assert torch.equal(found.view(torch.int16), wanted.bfloat16().view(torch.int16))
