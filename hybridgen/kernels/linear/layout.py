"""How quantised weights lie in memory, and what their codes stand for: the reference of every kernel that reads them.

One layout for each kind, whatever file a weight came from; `docs/quantisation.md` has it for people. N outputs, K
inputs; a block of outputs and inputs shares a scale, and the last block of a row or a column may be shorter.

| kind | data | value of weight[n, k] |
|---|---|---|
| `int4` | int32 [N, ceil(K / 8)], a word for 8 inputs; see below | scale * (code - zero), zero 8 if None |
| `int8` | int8 [N, K] | scale * (code - zero), zero 0 if None |
| `fp8` | float8_e4m3fn [N, K] | scale * code |
| `mxfp4` | uint8 [N, K / 2]: input 2j is in the low bits of byte j | 2 ** (scale - 127) * e2m1(code) |

`scales` are [ceil(N / block outputs), ceil(K / block inputs)]: float32, bfloat16 or float16, and uint8 for `mxfp4`.
`zeros` have the shape of the scales, or are None: uint8 for `int4`, int16 for `int8`.

In a word of `int4`, input 2i of its eight is in bits 4i to 4i + 3, and input 2i + 1 sixteen bits higher: so a shift and
a mask give two neighbours in the halves of a register, where 16-bit products want them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("int4", "int8", "fp8", "mxfp4")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of the codes 0 to 7; 8 to 15 are the same with a minus sign (OCP Microscaling Formats 1.0)."""
INT4_ZERO = 8
INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word each of eight neighbours has, in `int4` data."""
IN_ORDER = tuple(range(8))
"""The same in most files."""
_EXPONENT_BIAS = 127
_DATA = {"int4": torch.int32, "int8": torch.int8, "fp8": torch.float8_e4m3fn, "mxfp4": torch.uint8}
_ZEROS = {"int4": torch.uint8, "int8": torch.int16}
_CODES_IN_ONE = {"int4": 8, "int8": 1, "fp8": 1, "mxfp4": 2}
_PART = 2**24
"""Values that are unpacked at once: as float32 they take four to eight times the bytes of their codes."""


class Block(NamedTuple):
    """Outputs and inputs that share a scale."""

    outputs: int
    inputs: int

    def grid(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The shape of the scales of a weight."""
        return -(-outputs // self.outputs), -(-inputs // self.inputs)


def codes_per_item(kind: str) -> int:
    """Codes in one item of the data."""
    return _CODES_IN_ONE[kind]


def problem(kind: str, data: Tensor, scales: Tensor, zeros: Tensor | None, inputs: int, block: Block) -> str | None:
    """What is wrong with the shapes and dtypes of a weight, or None."""
    if kind not in KINDS:
        return f"{kind!r} is none of {', '.join(KINDS)}"
    width = -(-inputs // _CODES_IN_ONE[kind])
    if data.dtype != _DATA[kind] or data.dim() != 2 or data.shape[1] != width:
        return f"the data is {data.dtype} {list(data.shape)}, not {_DATA[kind]} [outputs, {width}]"
    grid = block.grid(data.shape[0], inputs)
    known = (torch.uint8,) if kind == "mxfp4" else (torch.float32, torch.bfloat16, torch.float16)
    if scales.dtype not in known or tuple(scales.shape) != grid:
        return f"the scales are {scales.dtype} {list(scales.shape)}, not {list(grid)} of {known[0]}"
    if zeros is not None and (zeros.dtype != _ZEROS.get(kind) or zeros.shape != scales.shape):
        return f"the zero points are {zeros.dtype} {list(zeros.shape)}, not {_ZEROS.get(kind)} {list(grid)}"
    return None


def pack_int4(codes: Tensor, places: tuple[int, ...] = INTERLEAVED) -> Tensor:
    """Codes 0 to 15, integers [N, K], as words of eight; a last word that is not full is filled with zeros."""
    outputs, inputs = codes.shape
    words = -(-inputs // 8)
    padded = torch.zeros(outputs, words * 8, dtype=torch.int32, device=codes.device)
    padded[:, :inputs] = codes
    # Bits do not overlap, so that the sum is the bitwise or; int32 wraps where the highest code is above 7.
    return (padded.view(outputs, words, 8) << _shifts(places, codes.device)).sum(-1, dtype=torch.int32)


def unpack_int4(data: Tensor, inputs: int, places: tuple[int, ...] = INTERLEAVED) -> Tensor:
    """Words of eight as codes 0 to 15, int32 [N, K]."""
    return ((data[..., None] >> _shifts(places, data.device)) & 15).flatten(-2)[:, :inputs]


def interleave(words: Tensor) -> Tensor:
    """Words of eight codes in their order, as `int4` data."""
    out = words.clone()
    # Codes 1 and 2 of each half change places, then the two middle bytes: 0 2 4 6 1 3 5 7.
    for shift, mask in ((4, 0x00F000F0), (8, 0x0000FF00)):
        moved = (out >> shift).bitwise_xor_(out).bitwise_and_(mask)
        out.bitwise_xor_(moved).bitwise_xor_(moved.bitwise_left_shift_(shift))
    return out


def _shifts(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([4 * place for place in places], dtype=torch.int32, device=device)


def unpack_e2m1(data: Tensor, inputs: int) -> Tensor:
    """`mxfp4` data as values, float32 [N, K]."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float32, device=data.device)
    codes = torch.stack((data & 15, data >> 4), -1).flatten(-2)[:, :inputs]
    return table[codes.int()]


def power_of_two(scales: Tensor) -> Tensor:
    """uint8 exponents (e8m0) as float32: 2 ** (exponent - 127), down to the subnormal 2 ** -127."""
    exponents = scales.int() - _EXPONENT_BIAS
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def dequantise(
    kind: str, data: Tensor, scales: Tensor, zeros: Tensor | None, inputs: int, block: Block, dtype: torch.dtype
) -> Tensor:
    """The values of a weight [N, K]: products in float32 of exact codes and scales, rounded once to `dtype`."""
    outputs = data.shape[0]
    rows = max(1, _PART // max(1, inputs) // block.outputs) * block.outputs
    if rows >= outputs:
        return _part(kind, data, scales, zeros, inputs, block, dtype)
    out = torch.empty(outputs, inputs, dtype=dtype, device=data.device)
    for start in range(0, outputs, rows):
        stop, first = min(start + rows, outputs), start // block.outputs
        last = -(-stop // block.outputs)
        some = None if zeros is None else zeros[first:last]
        out[start:stop] = _part(kind, data[start:stop], scales[first:last], some, inputs, block, dtype)
    return out


def _part(
    kind: str, data: Tensor, scales: Tensor, zeros: Tensor | None, inputs: int, block: Block, dtype: torch.dtype
) -> Tensor:
    outputs = data.shape[0]
    if kind == "int4":
        values = unpack_int4(data, inputs).float()
        shift: Tensor | int = INT4_ZERO if zeros is None else expand(zeros, outputs, inputs, block).float()
        values -= shift
    elif kind == "mxfp4":
        values, scales = unpack_e2m1(data, inputs), power_of_two(scales)
    else:
        values = data.float()
        if zeros is not None:
            values -= expand(zeros, outputs, inputs, block).float()
    return (values * expand(scales, outputs, inputs, block).float()).to(dtype)


def expand(scales: Tensor, outputs: int, inputs: int, block: Block) -> Tensor:
    """Scales or zeros of blocks as one value for each weight; those that all share are broadcast."""
    if scales.shape[0] > 1:
        scales = scales if block.outputs == 1 else scales.repeat_interleave(block.outputs, 0)[:outputs]
    if scales.shape[1] > 1:
        scales = scales if block.inputs == 1 else scales.repeat_interleave(block.inputs, 1)[:, :inputs]
    return scales
