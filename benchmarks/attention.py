"""How fast are the paged attention kernels?

Decode: bytes of K and V over time, against a read ceiling measured in the same run. Prefill: time against torch's
flash attention on the same fresh prompt (contiguous K and V, one sequence). All times are of calls inside CUDA
graphs (events around replays, median); decode rotates over caches that together exceed the L2 cache. `--kv` times
decode over keys and values of 8 bits beside bf16 instead, with and without the step's own keys and values, after
comparing the two; with `--sweep` under other launch options too.

    python benchmarks/attention.py [--output results.json]
    python benchmarks/attention.py --kv [--sweep --models Llama-3.1-8B] [--output kv.json]
    python benchmarks/attention.py --smoke          # tiny, on the CPU reference: checks the script
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import report
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybridgen.device.timing import graph_seconds
from hybridgen.kernels.attention.ops import Options, Places, decode_attention, prefill_attention, write_kv

CAPACITY = 131072
"""Positions that a row of the block table can hold, whatever it holds: the context of Llama 3."""
PAGE_SIZE = 64
ROTATE_BYTES = 320 * 2**20
PROMPTS = (10, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DECODE = [
    *((1, c) for c in (512, 4096, 32768, 131072)),
    *((b, c) for b in (8, 32, 64) for c in (512, 4096, 32768)),
]


class Shape(NamedTuple):
    """The attention of a model's layer."""

    name: str
    heads: int
    kv_heads: int
    dim: int


SHAPES = [Shape("Llama-3.2-1B", 32, 8, 64), Shape("Llama-3.1-8B", 32, 8, 128)]


def seconds(calls: list[Callable[[], Any]], device: str, repeats: int = 15) -> float:
    """Median time of one call: all of them in one CUDA graph, replayed."""
    for call in calls:
        call()
    if device == "cpu":
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)

    def all_of_them() -> None:
        for call in calls:
            call()

    return graph_seconds(all_of_them, repeats, 1) / len(calls)


def read_ceiling(device: str) -> float:
    """Bytes per second of a kernel that only reads: the best of matrix-vector products over 4 GB."""
    rows = 2**18 if device == "cuda" else 2**8
    matrix = torch.empty(rows, 8192, dtype=torch.bfloat16, device=device).normal_()
    vector = torch.randn(8192, device=device).bfloat16()
    best = 0.0
    for parts in (1, 2, 4):
        calls = [lambda part=part: part @ vector for part in matrix.chunk(parts)]
        best = max(best, matrix.nbytes / parts / seconds(calls, device))
    return best


