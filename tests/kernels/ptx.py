"""Inline PTX in Triton's interpreter: the text of an instruction is carried out for all threads at once, by the manual.

`install()` gives the interpreter what it lacks. Only what the kernels of this project use is known. A tensor's elements
are threads in their order, 32 of them a warp; with `pack=2` a register has two neighbours.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

U32 = np.uint32


class _Results:
    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, number: int) -> Any:
        return self._handles[number]


def install() -> None:
    """Let the interpreter run inline PTX from now on."""
    InterpreterBuilder.create_inline_asm = _create_inline_asm


def _create_inline_asm(
    self: Any, text: Any, constraints: Any, values: list[Any], types: list[Any], is_pure: bool, pack: int
) -> _Results:
    registers: dict[str, np.ndarray] = {}
    shape = values[0].data.shape
    for number, value in enumerate(values):
        flat = np.ascontiguousarray(value.data).reshape(-1)
        # Numbers of 16 bits lie as `pack` of them lie in a register already.
        registers[f"${len(types) + number}"] = flat.view(np.uint64 if flat.itemsize == 8 else U32)
    run(str(getattr(text, "value", text)), registers)
    return _Results(
        [
            TensorHandle(_elements(registers[f"${number}"], kind.scalar.name, pack).reshape(shape), kind.scalar)
            for number, kind in enumerate(types)
        ]
    )


def _elements(register: np.ndarray, name: str, pack: int) -> np.ndarray:
    """What a result's registers hold; of one element of 16 bits they have the lower half."""
    kind = np.dtype(_NUMPY[name])
    if kind.itemsize == 2 and pack == 1:
        register = register.astype(np.uint16)
    return np.ascontiguousarray(register).view(kind)


_NUMPY = {"int32": np.int32, "fp32": np.float32, "fp16": np.float16, "int16": np.int16}


def run(text: str, registers: dict[str, np.ndarray]) -> None:
    """Carry out a text; registers by name, uint32 [threads] or uint64 for addresses."""
    count = len(next(iter(registers.values())))

    def value(operand: str) -> np.ndarray:
        if operand in registers:
            return registers[operand]
        return np.full(count, int(operand, 0) & 0xFFFFFFFF, dtype=U32)

    for line in filter(None, (part.strip() for part in text.strip().strip("{}").split(";"))):
        name, rest = line.split(maxsplit=1)
        if name == ".reg":
            continue
        asked = None
        if name.startswith("@"):  # only where a predicate holds
            asked = registers[name[1:]] != 0
            name, rest = rest.split(maxsplit=1)
            if not asked.any():
                continue
        # Operands, of which some are lists of registers.
        operands = [
            [each.strip() for each in (listed or one).split(",")]
            for listed, one in re.findall(r"\{(.*?)\}|([^,\s]+)", rest)
        ]
        targets, sources = operands[0], [[value(each) for each in listed] for listed in _addresses(operands[1:])]
        if asked is not None:  # others take the first one's operands, and keep what they had
            first = int(np.argmax(asked))
            sources = [[np.where(asked, each, each[first]) for each in listed] for listed in sources]
        results = _move(sources[0], len(targets)) if name == "mov.b32" else _KNOWN[name](*sources)
        assert len(results) == len(targets), line
        if asked is not None:
            before = [registers[target] for target in targets]
            results = [np.where(asked, new, old) for new, old in zip(results, before, strict=True)]
        registers.update(zip(targets, results, strict=True))


def _addresses(operands: list[list[str]]) -> list[list[str]]:
    return [[each.strip("[]") for each in listed] for listed in operands]


Listed = list[np.ndarray]


def _and(a: Listed, b: Listed) -> Listed:
    return [a[0] & b[0]]


def _left(a: Listed, b: Listed) -> Listed:
    return [(a[0] << b[0]).astype(U32)]


def _right(a: Listed, b: Listed) -> Listed:
    return [a[0] >> b[0]]


def _lop3(a: Listed, b: Listed, c: Listed, table: Listed) -> Listed:
    assert set(table[0].tolist()) == {0xEA}, "(a & b) | c"
    return [(a[0] & b[0]) | c[0]]


def _prmt(a: Listed, b: Listed, choice: Listed) -> Listed:
    both = a[0].astype(np.uint64) | (b[0].astype(np.uint64) << np.uint64(32))
    found = np.zeros_like(a[0])
    for byte in range(4):
        place = (choice[0] >> U32(4 * byte)) & U32(15)
        assert place.max() < 8, "a sign is repeated"
        one = (both >> (place * U32(8)).astype(np.uint64)) & np.uint64(255)
        found |= one.astype(U32) << U32(8 * byte)
    return [found]


