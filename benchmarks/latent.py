"""How fast is attention to latents?

Decode: bytes of the latents that a step reads over its time, against the read ceiling of the same run; the time is that
of calls inside CUDA graphs (median of replays), which write the step's own latents too and go through the caches of
several layers, together larger than the L2 cache. A few megabytes are not read at that ceiling by any kernel: beside it
stands the time of a kernel that only reads the same pages, in the same kind of graph (`only_read_us`), and that of each
of decode's two kernels alone (`attend_us`, `combine_us`). Before a shape is timed, its result is compared with dense
attention in float64, and one step is run 3,000 times, whose bits must not change. `--sweep` adds other launch options,
each compared first. Prefill: attention of one fresh prompt, its projections included, as it runs (by latents on
CUDA), by the kernel for keys and values of the call's own tokens, and by keys and values of all heads and torch's
`scaled_dot_product_attention`, with how many of 300 calls had other bits than the first.

    python benchmarks/latent.py [--sweep] [--rows 1] [--prefill] [--output latent.json]
    python benchmarks/latent.py --smoke          # tiny, on the CPU's implementation: checks the script
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import report, this_device
from torch import Tensor
from torch.nn import functional as F

from hybridgen.device.timing import graph_seconds
from hybridgen.kernels.attention.latent import LatentPlaces, latent_prefill
from hybridgen.kernels.read_ceiling import read_ceiling

latent_decode = torch.ops.hybridgen.latent_decode.default
"""Takes what `latent_launches.decode` takes."""
PAGE_SIZE = 64
CAPACITY = 32768 + PAGE_SIZE
ROTATE_BYTES = 320 * 2**20
REPEATS = 3000
PROMPT_REPEATS = 300
WRONG = 2e-2
"""An error that bfloat16 does not explain."""


class Shape(NamedTuple):
    """The attention of a model's layer."""

    name: str
    heads: int
    rank: int
    rope: int
    nope: int
    value_dim: int


LITE = Shape("DeepSeek-V2-Lite", 16, 512, 64, 128, 128)
SHAPES = [LITE, Shape("MiniCPM3-4B", 40, 256, 32, 64, 64), Shape("DeepSeek-V3", 128, 512, 64, 128, 128)]
CASES = {
    LITE: [(b, c) for b in (1, 8, 32, 64) for c in (512, 4096, 32768)],
    SHAPES[1]: [(1, 32768), (32, 4096)],
    SHAPES[2]: [(1, 32768), (32, 4096)],
}
PROMPTS = (128, 512, 2048, 8192)


class Case(NamedTuple):
    """Caches of some layers, and the tokens of a step over them."""

    q: Tensor
    """[layers, T, H, rank]; `q_rotary` [layers, T, H, rope]."""
    q_rotary: Tensor
    pages: Tensor
    """[layers, pages, 1, page_size, rank + rope]"""
    block_table: Tensor
    slots: Tensor
    positions: Tensor
    latent: Tensor
    rotary: Tensor
    scale: float

    def arguments(self, layer: int) -> tuple[Any, ...]:
        places = self.pages[layer], self.block_table, self.slots, self.positions
        return self.q[layer], self.q_rotary[layer], *places, self.scale

    def new(self) -> tuple[Tensor, Tensor]:
        return self.latent, self.rotary


