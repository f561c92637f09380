"""int4 of few and of many rows by `int4_rows.cu`: the order of inputs, that it compiles, what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import Interpreter

from hybridgen.device import program
from hybridgen.kernels.linear.layout import pack_int4

kernels = pytest.importorskip("hybridgen.kernels.linear.int4_rows_kernels")


def _has_compiler() -> bool:
    try:
        program._bindings()
    except program.Unfit:
        return False
    return True


@pytest.mark.parametrize("rows", [8, 64])
def test_the_rows_image_in_the_interpreter(rows: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("quantised_interpreter.py"), "check_rows_image", rows)


def test_pairs_of_words_are_the_left_operand() -> None:
    """What a lane takes from its words, as the manual orders the operands of `wgmma`, beside rows in the image's order:
    together they are the product."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (16, 256), generator=generator)
    rows = torch.randint(-4, 5, (8, 256), generator=generator)
    words = pack_int4(codes).long() & 0xFFFFFFFF
    found = torch.zeros(16, 8, dtype=torch.long)
    for step in range(2):
        for j in range(8):
            left, right = torch.zeros(16, 16, dtype=torch.long), torch.zeros(8, 16, dtype=torch.long)
            for lane in range(32):
                g, c = lane // 4, lane % 4
                for output in (g, g + 8):
                    word = words[output, step * 16 + c * 4 + j // 2]
                    for half in range(2):
                        pair = word >> 4 * (2 * (j % 2) + half)
                        left[output, half * 8 + 2 * c] = pair & 15
                        left[output, half * 8 + 2 * c + 1] = pair >> 16 & 15
            for k in range(16):
                right[:, k] = rows[:, kernels.input_of(step, j, k)]
            found += left @ right.T
    assert torch.equal(found, codes @ rows.T)


@pytest.mark.skipif(not _has_compiler(), reason="needs cuda-bindings and NVRTC (the extra `cuda`)")
@pytest.mark.parametrize("form", [kernels.FEW, kernels.MANY], ids=str)
def test_it_compiles_without_a_gpu(form: kernels.Form) -> None:
    cubin = program.compile_cubin(kernels.defines(form), "sm_90a", kernels.PROGRAM)
    assert kernels.PROGRAM.kernel.encode() in cubin
    assert form.blocks * (form.shared_bytes + 2048) <= 227 * 1024


def test_inputs_are_cut_until_all_blocks_run_at_once() -> None:
    for outputs, inputs, splits in (
        (6144, 4096, 5),
        (4096, 4096, 8),
        (28672, 4096, 1),
        (4096, 14336, 8),
        (256, 128, 1),
    ):
        assert kernels.splits_of(outputs, inputs, 132) == splits


def test_it_takes_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "IS_ON", True)
    x, data = torch.zeros(64, 256, dtype=torch.bfloat16), torch.zeros(256, 32, dtype=torch.int32)
    assert not kernels.takes(x, data, torch.zeros(256, 2, dtype=torch.bfloat16), 128)
