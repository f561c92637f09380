"""The CUDA kernels for attention of one row to latents, on a CPU: `emulated/latent_row.cuh` says how."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridgen.kernels.attention import latent_row

HERE = Path(__file__).parent / "emulated"
SOURCE = Path(latent_row.__file__).with_name("latent_row.cu")
BF16 = torch.bfloat16
SCALE = 0.1

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels for so many heads and such pages, compiled."""

    @cache
    def compiled(heads: int, rank: int, rope: int, page_size: int) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("latent_row")
        for path in (SOURCE, HERE / "latent_row.cuh", HERE / "run.cpp"):
            shutil.copy(path, folder)
        defines = latent_row.defines(latent_row.Sizes(heads, rank, rope, page_size, BF16))
        options = [f"-D{name}={value}" for name, value in defines.items() if name != "NUMBER"]
        made = folder / "latent_row.so"
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *options, "-o", made, folder / "run.cpp"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(made))

    return compiled


@pytest.mark.parametrize(
    ("sizes", "length", "chunks"),
    [
        ((16, 512, 64, 64), 1, 7),
        ((16, 512, 64, 64), 33, 7),
        ((16, 512, 64, 64), 64, 7),
        ((16, 512, 64, 64), 300, 3),  # more tiles than there are places for
        ((10, 512, 64, 16), 65, 7),
        ((10, 512, 64, 16), 450, 7),
    ],
    ids=str,
)
def test_a_row_attends(library: Any, sizes: tuple[int, int, int, int], length: int, chunks: int) -> None:
    """Of pages in any order; the newest latent and the queries are there once the kernels in front have ended."""
    heads, rank, rope, page_size = sizes
    width, count = rank + rope, -(-length // page_size)
    torch.manual_seed(length)
    pages = torch.randn(count + 3, page_size, width).to(BF16)
    ids = torch.randperm(count + 2)[:count] + 1
    table = torch.zeros(4, count + 5, dtype=torch.int32)
    table[2, :count] = ids.int()
    slots, positions = torch.tensor([2], dtype=torch.int32), torch.tensor([length - 1])
    pages[ids[-1], (length - 1) % page_size :] = math.nan
    pages[0] = math.nan
    late = torch.randn((heads + 1) * width).to(BF16)
    early = torch.full_like(late, math.nan)
    q, q_rotary, latent, rotary = early.split((heads * rank, heads * rope, rank, rope))
    out = torch.full((heads, rank), math.nan).to(BF16)
    partial = torch.full((chunks * heads * (rank + 1),), math.nan)
    tensors = q, q_rotary, latent, rotary, pages, table, slots, positions, out, partial
    given = latent_row.parameters(tensors, (table.stride(0), rank, rope), SCALE, chunks)
    pointers = ctypes.c_void_p(late.data_ptr()), ctypes.c_void_p(early.data_ptr())
    library(*sizes).latent_row(ctypes.byref(given), *pointers, ctypes.c_size_t(late.nbytes))
    latents = pages[ids].view(-1, width)[:length].double()
    query = torch.cat((q.view(heads, rank), q_rotary.view(heads, rope)), dim=1).double()
    wanted = (query @ latents.T * SCALE).softmax(-1) @ latents[:, :rank]
    assert float((out.double() - wanted).abs().max() / wanted.abs().max()) < 1e-2
    assert torch.equal(pages[ids[-1], (length - 1) % page_size], late[heads * width :])
