"""Triton's products with quantised weights against the reference, in Triton's interpreter; run by
test_quantised_linear.py.

float32, and float16 where codes are unpacked two at a time: the interpreter's `tl.dot` is wrong on bfloat16, of which
the unpacked values are compared.
"""

from __future__ import annotations

import ptx
import torch
import triton
import triton.language as tl
from quantised_cases import CASES, Case, make

from hybridgen.kernels.linear.codes_kernels import VALUE, int4_pairs, int4_shift
from hybridgen.kernels.linear.layout import Block, dequantise
from hybridgen.kernels.linear.quantised_few_kernels import FewTile, few_product, takes
from hybridgen.kernels.linear.quantised_kernels import (
    Tile,
    dequantised,
    layout_of,
    product,
)


def check_case(number: int) -> None:
    """Values and products of one of `CASES`: with a bias and without, whole and in splits, rows above a tile's."""
    case = CASES[number]
    weight = make(case)
    inputs, block = case.inputs, case.block
    layout = layout_of(case.kind, weight.zeros is not None, inputs, block, weight.scales.shape[1])
    assert layout is not None
    values = dequantise(case.kind, weight.data, weight.scales, weight.zeros, inputs, block, torch.float32)
    found = dequantised(weight.data, weight.scales, weight.zeros, layout, inputs, torch.float32)
    assert torch.equal(found, values)
    generator = torch.Generator().manual_seed(number)
    bias = torch.randn(case.outputs, generator=generator)
    for rows, splits, added in ((1, 1, None), (5, 1, bias), (18, 3, bias), (3, 2, None)):
        x = torch.randn(rows, inputs, generator=generator)
        wanted = torch.nn.functional.linear(x.double(), values.double(), None if added is None else added.double())
        tile = Tile(16, 16, layout.step, splits, 4, 2)
        out = product(x, weight.data, weight.scales, weight.zeros, added, layout, inputs, tile)
        error = float((out - wanted).abs().max() / wanted.abs().max())
        assert error < 2e-6, (case, rows, splits, error)


def check_pairs(_: int) -> None:
    """Products of every int4 case in float16, whose codes are unpacked by pairs."""
    ptx.install()
    tried = 0
    for number, case in enumerate(CASES):
        weight = make(case)
        layout = layout_of(case.kind, weight.zeros is not None, case.inputs, case.block, weight.scales.shape[1])
        if case.kind != "int4" or layout is None or layout.where == VALUE:
            continue
        tried += 1
        values = dequantise("int4", *weight, case.inputs, case.block, torch.float32).double()
        generator = torch.Generator().manual_seed(number)
        for rows, splits in ((3, 1), (18, 2)):
            x = torch.randn(rows, case.inputs, generator=generator).half()
            tile = Tile(32, 16, layout.step, splits, 4, 2)
            out = product(x, *weight, None, layout, case.inputs, tile)
            wanted = x.double() @ values.T
            assert float((out - wanted).norm() / wanted.norm()) < 5e-4, (case, rows)
    assert tried == 3


def check_few(_: int) -> None:
    """Products of up to eight rows: chunks that end early, warps without inputs, outputs that no tile ends with, in
    both dtypes; a row has the same bits in any company."""
    ptx.install()
    cases = (
        (Case("int4", 40, 256, Block(1, 128)), FewTile(2, 1)),
        (Case("int4", 17, 896, Block(1, 128), True), FewTile(2, 2)),
        (Case("int4", 33, 416, Block(1, 416), True, torch.float16), FewTile(2, 4, 2)),
        (Case("int4", 16, 1536, Block(1, 256), True), FewTile(4, 8, 2)),
    )
    for number, (case, tile) in enumerate(cases):
        weight = make(case)
        values = dequantise("int4", *weight, case.inputs, case.block, torch.float32).double()
        generator = torch.Generator().manual_seed(number)
        columns, group = weight.scales.shape[1], case.block.inputs
        # Of bfloat16 the interpreter cuts off what is too long.
        for dtype, limit in ((torch.float16, 5e-4), (torch.bfloat16, 8e-3)):
            x = torch.randn(11, case.inputs, generator=generator).to(dtype)
            bias = torch.randn(case.outputs, generator=generator).to(dtype)
            wanted = x.double() @ values.T + bias.double()
            served = case.inputs == 1536 and dtype == torch.bfloat16
            assert takes(x[:8], weight.data, weight.zeros, columns, group) == served
            assert not takes(x, weight.data, weight.zeros, columns, group)
            for rows in (1, 8, 11):
                out = few_product(x[:rows], *weight, bias, group, tile)
                error = float((out - wanted[:rows]).norm() / wanted[:rows].norm())
                assert error < limit, (case, dtype, rows, error)
                assert torch.equal(few_product(x[:1], *weight, bias, group, tile)[0], out[0])


@triton.jit
def _pairs_kernel(  # type: ignore[no-untyped-def]
    data, zeros, out, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ZEROS: tl.constexpr, FLOAT16: tl.constexpr
):  # fmt: skip
    n = tl.arange(0, OUTPUTS)
    words = tl.load(data + n[:, None] * (INPUTS // 8) + tl.arange(0, INPUTS // 8)[None, :])
    shift = int4_shift(zeros, n, n < OUTPUTS, ZEROS, FLOAT16)
    values = int4_pairs(words, shift, OUTPUTS, INPUTS, FLOAT16)
    tl.store(out + n[:, None] * INPUTS + tl.arange(0, INPUTS)[None, :], values.to(tl.float32))


def check_values_of_pairs(_: int) -> None:
    """Every code with every zero, in both dtypes, and in the order of the inputs."""
    ptx.install()
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(-(2**31), 2**31, (16, 8), generator=generator).int()
    zeros = torch.arange(16, dtype=torch.uint8)
    for given in (None, zeros):
        scales = torch.ones(16, 1)
        own = None if given is None else given[:, None]
        wanted = dequantise("int4", data, scales, own, 64, Block(1, 64), torch.float32)
        for half in (False, True):
            out = torch.full((16, 64), torch.nan)
            _pairs_kernel[(1,)](data, zeros, out, OUTPUTS=16, INPUTS=64, ZEROS=given is not None, FLOAT16=half)
            assert torch.equal(out, wanted), half
