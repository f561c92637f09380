"""Checks of `streamed.cu` on a CPU: its own lines, compiled as C++ behind `streamed_emulation.h`; the schedule comes
from Triton's interpreter, which runs this file."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from attention_cases import dense_packed, error, make_cache, newest_rows, pack, take_newest

from hybridgen.device.launcher import device_of
from hybridgen.device.program import sources
from hybridgen.kernels.attention import streamed
from hybridgen.kernels.attention.balanced import Tuning, shares_of, words_needed, write_schedule
from hybridgen.kernels.attention.common import heads_of
from hybridgen.kernels.attention.schedule import counters_of

LENGTHS = (1, 2, 16, 17, 33, 64, 65, 130, 200, 257, 300)
CASES: list[tuple[int, int, int, int, int, streamed.Form, dict[str, Any]]] = [
    # query heads, kv heads, dims, positions a page, of a chunk, form, options
    (8, 2, 128, 64, 128, streamed.Form(32, 4, 2), {}),
    (8, 2, 64, 64, 64, streamed.Form(64, 4, 2), {"window": 100, "softcap": 5.0, "sinks": True}),
    (6, 2, 128, 128, 4096, streamed.Form(32, 2, 2, 4), {"sinks": True}),
    (8, 1, 64, 64, 256, streamed.Form(32, 8, 1, 3, False), {"chunk": 100}),
]
MAIN = """
extern "C" void run(Arguments* a, int blocks) {
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
    memset(stages, 0xff, sizeof stages);   // which is no number
    barriers.clear();
    warps.clear();
    for (int i = 0; i < WARPS + 2; i++) warps.push_back(std::make_unique<std::barrier<>>(32));
    block = std::make_unique<std::barrier<>>(32 * (WARPS + 2));
    std::vector<std::thread> threads;
    for (int i = 0; i < 32 * (WARPS + 2); i++) threads.emplace_back([=] { threadIdx.x = i; streamed(*a); });
    for (auto& each : threads) each.join();
  }
}
"""


def emulation(constants: dict[str, str | int], folder: Path) -> Any:
    """The kernel as a function of its arguments and how many blocks there are."""
    text = sources(streamed.PROGRAM)[streamed.PROGRAM.source].decode()
    begin, numbers, schedule = (
        text.index(each) for each in ("constexpr int HEADER", "// ---- numbers", "// ---- the s")
    )
    lines = (text[begin:numbers] + text[schedule:]).splitlines()
    kept = [line for line in lines if "asm" not in line and not line.startswith("extern __shared__")]
    head = Path(__file__).with_name("streamed_emulation.h").read_text()
    (folder / "streamed.cpp").write_text(head + "\n".join(kept) + MAIN)
    library = folder / "streamed.so"
    defines = [f"-D{name}={value}" for name, value in constants.items()]
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        "-pthread",
        *defines,
        "streamed.cpp",
        "-o",
        library,
    ]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(library)).run


def check_streamed(number: int) -> None:
    """Rows of many lengths, with new tokens and without, and one of them alone, with equal bits."""
    torch.manual_seed(number)
    heads, kv_heads, dim, page_size, chunk, form, named = CASES[number]
    options = {"window": 0, "chunk": 0, "softcap": 0.0, "sinks": None, **named}
    if options["sinks"]:
        options["sinks"] = torch.randn(heads).bfloat16()
    cache = make_cache(list(LENGTHS), kv_heads, dim, dim, page_size, dtype=torch.bfloat16)
    q = torch.randn(len(LENGTHS), heads, dim).bfloat16()
    ones = [1] * len(LENGTHS)
    expected = dense_packed(q, cache, ones, 0.3, **options)
    slots, positions, _ = pack(cache, ones, len(ones))
    pages = cache.k_pages, cache.v_pages, cache.block_table
    limits = options["window"], options["chunk"]
    tune = Tuning(streamed.BLOCK, 4, 2, form.resident, chunk, False)
    shape = heads_of(heads, kv_heads, dim, dim, page_size, 2)
    sinks = options["sinks"]
    kinds = None if sinks is None else sinks.dtype, slots.dtype, positions.dtype
    with tempfile.TemporaryDirectory() as folder:
        both = []
        for append in (False, True):
            (Path(folder) / str(append)).mkdir()
            constants = streamed.defines(shape, form, q.dtype, kinds, options["softcap"] > 0, append)
            both.append(emulation(constants, Path(folder) / str(append)))

    def run(rows: slice, k: torch.Tensor | None = None, v: torch.Tensor | None = None) -> torch.Tensor:
        own_q, where = q[rows], (slots[rows], positions[rows])
        max_pages = cache.block_table.shape[1]
        plan = torch.full(
            (words_needed(*pages[:2], heads, len(own_q), max_pages, *limits, tune),), -1, dtype=torch.int32
        )
        write_schedule(*pages, *where, heads, *limits, plan, tune)
        shares = shares_of(shape, len(own_q), max_pages, *limits, device_of(q), tune)
        counters = counters_of(plan, len(own_q), max_pages, shares)
        lines = len(own_q) * shares.row_chunks * heads
        out, partial = torch.full_like(own_q, torch.nan), torch.full((lines * (dim + 1),), torch.nan)
        new = (own_q, own_q) if k is None or v is None else (k[rows], v[rows])
        tensors = own_q, *new, *pages[:2], plan, pages[2], *where, sinks, out, partial, counters
        arguments = streamed.arguments_of(
            tensors, lines * dim, 0.3, options["softcap"], len(own_q) * shares.row_tiles(max_pages),
            len(own_q) * shares.row_chunks, shares.parts,
        )  # fmt: skip
        both[k is not None](ctypes.byref(arguments), shares.parts * kv_heads)
        assert not counters.any()
        return out

    out = run(slice(None))
    assert error(out, expected) < 6e-3, (number, error(out, expected))
    row = len(LENGTHS) - 2
    assert torch.equal(run(slice(row, row + 1))[0], out[row]), "a row has other bits alone"
    newest = take_newest(cache)
    assert torch.equal(run(slice(None), **newest), out), "other bits where a step has the newest keys and values"
    k, v = newest_rows(cache)
    assert torch.equal(k, newest["k"]), "the new K is not in the pages"
    assert torch.equal(v, newest["v"]), "the new V is not in the pages"