def make_case(shape: Shape, lengths: list[int], device: str, dtype: torch.dtype, rotate: int) -> Case:
    counts = [-(-n // PAGE_SIZE) for n in lengths]
    width = shape.rank + shape.rope
    used = sum(lengths) * width * dtype.itemsize
    layers = max(2 if rotate == 1 else 4, min(64, -(-rotate // used)))
    pages = torch.empty(layers, sum(counts) + 1, 1, PAGE_SIZE, width, dtype=dtype, device=device).normal_()
    table = torch.zeros(len(lengths), max(CAPACITY // PAGE_SIZE, *counts), dtype=torch.int32)
    order = (torch.randperm(sum(counts)) + 1).int()
    for row, ids in enumerate(order.split(counts)):
        table[row, : counts[row]] = ids
    random = torch.randn(layers, len(lengths), shape.heads, width, device=device).to(dtype)
    return Case(
        random[..., : shape.rank].contiguous(),
        random[..., shape.rank :].contiguous(),
        pages,
        table.to(device),
        torch.arange(len(lengths), dtype=torch.int32, device=device),
        torch.tensor(lengths, device=device) - 1,
        torch.randn(len(lengths), 1, shape.rank, device=device).to(dtype),
        torch.randn(len(lengths), 1, shape.rope, device=device).to(dtype),
        width**-0.5,
    )


def error_of(case: Case, attend: Callable[..., Tensor] = latent_decode) -> float:
    """Of the first layer's result, against dense attention in float64, relative to the largest value."""
    found = attend(*case.arguments(0), *case.new())
    worst = largest = 0.0
    for row, position in enumerate(case.positions.tolist()):
        ids = case.block_table[row, : position // PAGE_SIZE + 1]
        latents = case.pages[0, ids.long()].flatten(0, 2)[: position + 1].double()
        query = torch.cat((case.q[0, row], case.q_rotary[0, row]), dim=-1).double()
        wanted = (query @ latents.T * case.scale).softmax(-1) @ latents[:, : case.q.shape[-1]]
        worst = max(worst, float((found[row].double() - wanted).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
    return worst / largest


def changed_bits(call: Callable[[], Tensor], repeats: int) -> int:
    """How many of so many calls gave other bits than the first."""
    first = call().view(torch.int32)
    count = torch.zeros((), dtype=torch.int64, device=first.device)
    for _ in range(repeats):
        count += (call().view(torch.int32) != first).any()
    return int(count)


def seconds(calls: list[Callable[[], Any]], device: str) -> float:
    """Median time of one call: all of them in one CUDA graph, replayed."""

    def all_of_them() -> None:
        for call in calls:
            call()

    all_of_them()
    if device == "cuda":
        return graph_seconds(all_of_them, 15, 1) / len(calls)
    begin = time.perf_counter()
    all_of_them()
    return (time.perf_counter() - begin) / len(calls)


def time_decode(case: Case, device: str, attend: Callable[..., Tensor] = latent_decode) -> float:
    calls = [lambda layer=layer: attend(*case.arguments(layer), *case.new()) for layer in range(len(case.q))]
    return seconds(calls, device)


def time_read(case: Case) -> float:
    """Of a kernel that reads a layer's pages and does nothing with them: the best of a few block sizes."""
    from hybridgen.kernels.read_ceiling_kernels import CONFIGS, read_all

    sums = torch.zeros(1, dtype=torch.int32, device=case.pages.device)
    words = [pages[1:].flatten().view(torch.int32) for pages in case.pages]
    best = float("inf")
    for block, warps in CONFIGS:
        if words[0].shape[0] % block == 0:
            calls = [partial(read_all, each, sums, block, warps) for each in words]
            best = min(best, seconds(calls, "cuda"))
    return best


def time_parts(case: Case, tune: Any = None) -> dict[str, float]:
    """Microseconds of each of decode's kernels without the other."""
    from hybridgen.kernels.attention import latent_launches

    def nothing(*_: Any) -> None:
        pass

    kept = dict(latent_launches._calls)
    found = {}
    try:
        for part, other in (("attend", "combine"), ("combine", "attend")):
            for key, call in kept.items():
                latent_launches._calls[key] = call._replace(**{other: nothing})
            took = time_decode(case, "cuda", partial(latent_launches.decode, tune=tune))
            found[f"{part}_us"] = took * 1e6
    finally:
        latent_launches._calls.update(kept)
    return found


def sweep(case: Case, shape: Shape, device: str) -> list[dict[str, Any]]:
    """Microseconds under other launch options, fastest first."""
    from hybridgen.device.launcher import device_of
    from hybridgen.kernels.attention import latent_launches
    from hybridgen.kernels.attention.latent_launches import shape_of, tuning

    one = len(case.positions) == 1
    usual = tuning(shape_of(case.q[0], case.pages[0], shape.rank), device_of(case.q).shared_memory, alone=one)
    found = []
    # Positions, warps, tiles on their way, programs a multiprocessor, parts of a latent.
    options = [
        *((64, 4, stages, 1, 0) for stages in (2, 3)),
        *((32, 4, stages, programs, 0) for stages, programs in ((3, 1), (6, 1), (3, 2))),
        *((64, warps, 3, 1, parts) for warps in (4, 8) for parts in ((1, 2, 4) if one else (4,))),
        *((32, 4, stages, programs, 4) for stages, programs in ((3, 1), (6, 1), (3, 2), (2, 3))),
    ]
    tunes = [
        usual._replace(block=block, warps=warps, stages=stages, programs=programs, parts=parts)
        for block, warps, stages, programs, parts in options
    ]
    if not one:
        tunes += [usual._replace(chunk=chunk) for chunk in (1024, 4096, 8192)]
    for tune in tunes:
        attend = partial(latent_launches.decode, tune=tune)
        try:
            error = error_of(case, attend)
            if not error <= WRONG:
                print(f"        {tuple(tune)}: wrong, error {error:.1e}", flush=True)
                continue
            took = time_decode(case, device, attend)
            parts = time_parts(case, tune)
        except Exception as failure:  # more shared memory than there is
            print(f"        {tuple(tune)}: {type(failure).__name__}", flush=True)
            continue
        found.append({"us": took * 1e6, "error": error, **parts, **tune._asdict()})
    return sorted(found, key=lambda each: each["us"])


def run_decode(
    shape: Shape, device: str, dtype: torch.dtype, ceiling: float | None, args: Any, rows: list[dict[str, Any]]
) -> None:
    """Append to `rows` what each of the shape's cases took."""
    for batch, context in [(1, 70), (3, 40)] if args.smoke else CASES[shape]:
        if args.rows is not None and batch not in args.rows:
            continue
        case = make_case(shape, [context] * batch, device, dtype, 1 if args.smoke else ROTATE_BYTES)
        read = batch * context * (shape.rank + shape.rope) * dtype.itemsize
        row: dict[str, Any] = {"model": shape.name, "batch": batch, "context": context, "error": error_of(case)}
        step = partial(latent_decode, *case.arguments(0), *case.new())
        row["changed"] = changed_bits(step, 3 if args.smoke else REPEATS)
        took = time_decode(case, device)
        row |= {"us": took * 1e6, "gb_per_s": read / took / 1e9}
        row["percent_of_ceiling"] = None if ceiling is None else read / took / ceiling * 100
        if device == "cuda":
            row |= {"only_read_us": time_read(case) * 1e6, **time_parts(case)}
            row["percent_of_only_reading"] = row["only_read_us"] / row["us"] * 100
        rows.append(row)
        share = "" if ceiling is None else f" {row['percent_of_ceiling']:5.1f} % of the ceiling"
        print(
            f"decode  {shape.name:16} batch {batch:3} context {context:>6} {row['us']:9.1f} us "
            f"{row['gb_per_s']:6.0f} GB/s{share}, error {row['error']:.1e}, {row['changed']} changed",
            flush=True,
        )
        if device == "cuda":
            parts = (f"{name} {row[f'{name}_us']:.1f}" for name in ("only_read", "attend", "combine"))
            print(f"        us of parts: {', '.join(parts)}", flush=True)
        if args.sweep and device == "cuda" and context >= 4096:
            row["sweep"] = sweep(case, shape, device)
            for each in row["sweep"][:12]:
                named = ("block", "warps", "stages", "programs", "chunk", "parts")
                options = " ".join(f"{name} {each[name]}" for name in named)
                times = " ".join(f"{name} {each[name]:.1f}" for name in ("us", "attend_us", "combine_us"))
                print(f"        {times} error {each['error']:.1e} with {options}", flush=True)
        del case


def by_keys_and_values(
    q: Tensor, q_rotary: Tensor, latents: Tensor, weight: Tensor, shape: Shape, scale: float
) -> Tensor:
    """Attention of a fresh prompt over its keys and values, by torch."""
    both = (latents[:, : shape.rank] @ weight.T).view(len(q), shape.heads, -1)
    rotary = latents[:, None, shape.rank :].expand(-1, shape.heads, -1)
    keys = torch.cat((both[..., : shape.nope], rotary), dim=-1)
    values = both[..., shape.nope :]
    query = torch.cat((q, q_rotary), dim=-1)
    query, keys, values = (each.transpose(0, 1)[None] for each in (query, keys, values))
    return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)[0].transpose(0, 1)


def sweep_prefill(
    q: Tensor, q_rotary: Tensor, rotary: Tensor, both: Tensor, at: tuple[Tensor, ...], scale: float
) -> list[dict[str, Any]]:
    """Microseconds of the attention of a fresh prompt alone under other launch options, fastest first."""
    from hybridgen.kernels.attention import latent_launches

    found = []
    out = torch.empty((*q.shape[:2], both.shape[2] - q.shape[2]), dtype=q.dtype, device=q.device)
    for rows, block, warps, stages in (
        (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3),
    ):  # fmt: skip
        tune = latent_launches.Tuning(block, rows, warps, stages)
        call = partial(latent_launches.prefill_fresh, q, q_rotary, both, rotary, *at, scale, out, tune=tune)
        try:
            found.append({"us": seconds([call] * 4, "cuda") * 1e6, **tune._asdict()})
        except Exception as error:  # more shared memory than there is
            print(f"        {tuple(tune)}: {type(error).__name__}", flush=True)
    return sorted(found, key=lambda each: each["us"])


def run_prefill(shape: Shape, device: str, dtype: torch.dtype, smoke: bool, sweeps: bool) -> list[dict[str, Any]]:
    rows = []
    for tokens in (10, 70) if smoke else PROMPTS:
        count = -(-tokens // PAGE_SIZE)
        width = shape.rank + shape.rope
        latents = torch.randn(tokens, width, device=device).to(dtype)
        table = torch.zeros(32, CAPACITY // PAGE_SIZE, dtype=torch.int32, device=device)
        table[0, :count] = torch.randperm(count, device=device) + 1
        pages = torch.zeros(count + 1, 1, PAGE_SIZE, width, dtype=dtype, device=device)
        places = torch.arange(tokens, device=device)
        pages[table[0, places // PAGE_SIZE].long(), 0, places % PAGE_SIZE] = latents
        slots = torch.zeros(tokens, dtype=torch.int32, device=device)
        starts = torch.full((33,), tokens, dtype=torch.int32, device=device)
        starts[0] = 0
        q = torch.randn(tokens, shape.heads, shape.nope + shape.rope, device=device).to(dtype)
        q, q_rotary = q[..., : shape.nope], q[..., shape.nope :]
        size = shape.heads * (shape.nope + shape.value_dim)
        weight = (torch.randn(size, shape.rank, device=device) * shape.rank**-0.5).to(dtype)
        scale = (shape.nope + shape.rope) ** -0.5

        at = LatentPlaces(pages, table, slots, places)

        def by_own_keys(
            q: Tensor = q,
            q_rotary: Tensor = q_rotary,
            at: LatentPlaces = at,
            starts: Tensor = starts,
            weight: Tensor = weight,
            scale: float = scale,
            new: tuple[Tensor, Tensor] = latents[:, None].split((shape.rank, shape.rope), dim=-1),
        ) -> Tensor:
            return latent_prefill(q, q_rotary, at, starts, weight, scale, *new)

        def by_latents(
            q: Tensor = q,
            q_rotary: Tensor = q_rotary,
            at: LatentPlaces = at,
            starts: Tensor = starts,
            weight: Tensor = weight,
            scale: float = scale,
        ) -> Tensor:
            return latent_prefill(q, q_rotary, at, starts, weight, scale)

        def other(
            q: Tensor = q,
            q_rotary: Tensor = q_rotary,
            latents: Tensor = latents,
            weight: Tensor = weight,
            scale: float = scale,
        ) -> Tensor:
            return by_keys_and_values(q, q_rotary, latents, weight, shape, scale)

        wanted = other()
        row: dict[str, Any] = {"model": shape.name, "tokens": tokens}
        for name, way in (("", by_latents), ("own_keys_", by_own_keys)):
            row[f"{name}difference"] = float((way() - wanted).abs().max() / wanted.abs().max())
            row[f"{name}changed"] = changed_bits(way, 3 if smoke else PROMPT_REPEATS)
            row[f"{name}us"] = seconds([way] * 4, device) * 1e6
        row["keys_and_values_us"] = seconds([other] * 4, device) * 1e6
        if sweeps and device == "cuda":
            both = (latents[:, : shape.rank] @ weight.T).view(tokens, shape.heads, -1)
            rotary = latents[:, None, shape.rank :]
            row["sweep"] = sweep_prefill(q, q_rotary, rotary, both, (places, starts), scale)
        rows.append(row)
        print(
            f"prefill {shape.name:16} tokens {tokens:5} {row['us']:9.1f} us, by keys and values "
            f"{row['keys_and_values_us']:9.1f} us, by its own keys {row['own_keys_us']:9.1f} us, "
            f"differences {row['difference']:.1e} {row['own_keys_difference']:.1e}, "
            f"{row['changed']} {row['own_keys_changed']} changed",
            flush=True,
        )
        for each in row.get("sweep", ()):
            print(f"        {each}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--sweep", action="store_true", help="other launch options too")
    parser.add_argument("--rows", type=int, nargs="+", help="decode of so many rows alone, and no prefill")
    parser.add_argument("--prefill", action="store_true", help="prefill alone")
    parser.add_argument("--models", nargs="+", help="of these names; all if left out")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    device = "cpu" if args.smoke else this_device()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = [Shape("tiny", 4, 16, 8, 12, 8)] if args.smoke else SHAPES
    shapes = [shape for shape in shapes if args.models is None or shape.name in args.models]
    torch.manual_seed(0)
    ceiling = read_ceiling(torch.device(device, 0) if device == "cuda" else torch.device(device))
    results: dict[str, Any] = {"benchmark": "latent", "dtype": str(dtype), "page_size": PAGE_SIZE}
    results["read_ceiling_gb_per_s"] = None if ceiling is None else ceiling / 1e9
    print(f"read ceiling {results['read_ceiling_gb_per_s']} GB/s", flush=True)
    results |= {"decode": [], "prefill": []}
    try:
        with torch.inference_mode():
            for shape in [] if args.prefill else shapes:
                run_decode(shape, device, dtype, ceiling, args, results["decode"])
            for shape in shapes if args.rows is None else []:
                results["prefill"] += run_prefill(shape, device, dtype, args.smoke, args.sweep)
    finally:  # what was measured by then is worth keeping
        report(results, args.output)


if __name__ == "__main__":
    main()
