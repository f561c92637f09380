"""Kernels in CUDA C++ for compute capability 9.0, without a GPU: that they compile, and what they leave to others."""

from __future__ import annotations

import ctypes

import pytest
import torch
from nvrtc import needs_nvrtc

from hybridgen.device import program
from hybridgen.device.launcher import Device
from hybridgen.kernels.attention import streamed
from hybridgen.kernels.attention.common import Heads, heads_of
from hybridgen.kernels.linear import experts_one, int4_few, many_rows
from hybridgen.kernels.linear.experts_form import Form, Projection


@needs_nvrtc
@pytest.mark.parametrize(("gated", "ahead"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("form", [Form("clamped", True, False, 1.702, 7.0), Form("silu")], ids=str)
def test_experts_of_one_token_compile(form: Form, gated: bool, ahead: bool) -> None:
    """Also as the op for mixtures launches gate and up, whose inputs are there before the choice."""
    constants = experts_one.defines(form, 1440, 736, 24, 1024, gated, ahead)
    assert constants["STEPS"] == 2
    cubin = program.compile_cubin(constants, "sm_90a", experts_one.PROGRAM)
    assert experts_one.PROGRAM.kernel.encode() in cubin


@needs_nvrtc
def test_int4_of_few_rows_compiles() -> None:
    cubin = program.compile_cubin(int4_few.defines(int4_few.FORM), "sm_90a", int4_few.PROGRAM)
    assert int4_few.PROGRAM.kernel.encode() in cubin


HEADS = [heads_of(16, 8, 128, 128, 64, 2), heads_of(64, 8, 64, 64, 256, 2), heads_of(7, 1, 128, 128, 64, 2)]


@needs_nvrtc
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_streamed_attention_compiles(heads: Heads, few: bool) -> None:
    kinds = torch.float32, torch.int32, torch.int64
    constants = streamed.defines(heads, streamed.form_of(heads, few), torch.float16, kinds, True, True)
    cubin = program.compile_cubin(constants, "sm_90a", streamed.PROGRAM)
    assert streamed.PROGRAM.kernel.encode() in cubin


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_blocks_of_streamed_attention_share_a_multiprocessor(heads: Heads, few: bool) -> None:
    form = streamed.form_of(heads, few)
    stages, shared = streamed._sizes(heads, form)
    assert stages >= 3
    assert form.resident * (shared + 2 * 2**10) <= 228 * 2**10  # with what is beside the ring, and reserved


@pytest.mark.parametrize(
    "heads",
    [
        heads_of(16, 8, 80, 80, 64, 2),
        heads_of(16, 8, 128, 64, 64, 2),
        heads_of(9, 1, 128, 128, 64, 2),
        heads_of(16, 8, 128, 128, 32, 2),
        heads_of(16, 8, 128, 128, 64, 1),
    ],
    ids=str,
)
def test_other_heads_are_not_streamed(heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "is_hopper", lambda ordinal: True)
    device = Device(processors=132, shared_memory=232448, overlap=True)
    assert streamed.takes(HEADS[0], device)
    assert not streamed.takes(heads, device)


@needs_nvrtc
def test_gate_and_up_of_many_rows_compile() -> None:
    assert many_rows.PROGRAM.kernel.encode() in program.compile_cubin(many_rows.DEFINES, "sm_90a", many_rows.PROGRAM)
    assert many_rows.SHARED_BYTES <= 227 * 2**10
    assert ctypes.sizeof(many_rows.Arguments) == 448, "a multiple of 64, as in C++"


def test_nothing_is_taken_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_one, "IS_ON", True)
    x, data = torch.zeros(1, 256, dtype=torch.bfloat16), torch.zeros(64, 32, dtype=torch.int32)
    assert not int4_few.takes(x, data, torch.zeros(64, 2, dtype=torch.bfloat16), None, 128)
    assert not many_rows.serves(torch.zeros(64, 64, dtype=torch.bfloat16))
    codes, scales = torch.zeros(4, 64, 16, dtype=torch.uint8), torch.zeros(4, 64, 4, dtype=torch.uint8)
    part = Projection(codes, scales)
    inputs, out = torch.zeros(1, 512, dtype=torch.float16), torch.zeros(2, 32)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    assert not experts_one.product(inputs, ids, part, part, Form("silu"), inputs, out)


def test_a_block_takes_as_few_tiles_as_let_all_run_at_once() -> None:
    device = Device(processors=132, shared_memory=232448, overlap=True)
    assert experts_one.turns_of(360, 4, device) == 2
    assert experts_one.turns_of(180, 4, device) == 1
    assert experts_one.turns_of(1, 1, device) == 1


@pytest.mark.parametrize(
    ("rows", "inputs", "zeros", "taken"),
    [
        (1, 4096, False, True),
        (4, 4096, False, True),
        (8, 4096, False, False),
        (1, 4096, True, False),
        (4, 8192, True, True),
        (8, 8192, True, False),
        (1, 4160, False, False),  # no whole steps
    ],
)
def test_int4_of_few_rows_where_it_is_faster(
    rows: int, inputs: int, zeros: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4_few, "can_multiply", lambda *tensors: True)
    x, scales = torch.empty(rows, inputs, device="meta"), torch.empty(64, -(-inputs // 128), device="meta")
    data = torch.empty(64, inputs // 8, dtype=torch.int32, device="meta")
    assert int4_few.takes(x, data, scales, scales if zeros else None, 128) is taken
