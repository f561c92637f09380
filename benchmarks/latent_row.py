"""How fast is attention of one row to latents by the CUDA kernels of `latent_row.cu`, beside Triton's?

The heads of DeepSeek-V2-Lite. Each variant is compared with dense attention in float64 first, where the newest latent's
page holds no numbers before, then one step is run 3,000 times, whose bits must not change. Times are of calls in a CUDA
graph, as in `latent.py`, and of such calls behind the product that makes their queries, as in a layer. `copies alone`
and `products alone` are the first kernel without the other half of its work, with results that mean nothing.

    python benchmarks/latent_row.py [--output latent-row.json]
    python benchmarks/latent_row.py --smoke          # the op on a CPU: checks the script
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import provenance, report, this_device, write
from latent import (
    LITE,
    PAGE_SIZE,
    ROTATE_BYTES,
    WRONG,
    Case,
    Shape,
    error_of,
    make_case,
    seconds,
    time_decode,
    time_read,
)
from torch import Tensor

from hybridgen.kernels.attention.latent import latent_decode, through_keys
from hybridgen.kernels.attention.latent_row import Row, Sizes
from hybridgen.kernels.read_ceiling import read_ceiling

REPEATS = 3000
CONTEXTS = (32768, 70, 512, 4096, 16385)
VARIANTS: dict[str, dict[str, int]] = {
    "as it is": {},
    "not early": {"EARLY": 0},
    "3 stages": {"STAGES": 3},
    "L2 asked": {"PREFETCH": 1},
    "not early, L2 asked": {"EARLY": 0, "PREFETCH": 1},
    "copies alone": {"EARLY": 0, "TRIAL": 1},
    "products alone": {"EARLY": 0, "TRIAL": 2},
}


def changed_bits(case: Case, attend: Callable[..., Tensor], repeats: int) -> int:
    first = attend(*case.arguments(0), *case.new()).view(torch.int32)
    count = torch.zeros((), dtype=torch.int64, device=first.device)
    for _ in range(repeats):
        count += (attend(*case.arguments(0), *case.new()).view(torch.int32) != first).any()
    return int(count)


def time_behind_product(case: Case, attend: Callable[..., Tensor] | None, shape: Shape, device: str) -> float:
    """As in a layer: the product that makes the queries, then attention; None: the product alone."""
    dtype = case.q.dtype
    weight = torch.randn(shape.heads * (shape.nope + shape.value_dim), shape.rank, device=device).to(dtype)
    heads = torch.randn(1, shape.heads, shape.nope, device=device).to(dtype)

    def call(layer: int) -> None:
        query = through_keys(heads, weight)
        if attend is not None:
            attend(query, *case.arguments(layer)[1:], *case.new())

    return seconds([partial(call, layer) for layer in range(len(case.q))], device)


def variants_on(device: str) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"triton": latent_decode}
    if device == "cpu":
        return found
    sizes = Sizes(LITE.heads, LITE.rank, LITE.rope, PAGE_SIZE, torch.bfloat16)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for name, changes in VARIANTS.items():
        found[name] = made = Row(sizes, processors, torch.cuda.get_device_capability(), changes)
        print(f"{name}: {made.attend.attribute('NUM_REGS')} registers", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the op on a CPU")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    device = "cpu" if arguments.smoke else this_device()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = Shape("tiny", 4, 16, 8, 12, 8) if arguments.smoke else LITE
    torch.manual_seed(0)
    ceiling = read_ceiling(torch.device(device, 0) if device == "cuda" else torch.device(device))
    rows: list[dict[str, Any]] = []
    results = {"benchmark": "latent_row", "read_ceiling_gb_per_s": None if ceiling is None else ceiling / 1e9}
    results["rows"] = rows
    head = {"provenance": provenance()}
    variants = variants_on(device)
    with torch.inference_mode():
        for context in (70,) if arguments.smoke else CONTEXTS:
            case = make_case(shape, [context], device, dtype, 1 if arguments.smoke else ROTATE_BYTES)
            read = context * (shape.rank + shape.rope) * dtype.itemsize
            reads = device == "cuda" and context % PAGE_SIZE == 0
            reading = time_read(case) * 1e6 if reads else None
            alone = time_behind_product(case, None, shape, device) * 1e6
            print(f"context {context}: only reading {reading} us, the product alone {alone:.1f}", flush=True)
            for name, attend in variants.items():
                row: dict[str, Any] = {"context": context, "variant": name, "only_read_us": reading}
                rows.append(row)
                if "alone" not in name:
                    newest = case.block_table[0, (context - 1) // PAGE_SIZE], 0, (context - 1) % PAGE_SIZE
                    case.pages[0, newest[0], newest[1], newest[2]] = torch.nan
                    if device == "cuda":
                        torch.cuda.synchronize()
                    row["error"] = error_of(case, attend)
                    if not row["error"] <= WRONG:
                        print(f"  {name:20} wrong: error {row['error']:.1e}", flush=True)
                        continue
                    row["changed"] = changed_bits(case, attend, 3 if arguments.smoke else REPEATS)
                took = time_decode(case, device, attend)
                behind = time_behind_product(case, attend, shape, device)
                row |= {"us": took * 1e6, "behind_product_us": behind * 1e6, "product_us": alone}
                row["percent_of_ceiling"] = None if ceiling is None else read / took / ceiling * 100
                print(
                    f"  {name:20} {row['us']:8.2f} us, {row['percent_of_ceiling'] or 0:5.1f} % of the ceiling, behind "
                    f"the product {row['behind_product_us']:8.2f}, error {row.get('error', 0):.1e}, "
                    f"{row.get('changed', 0)} changed",
                    flush=True,
                )
                write({**head, **results}, arguments.output)
            del case
    report(results, arguments.output)


if __name__ == "__main__":
    main()