class DecodeCase(NamedTuple):
    """Caches of `layers` layers and the query tokens of a step over them."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    slots: Tensor
    positions: Tensor
    bytes: int
    """K and V that one layer reads."""


def decode_case(shape: Shape, lengths: list[int], device: str, dtype: torch.dtype, rotate: int) -> DecodeCase:
    counts = [-(-n // PAGE_SIZE) for n in lengths]
    pages = sum(counts) + 1
    used = sum(lengths) * shape.kv_heads * shape.dim * 2 * dtype.itemsize
    layers = max(4, min(256, -(-rotate // used)))
    size = layers, pages, shape.kv_heads, PAGE_SIZE, shape.dim
    k_pages = torch.empty(size, dtype=dtype, device=device).normal_()
    v_pages = torch.empty(size, dtype=dtype, device=device).normal_()
    table = torch.zeros(len(lengths), max(CAPACITY // PAGE_SIZE, *counts), dtype=torch.int32)
    order = torch.randperm(pages - 1).to(torch.int32) + 1
    begin = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[begin : begin + count]
        begin += count
    q = torch.randn(layers, len(lengths), shape.heads, shape.dim, device=device).to(dtype)
    slots = torch.arange(len(lengths), dtype=torch.int32, device=device)
    positions = torch.tensor(lengths, device=device) - 1
    return DecodeCase(q, k_pages, v_pages, table.to(device), slots, positions, used)


def places_of(case: DecodeCase, layer: int) -> Places:
    return Places(case.k_pages[layer], case.v_pages[layer], case.block_table, case.slots, case.positions)


def time_decode(case: DecodeCase, device: str, **new: Tensor) -> float:
    options = Options(case.q.shape[-1] ** -0.5)

    def call(layer: int) -> Tensor:
        return decode_attention(case.q[layer], places_of(case, layer), options, **new)

    return seconds([lambda layer=layer: call(layer) for layer in range(len(case.q))], device)


def in_8_bits(case: DecodeCase) -> DecodeCase:
    """The same keys and values, rounded."""
    k_pages, v_pages = (pages.to(torch.float8_e4m3fn) for pages in (case.k_pages, case.v_pages))
    return case._replace(k_pages=k_pages, v_pages=v_pages, bytes=case.bytes // case.k_pages.element_size())


def run_kv(shapes: list[Shape], device: str, dtype: torch.dtype, ceiling: float, args: Any) -> list[dict[str, Any]]:
    """Decode over keys and values of 8 bits beside those of `dtype`."""
    rows = []
    for shape in shapes:
        cases = [(1, 32768), (8, 4096), (8, 32768), (64, 4096)]
        for batch, context in [(3, 40)] if args.smoke else cases[2:3] if args.sweep else cases:
            case = decode_case(shape, [context] * batch, device, dtype, 1 if args.smoke else ROTATE_BYTES)
            packed = in_8_bits(case)
            new = {name: torch.randn(batch, shape.kv_heads, shape.dim, device=device).to(dtype) for name in ("k", "v")}
            # What rounding changes alone: the same numbers in pages of the dtype.
            numbers = case._replace(k_pages=packed.k_pages.to(dtype), v_pages=packed.v_pages.to(dtype))
            options = Options(shape.dim**-0.5)
            found, wanted = (
                decode_attention(each.q[0], places_of(each, 0), options).float() for each in (packed, numbers)
            )
            del numbers
            row: dict[str, Any] = {
                "model": shape.name,
                "batch": batch,
                "context": context,
                "error": float((found - wanted).norm() / wanted.norm()),
            }
            for name, each in (("", case), ("fp8_", packed)):
                row[f"{name}us"] = time_decode(each, device) * 1e6
                row[f"{name}append_us"] = time_decode(each, device, **new) * 1e6
            row["over_bf16"] = row["fp8_us"] / row["us"]
            row["append_over_bf16"] = row["fp8_append_us"] / row["append_us"]
            row["percent_of_ceiling"] = packed.bytes / (row["fp8_us"] * 1e-6) / ceiling * 100
            if args.sweep and device == "cuda":
                row["sweep"] = sweep_kv(packed, new, device)
            rows.append(row)
            print(
                f"kv      {shape.name:13} batch {batch:3} context {context:>6} bf16 {row['us']:8.1f} us, fp8 "
                f"{row['fp8_us']:8.1f} us, {row['over_bf16']:.3f} of bf16 ({row['append_over_bf16']:.3f} with the "
                f"step's own), {row['percent_of_ceiling']:.1f} % of the ceiling, error {row['error']:.1e}",
                flush=True,
            )
            for took, own, options_of in row.get("sweep", [])[:10]:
                print(
                    f"        {took:8.1f} us, {own:8.1f} with the step's own {tuple(options_of.values())}", flush=True
                )
            del case, packed
        for tokens in (70,) if args.smoke else () if args.sweep else (512, 4096):
            plain, packed_us = (
                time_prefill(shape, tokens, device, dtype, kept) * 1e6 for kept in (None, torch.float8_e4m3fn)
            )
            rows.append({"model": shape.name, "prefill": tokens, "us": plain, "fp8_us": packed_us})
            print(
                f"kv      {shape.name:13} prefill of {tokens}: bf16 {plain:.1f} us, fp8 {packed_us:.1f} us", flush=True
            )
    return rows


def sweep_kv(case: DecodeCase, new: dict[str, Tensor], device: str) -> list[tuple[float, float, dict[str, int]]]:
    """Microseconds without and with the step's own keys and values under other launch options, fastest first."""
    from hybridgen.kernels.attention import decode

    scale = case.q.shape[-1] ** -0.5
    forms = [(64, 4, 0), (64, 4, 128), (64, 2, 0), (64, 8, 0), (32, 1, 0), (32, 2, 0), (128, 4, 0), (128, 8, 128)]
    tunes = [
        decode.Tuning(block, warps, stages, programs, programs, registers)
        for block, warps, registers in forms
        for stages in (2, 3, 4, 5)
        for programs in (2, 3, 4, 6, 8)
    ]

    def call(tune: Any, given: dict[str, Tensor], layer: int) -> Tensor:
        return decode.decode_attention(
            case.q[layer], *places_of(case, layer), scale, 0, 0, 0.0, None, **given, tune=tune
        )

    def compiled(tune: Any) -> bool:
        try:
            for given in ({}, new):
                call(tune, given, 0)
        except Exception:  # more shared memory than there is
            return False
        return True

    # How many programs there are changes nothing in the kernel.
    kernels = {tune[:3] + tune[5:]: tune for tune in tunes}
    with ThreadPoolExecutor(16) as pool:
        runs = dict(zip(kernels, pool.map(compiled, kernels.values()), strict=True))
    found = []
    for tune in tunes:
        if runs[tune[:3] + tune[5:]]:
            plain, own = (
                seconds([partial(call, tune, given, layer) for layer in range(len(case.q))], device, 5) * 1e6
                for given in ({}, new)
            )
            found.append((plain, own, tune._asdict()))
    return sorted(found, key=lambda each: each[0])


