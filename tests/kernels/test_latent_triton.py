"""The Triton kernels for latents where there is no GPU: in the interpreter, and how decode cuts its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import Interpreter

pytest.importorskip("triton")

import triton

from hybridgen.device.launcher import power_of_two
from hybridgen.kernels.attention.latent_kernels import decode_kernel
from hybridgen.kernels.attention.latent_launches import (
    _SCRATCH_BYTES,
    Shape,
    _shared_bytes,
    plan,
    shape_of,
    tuning,
)

CHECKS = Path(__file__).with_name("latent_interpreter.py")


@pytest.mark.parametrize("case", range(4))
def test_kernels_in_the_interpreter(case: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(CHECKS, "check_case", case)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 30))])
def test_random_cases_in_the_interpreter(seed: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(CHECKS, "check_random", seed)


@given(
    tokens=st.integers(1, 300),
    heads=st.sampled_from([1, 16, 40, 128]),
    max_tiles=st.integers(1, 5000),
    processors=st.sampled_from([4, 108, 132]),
    data=st.data(),
)
def test_a_rows_chunks_fit_their_scratch(
    tokens: int, heads: int, max_tiles: int, processors: int, data: st.DataObject
) -> None:
    shape = Shape(heads, 512, 64, 64, 2)
    tune = tuning(shape, 227 * 2**10)
    cut = plan(tokens, shape, max_tiles, processors, tune)
    tiles = data.draw(st.integers(1, max_tiles))
    per = max(min(-(-tiles // cut.splits), cut.chunk_tiles), 1)  # as `_cut` of the kernel
    per = -(-tiles // -(-tiles // per))
    chunks = -(-tiles // per)
    assert chunks <= cut.row_chunks
    assert cut.programs % -(-heads // tune.rows) == 0
    scratch = tokens * cut.row_chunks * heads * shape.rank * 4
    assert tokens == 1 or scratch <= _SCRATCH_BYTES or cut.row_chunks == cut.splits


@given(
    heads=st.sampled_from([1, 16, 20, 40, 64, 128]),
    sizes=st.sampled_from([(512, 64), (256, 32), (16, 8), (384, 64)]),
    element=st.sampled_from([2, 4]),
    memory=st.sampled_from([99, 163, 227]),
    kind=st.sampled_from(["prefill", "alone", "several"]),
)
def test_tiles_fit_shared_memory(heads: int, sizes: tuple[int, int], element: int, memory: int, kind: str) -> None:
    shape = Shape(heads, *sizes, 64, element)
    tune = tuning(shape, memory * 2**10, kind == "prefill", kind == "alone")
    taken = tune.programs * _shared_bytes(shape, tune.block, tune.rows, tune.stages, tune.parts > 0)
    assert taken <= memory * 2**10
    assert tune.rows >= 16
    assert not tune.parts or power_of_two(shape.rank) // tune.parts >= 16


def test_what_was_measured_is_what_runs() -> None:
    """On an H200, with the heads of DeepSeek-V2-Lite (`tried-latent-alone-h200.json`, `latent-rows-h200.json`)."""
    shape, memory = Shape(16, 512, 64, 64, 2), 232448
    assert tuning(shape, memory, alone=True)[:5] + tuning(shape, memory, alone=True)[6:] == (64, 16, 4, 3, 1, 4)
    assert tuning(shape, memory)[:5] == (32, 16, 4, 3, 2)


@pytest.mark.parametrize("alone", [False, True])
def test_shared_memory_is_what_triton_takes_on_hopper(alone: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    shape, memory = Shape(16, 512, 64, 64, 2), 232448
    tune = tuning(shape, memory, alone=alone)
    constants: dict[str, Any] = {
        "HEADS": 16, "PAGE": 64, "RANK": 512, "ROPE": 64, "BLOCK": tune.block, "BLOCK_HEADS": tune.rows,
        "BLOCK_RANK": 512, "BLOCK_ROPE": 64, "BLOCK_ROWS": 1 if alone else 16, "PARTS": tune.parts, "APPEND": True,
        "OVERLAP": True,
    }  # fmt: skip
    names = decode_kernel.arg_names
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr") | {"scale": "fp32"}
    signature |= dict.fromkeys(("q", "q_rotary", "latent", "rotary", "pages", "out"), "*bf16") | {"partial": "*fp32"}
    signature |= {"block_table": "*i32", "slots": "*i32", "positions": "*i64"}
    aligned = [name for name in names if signature[name][0] == "*" or "stride" in name]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(decode_kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    options = {"num_warps": tune.warps, "num_stages": tune.stages, "launch_pdl": True}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except RuntimeError as error:  # a Triton without this backend
        pytest.skip(str(error))
    expected = _shared_bytes(shape, tune.block, tune.rows, tune.stages, tune.parts > 0)
    assert expected - 4 * 2**10 <= compiled.metadata.shared <= expected
    assert "ld.local" not in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("size", "rank", "message"),
    [((2, 1, 12, 24), 16, "page size 12"), ((2, 1, 8, 24), 12, "latents of 12"), ((2, 1, 8, 1024), 1016, "latents of")],
)
def test_other_sizes_are_refused(size: tuple[int, ...], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_of(torch.zeros(1, 4, rank), torch.zeros(size), rank)
