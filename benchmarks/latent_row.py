"""Attention of one row to latents by the CUDA kernels in `latent_row.cu`: right, steady, and how fast, by variants.

python benchmarks/latent_row.py [--output latent-row.json]
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import provenance, report, write
from latent import LITE, PAGE_SIZE, ROTATE_BYTES, WRONG, Case, error_of, make_case, seconds, time_decode, time_read
from torch import Tensor

from hybridgen.device.program import Kernel, Program, compile_cubin
from hybridgen.kernels.attention.latent import latent_decode, through_keys
from hybridgen.kernels.read_ceiling import read_ceiling

FOLDER = "hybridgen.kernels.attention"
LINE = (512 + 64) * 2 + 16
REPEATS = 3000


class Parameters(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "q", "q_rotary", "latent", "rotary", "pages", "block_table", "slots", "positions", "out", "partial",
        )),
        *((name, ctypes.c_int64) for name in ("table_stride", "q_stride", "rotary_stride")),
        ("factor", ctypes.c_float), ("chunks", ctypes.c_int), ("wide_slots", ctypes.c_int),
    ]  # fmt: skip


class Row:
    """The two kernels for the heads of DeepSeek-V2-Lite."""

    def __init__(
        self, stages: int, chunks: int, early: bool, trial: int = 0, parts: str = "both", prefetch: int = 0
    ) -> None:
        self.chunks, self.parts = chunks, parts
        defines = {"RANK": 512, "ROPE": 64, "HEADS": 16, "PAGE": PAGE_SIZE, "STAGES": stages, "NUMBER": "bf16"}
        defines |= {"MOST_CHUNKS": 144, "EARLY": int(early), "TRIAL": trial, "PREFETCH": prefetch}
        programs = [Program((FOLDER,), "latent_row.cu", ("latent_row.cuh",), name) for name in ("attend", "combine")]
        cubin = compile_cubin(defines, "sm_90a", programs[0])
        shared = stages * 32 * LINE + 2 * 2 * 16 * 40 * 4 + 16 * stages + 64
        self.attend, self.combine = Kernel(cubin, shared, programs[0]), Kernel(cubin, 0, programs[1])
        self.facts = {name: self.attend.attribute(name) for name in ("NUM_REGS", "LOCAL_SIZE_BYTES")}

    def __call__(
        self, q: Tensor, q_rotary: Tensor, pages: Tensor, table: Tensor, slots: Tensor, positions: Tensor,
        scale: float, latent: Tensor, rotary: Tensor,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(q)
        scratch = torch.empty(self.chunks * 16 * 513, dtype=torch.float32, device=q.device)
        tensors = q, q_rotary, latent, rotary, pages, table, slots, positions, out, scratch
        strides = table.stride(0), q.stride(1), q_rotary.stride(1)
        numbers = scale * 1.4426950408889634, self.chunks, int(slots.dtype == torch.int64)
        given = Parameters(*(each.data_ptr() for each in tensors), *strides, *numbers)
        stream = torch.cuda.current_stream().cuda_stream
        if self.parts != "combine":
            self.attend.launch_early(self.chunks, 288, given, stream)
        if self.parts != "attend":
            self.combine.launch_early(16 * 8, 256, given, stream)
        return out


def changed_bits(case: Case, attend: Callable[..., Tensor], repeats: int) -> int:
    first = attend(*case.arguments(0), *case.new()).view(torch.int32)
    count = torch.zeros((), dtype=torch.int64, device=first.device)
    for _ in range(repeats):
        count += (attend(*case.arguments(0), *case.new()).view(torch.int32) != first).any()
    return int(count)


def time_behind_product(case: Case, attend: Callable[..., Tensor] | None, weight: Tensor, heads: Tensor) -> float:
    """As in a layer: the product that makes the queries, then attention; None: the product alone."""

    def call(layer: int) -> None:
        query = through_keys(heads, weight)
        if attend is not None:
            attend(query, *case.arguments(layer)[1:], *case.new())

    return seconds([partial(call, layer) for layer in range(len(case.q))], "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ceiling = read_ceiling(torch.device("cuda", 0))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    variants: dict[str, Callable[..., Tensor]] = {"triton": latent_decode}
    for name, options in {
        "5 stages": (5, processors, True),
        "5 stages, not early": (5, processors, False),
        "3 stages": (3, processors, True),
        "5 stages, asked": (5, processors, True, 0, "both", 1),
        "5 stages, not early, asked": (5, processors, False, 0, "both", 1),
        "attend": (5, processors, True, 0, "attend"),
        "combine": (5, processors, True, 0, "combine"),
        "attend, not early": (5, processors, False, 0, "attend"),
        "copies alone": (5, processors, False, 1, "attend"),
        "products alone": (5, processors, False, 2, "attend"),
    }.items():
        try:
            variants[name] = Row(*options)
            print(name, variants[name].facts, flush=True)
        except Exception as error:
            print(name, type(error).__name__, error, flush=True)
    rows: list[dict[str, Any]] = []
    results = {"benchmark": "latent_row", "read_ceiling_gb_per_s": None if ceiling is None else ceiling / 1e9}
    head = {"provenance": provenance()}
    weight = torch.randn(16 * 256, 512, device="cuda", dtype=torch.bfloat16)
    heads = torch.randn(1, 16, 128, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        for context in (32768, 70, 512, 4096, 16385):
            case = make_case(LITE, [context], "cuda", torch.bfloat16, ROTATE_BYTES)
            read = context * 576 * 2
            reading = time_read(case) * 1e6 if context >= 512 and context % PAGE_SIZE == 0 else None
            alone = time_behind_product(case, None, weight, heads) * 1e6
            print(f"context {context}: only reading {reading} us, the product alone {alone:.1f}", flush=True)
            for name, attend in variants.items():
                if "stages" not in name and context not in (512, 32768):
                    continue
                row: dict[str, Any] = {"context": context, "variant": name, "only_read_us": reading}
                case.pages[0, case.block_table[0, (context - 1) // PAGE_SIZE], 0, (context - 1) % PAGE_SIZE] = torch.nan
                torch.cuda.synchronize()
                row["error"] = error_of(case, attend)
                whole = name == "triton" or "stages" in name
                if whole and not row["error"] <= WRONG:
                    print(f"  {name:26} wrong: error {row['error']:.1e}", flush=True)
                    rows.append(row)
                    continue
                row["changed"] = changed_bits(case, attend, REPEATS if context == 32768 else 300) if whole else -1
                took = time_decode(case, "cuda", attend)
                behind = time_behind_product(case, attend, weight, heads)
                row |= {"us": took * 1e6, "behind_product_us": behind * 1e6, "product_us": alone}
                row["percent_of_ceiling"] = None if ceiling is None else read / took / ceiling * 100
                rows.append(row)
                print(
                    f"  {name:26} {row['us']:7.2f} us, {row['percent_of_ceiling'] or 0:5.1f} % of the ceiling, behind "
                    f"the product {row['behind_product_us']:7.2f}, error {row['error']:.1e}, {row['changed']} changed",
                    flush=True,
                )
                write({**head, **results, "rows": rows}, arguments.output)
            del case
    report({**results, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