def time_prefill(shape: Shape, tokens: int, device: str, dtype: torch.dtype, kept: torch.dtype | None = None) -> float:
    """`kept` is the dtype of the pages, if it is another."""
    count = -(-tokens // PAGE_SIZE)
    size = count + 1, shape.kv_heads, PAGE_SIZE, shape.dim
    k_pages = torch.empty(size, dtype=dtype, device=device).normal_()
    v_pages = torch.empty(size, dtype=dtype, device=device).normal_()
    if kept is not None:
        k_pages, v_pages = k_pages.to(kept), v_pages.to(kept)
    table = torch.zeros(32, CAPACITY // PAGE_SIZE, dtype=torch.int32, device=device)
    table[0, :count] = torch.randperm(count, device=device) + 1
    slots = torch.zeros(tokens, dtype=torch.int32, device=device)
    positions = torch.arange(tokens, device=device)
    starts = torch.full((33,), tokens, dtype=torch.int32, device=device)
    starts[0] = 0
    q = torch.randn(tokens, shape.heads, shape.dim, device=device).to(dtype)
    places, options = Places(k_pages, v_pages, table, slots, positions), Options(shape.dim**-0.5)
    return seconds([lambda: prefill_attention(q, places, starts, options)] * 8, device)


def time_flash(shape: Shape, tokens: int, device: str, dtype: torch.dtype) -> float:
    """torch's scaled_dot_product_attention, flash backend."""
    q = torch.randn(1, shape.heads, tokens, shape.dim, device=device).to(dtype)
    k, v = torch.randn(2, 1, shape.kv_heads, tokens, shape.dim, device=device).to(dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return seconds([lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)] * 8, device)


def ragged() -> list[int]:
    """32 lengths as a server sees them: most short, one of 64k."""
    return [128 + 97 * i for i in range(24)] + [4096] * 7 + [65536]


def run_decode(shapes: list[Shape], device: str, dtype: torch.dtype, ceiling: float, smoke: bool) -> list[dict]:
    rows = []
    cases: list[tuple[int | str, list[int]]] = [(c, [c] * b) for b, c in ([(1, 64), (3, 40)] if smoke else DECODE)]
    if not smoke:
        cases.append(("ragged", ragged()))
    for shape in shapes:
        for context, lengths in cases:
            case = decode_case(shape, lengths, device, dtype, 1 if smoke else ROTATE_BYTES)
            took = time_decode(case, device)
            row = {
                "model": shape.name,
                "batch": len(lengths),
                "context": context,
                "us": took * 1e6,
                "gb_per_s": case.bytes / took / 1e9,
                "percent_of_ceiling": case.bytes / took / ceiling * 100,
            }
            rows.append(row)
            print(
                f"decode  {shape.name:13} batch {len(lengths):3} context {context:>6} {row['us']:9.1f} us "
                f"{row['gb_per_s']:7.0f} GB/s {row['percent_of_ceiling']:5.1f} %",
                flush=True,
            )
            del case
    return rows


def run_prefill(shapes: list[Shape], device: str, dtype: torch.dtype, smoke: bool) -> list[dict]:
    rows = []
    for shape in shapes:
        for tokens in (10, 70) if smoke else PROMPTS:
            ours, flash = time_prefill(shape, tokens, device, dtype), time_flash(shape, tokens, device, dtype)
            operations = 2 * tokens * (tokens + 1) * shape.heads * shape.dim
            row = {
                "model": shape.name,
                "tokens": tokens,
                "us": ours * 1e6,
                "flash_us": flash * 1e6,
                "ratio": ours / flash,
                "tflop_per_s": operations / ours / 1e12,
            }
            rows.append(row)
            print(
                f"prefill {shape.name:13} tokens {tokens:5} {row['us']:9.1f} us, torch flash "
                f"{row['flash_us']:9.1f} us, ratio {row['ratio']:.2f}, {row['tflop_per_s']:5.0f} TFLOP/s",
                flush=True,
            )
    return rows


def run_write(shape: Shape, device: str, dtype: torch.dtype, smoke: bool) -> list[dict]:
    """The KV write, K and V as views of a fused projection."""
    rows = []
    for tokens in (1, 7) if smoke else (1, 64, 8192):
        case = decode_case(shape, [tokens], device, dtype, 1)
        projected = torch.randn(tokens, 3 * shape.kv_heads, shape.dim, device=device).to(dtype)
        k, v = projected[:, : shape.kv_heads], projected[:, shape.kv_heads : 2 * shape.kv_heads]
        slots = torch.zeros(tokens, dtype=torch.int32, device=device)
        positions = torch.arange(tokens, device=device)
        args = k, v, Places(case.k_pages[0], case.v_pages[0], case.block_table, slots, positions)
        took = seconds([lambda args=args: write_kv(*args)] * 16, device)
        rows.append({"model": shape.name, "tokens": tokens, "us": took * 1e6})
        print(f"write   {shape.name:13} tokens {tokens:5} {took * 1e6:9.1f} us", flush=True)
    return rows


def run_host(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Host time of a call without a graph: what an eager or compiled step pays for each layer."""
    case = decode_case(shape, [512], device, dtype, 1)
    q, k_pages, v_pages = case.q[0], case.k_pages[0], case.v_pages[0]
    places, options = Places(k_pages, v_pages, case.block_table, case.slots, case.positions), Options(0.125)
    k = torch.randn(1, shape.kv_heads, shape.dim, device=device).to(dtype)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "write_kv": lambda: write_kv(k, k, places),
        "decode_attention": lambda: decode_attention(q, places, options),
        "prefill_attention": lambda: prefill_attention(q, places, starts, options),
    }
    result = {}
    for name, call in calls.items():
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        if device == "cuda":
            torch.cuda.synchronize()
        result[name] = statistics.median(times) * 1e6
        print(f"host    {name} {result[name]:.1f} us", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--kv", action="store_true", help="time keys and values of 8 bits instead")
    parser.add_argument("--sweep", action="store_true", help="with --kv, other launch options at 8 rows of 32k alone")
    parser.add_argument("--models", nargs="+", help="of " + ", ".join(shape.name for shape in SHAPES))
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    dtype = torch.float32 if args.smoke else torch.bfloat16
    shapes = [Shape("tiny", 4, 2, 16)] if args.smoke else SHAPES
    if args.models:
        shapes = [shape for shape in shapes if shape.name in args.models]
    torch.manual_seed(0)
    ceiling = read_ceiling(device)
    print(f"read ceiling {ceiling / 1e9:.0f} GB/s", flush=True)
    results: dict[str, Any] = {
        "benchmark": "attention",
        "dtype": str(dtype),
        "page_size": PAGE_SIZE,
        "read_ceiling_gb_per_s": ceiling / 1e9,
    }
    if args.kv or args.smoke:
        results["kv"] = run_kv(shapes, device, dtype, ceiling, args)
    if not args.kv:
        results["decode"] = run_decode(shapes, device, dtype, ceiling, args.smoke)
        results["prefill"] = run_prefill(shapes, device, dtype, args.smoke)
        results["write"] = run_write(shapes[0], device, dtype, args.smoke)
        results["host_us"] = run_host(shapes[0], device, dtype)
    report(results, args.output)


if __name__ == "__main__":
    main()