def _move(a: Listed, targets: int) -> Listed:
    """Of a register to another, or to its halves."""
    return [a[0]] if targets == 1 else [a[0] & U32(0xFFFF), a[0] >> U32(16)]


def _not_equal(a: Listed, b: Listed) -> Listed:
    return [(a[0] != b[0]).astype(U32)]


def halves(register: np.ndarray) -> np.ndarray:
    """The two float16 numbers of each register, float64 [threads, 2]."""
    return np.ascontiguousarray(register).view(np.float16).reshape(-1, 2).astype(np.float64)


def _packed(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers.astype(np.float16)).view(U32).reshape(-1)


def _multiply_f16x2(a: Listed, b: Listed) -> Listed:
    return [_packed(halves(a[0]) * halves(b[0]))]


def _add_f16x2(a: Listed, b: Listed) -> Listed:
    return [_packed(halves(a[0]) + halves(b[0]))]


def _add_bf16x2(a: Listed, b: Listed) -> Listed:
    one, other = (
        torch.from_numpy(np.ascontiguousarray(each[0]).view(np.int16)).view(torch.bfloat16) for each in (a, b)
    )
    return [(one + other).view(torch.int16).numpy().view(U32)]


def _from_e4m3x2(a: Listed) -> Listed:
    codes = np.stack((a[0] & U32(255), (a[0] >> U32(8)) & U32(255)), -1).astype(np.uint8)
    return [_packed(torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy())]


def _log2(a: Listed) -> Listed:
    return [np.log2(a[0].view(np.float32)).view(U32)]


def _largest(a: Listed, b: Listed) -> Listed:
    return [np.maximum(a[0].view(np.int32), b[0].view(np.int32)).view(U32)]


def _butterfly(a: Listed, distance: Listed, clamp: Listed, mask: Listed) -> Listed:
    return [a[0][np.arange(len(a[0])) ^ int(distance[0][0])]]


def _load_words(address: Listed) -> Listed:
    places = address[0].astype(np.int64)
    assert not (places % 16).any(), "a load of 16 bytes from elsewhere"
    # All are in one tensor: so is what lies between them.
    first = int(places.min())
    memory = np.frombuffer((ctypes.c_char * (int(places.max()) + 16 - first)).from_address(first), U32)
    return list(memory[((places - first) // 4)[:, None] + np.arange(4)].T)


def bfloat_halves(register: np.ndarray) -> np.ndarray:
    """The two bfloat16 numbers of each register, float64 [threads, 2]."""
    both = np.stack((register << U32(16), register & U32(0xFFFF0000)), -1)
    return np.ascontiguousarray(both).view(np.float32).astype(np.float64)


def _mma_bf16(a: Listed, b: Listed, c: Listed) -> Listed:
    return _mma(a, b, c, bfloat_halves)


def _mma(a: Listed, b: Listed, c: Listed, halves: Callable[[np.ndarray], np.ndarray] = halves) -> Listed:
    """m16n8k16: where each thread (g, t) of a warp has its numbers is in the manual's figures."""
    a = [halves(each).reshape(-1, 8, 4, 2) for each in a]
    b = [halves(each).reshape(-1, 8, 4, 2) for each in b]
    c = [each.view(np.float32).astype(np.float64).reshape(-1, 8, 4) for each in c]
    warps = len(a[0])
    left, right, sums = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    for half in range(2):
        for part in range(2):
            k = slice(8 * part + half, 8 * part + 8, 2)
            left[:, :8, k], left[:, 8:, k] = a[2 * part][..., half], a[2 * part + 1][..., half]
            right[:, k] = b[part][..., half].transpose(0, 2, 1)
        sums[:, :8, half::2], sums[:, 8:, half::2] = c[half], c[2 + half]
    sums += left @ right
    parts = sums[:, :8, ::2], sums[:, :8, 1::2], sums[:, 8:, ::2], sums[:, 8:, 1::2]
    return [np.ascontiguousarray(part.reshape(-1).astype(np.float32)).view(U32) for part in parts]


_KNOWN = {
    "and.b32": _and,
    "shl.b32": _left,
    "shr.u32": _right,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "setp.ne.s32": _not_equal,
    "mul.rn.f16x2": _multiply_f16x2,
    "add.rn.f16x2": _add_f16x2,
    "add.rn.bf16x2": _add_bf16x2,
    "cvt.rn.f16x2.e4m3x2": _from_e4m3x2,
    "lg2.approx.ftz.f32": _log2,
    "max.s32": _largest,
    "shfl.sync.bfly.b32": _butterfly,
    "ld.global.v4.b32": _load_words,
    "ld.global.L1::no_allocate.v4.b32": _load_words,
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": _mma,
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": _mma_bf16,
}
