"""How fast are products with quantised weights, and steps of a model that has them?

Kernels first against float32 references, at rows of 1 to 512: the largest relative error of a format. Then times of a
layer's four products of an 8B model (q/k/v and gate/up joined) beside bf16 in cuBLAS and beside what the read ceiling
allows for the bytes, inside CUDA graphs, over copies of the weight that together exceed the L2 cache. `--sweep` tries
other tiles instead. `--steps` builds the whole model with random weights, and times decode steps and prefill in mode
`hybrid`; `fp8-w8a8` is FP8 with `fp8_activations`. Experts (gpt-oss-20b) have 16 bits; `experts.py` times packed ones.

    python benchmarks/quantised.py [--output quantised.json]
    python benchmarks/quantised.py --sweep [--sweep-rows 64] [--output sweep.json]
    python benchmarks/quantised.py --steps [--models llama-3.1-8b] [--kinds none fp8 int4] [--output steps.json]
    python benchmarks/quantised.py --steps --models llama-3.1-70b --kinds int4 --batches 1 --no-prefill
    python benchmarks/quantised.py --smoke          # tiny, on the CPU reference: checks the script
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import (
    how_it_ran,
    random_model,
    random_prompts,
    release,
    report,
    shape_dtype,
    synchronize,
    this_device,
)
from torch import Tensor

import hybridgen
from hybridgen.device.timing import graph_seconds
from hybridgen.kernels.linear.layout import Block
from hybridgen.kernels.linear.quantised import quantised_linear
from hybridgen.kernels.read_ceiling import read_ceiling
from hybridgen.models.quantised import QuantisedWeight
from hybridgen.models.rounding import quantise

ROTATE_BYTES = 256 * 2**20
MOST_COPIES = 24
ROWS = (1, 8, 64, 512)
CHECKED_ROWS = (1, 2, 8, 17, 64, 100, 256, 512)


class Shape(NamedTuple):
    """A projection, or several joined."""

    name: str
    outputs: int
    inputs: int


SHAPES = [
    Shape("qkv", 6144, 4096),
    Shape("out", 4096, 4096),
    Shape("gate_up", 28672, 4096),
    Shape("down", 4096, 14336),
]
FORMATS = ("fp8", "fp8 128x128", "int8", "int4", "int4 symmetric", "mxfp4")


def weight_of(name: str, shape: Shape, device: str, dtype: torch.dtype) -> QuantisedWeight:
    """A random weight in a format."""
    outputs, inputs = shape.outputs, shape.inputs
    if name == "mxfp4":
        data = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
        scales = torch.randint(118, 122, (outputs, inputs // 32), dtype=torch.uint8, device=device)
        return QuantisedWeight("mxfp4", data, scales, None, inputs, Block(1, 32), dtype)
    values = torch.empty(outputs, inputs, dtype=dtype, device=device).normal_(0, inputs**-0.5)
    if name == "fp8 128x128":
        size = 128
        grid = Block(size, size).grid(outputs, inputs)
        scales = torch.rand(grid, device=device) * 0.01 + 0.01
        data = (torch.randn(outputs, inputs, device=device)).to(torch.float8_e4m3fn)
        return QuantisedWeight("fp8", data, scales, None, inputs, Block(size, size), dtype)
    return quantise(values, name.split()[0], dtype, symmetric="symmetric" in name)


def times(calls: list[Callable[[], Any]], device: str) -> float:
    """Seconds of one call: all of them in one CUDA graph, replayed."""
    if device == "cpu":
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)

    def all_of_them() -> None:
        for call in calls:
            call()

    return graph_seconds(all_of_them, 9, 1) / len(calls)


def copies_of(tensors: list[Tensor], device: str) -> int:
    size = sum(tensor.nbytes for tensor in tensors)
    return 2 if device == "cpu" else max(2, min(MOST_COPIES, -(-ROTATE_BYTES // size)))


def product(weight: QuantisedWeight, x: Tensor) -> Tensor:
    return quantised_linear(x, weight.kind, weight.data, weight.scales, weight.zeros, None, weight.inputs, weight.block)


def copy(weight: QuantisedWeight) -> QuantisedWeight:
    zeros = None if weight.zeros is None else weight.zeros.clone()
    return QuantisedWeight(
        weight.kind, weight.data.clone(), weight.scales.clone(), zeros, weight.inputs, weight.block, weight.dtype
    )


def check(device: str, dtype: torch.dtype, smoke: bool) -> list[dict[str, Any]]:
    """The largest error of each format over shapes and rows, relative to the product of its values in float64."""
    shapes = [Shape("tiny", 96, 256)] if smoke else [Shape("small", 1536, 2048), Shape("odd", 1000, 2080)]
    found = []
    for name in FORMATS:
        worst = 0.0
        for shape in shapes:
            weight = weight_of(name, shape, device, dtype)
            values = weight.dequantise(torch.float32).double()
            for rows in (1, 3) if smoke else CHECKED_ROWS:
                x = torch.randn(rows, shape.inputs, device=device).to(dtype)
                wanted = x.double() @ values.T
                worst = max(worst, float((product(weight, x).double() - wanted).norm() / wanted.norm()))
        limit = 1e-5 if dtype == torch.float32 else 6e-3
        found.append({"format": name, "largest_error": worst, "fits": worst < limit})
        print(f"error   {name:15} {worst:.2e} {'' if worst < limit else 'TOO LARGE'}", flush=True)
    return found


def run_products(device: str, dtype: torch.dtype, ceiling: float, smoke: bool) -> list[dict[str, Any]]:
    """Times of every shape, format and number of rows."""
    found = []
    for shape in [Shape("tiny", 96, 256)] if smoke else SHAPES:
        dense = torch.empty(shape.outputs, shape.inputs, dtype=dtype, device=device).normal_(0, shape.inputs**-0.5)
        denses = [dense.clone() for _ in range(copies_of([dense], device))]
        base: dict[int, float] = {}
        for name in ("bf16", *FORMATS):
            weights = []
            if name != "bf16":
                first = weight_of(name, shape, device, dtype)
                weights = [copy(first) for _ in range(copies_of(list(first.tensors().values()), device))]
            size = dense.nbytes if name == "bf16" else weights[0].bytes_read
            for rows in (1, 3) if smoke else ROWS:
                x = torch.randn(rows, shape.inputs, device=device).to(dtype)
                calls: list[Callable[[], Tensor]]
                if name == "bf16":
                    calls = [lambda w=w, x=x: F.linear(x, w) for w in denses]  # type: ignore[misc]
                else:
                    calls = [lambda w=w, x=x: product(w, x) for w in weights]  # type: ignore[misc]
                took = times(calls, device)
                base.setdefault(rows, took)
                row = {
                    "shape": shape.name,
                    "format": name,
                    "rows": rows,
                    "us": took * 1e6,
                    "over_bf16": took / base[rows],
                    "percent_of_ceiling": size / took / ceiling * 100,
                }
                found.append(row)
                print(
                    f"product {shape.name:8} {name:15} rows {rows:4} {row['us']:9.1f} us, {row['over_bf16']:5.2f} of "
                    f"bf16, {row['percent_of_ceiling']:5.1f} % of the ceiling",
                    flush=True,
                )
            del weights
    return found


FEW_SHAPES = [*SHAPES, Shape("70b gate_up", 57344, 8192), Shape("70b down", 8192, 28672)]


def run_few(device: str, dtype: torch.dtype, ceiling: float) -> list[dict[str, Any]]:
    """`int4` and few rows by the kernels that can take them, compared with float64 first."""
    from hybridgen.kernels.linear import int4_few
    from hybridgen.kernels.linear import quantised_few_kernels as few
    from hybridgen.kernels.linear.quantised_kernels import layout_of
    from hybridgen.kernels.linear.quantised_kernels import product as cut

    found = []
    for shape in FEW_SHAPES:
        for name in ("int4", "int4 symmetric"):
            first = weight_of(name, shape, device, dtype)
            weights = [first, *(copy(first) for _ in range(copies_of(list(first.tensors().values()), device) - 1))]
            values = first.rows(0, 512).dequantise(torch.float32).double()
            layout = layout_of("int4", first.zeros is not None, shape.inputs, first.block, first.scales.shape[1])
            assert layout is not None
            for rows in (1, 2, 4, 8):
                x = torch.randn(rows, shape.inputs, device=device).to(dtype)
                wanted = x.double() @ values.T

                def of(kernel: str, w: QuantisedWeight, x: Tensor = x, layout: Any = layout) -> Tensor:
                    if kernel == "cuda":
                        return int4_few.product(x, w.data, w.scales, w.zeros, None, layout.group)
                    if kernel == "triton":
                        return few.few_product(x, w.data, w.scales, w.zeros, None, layout.group)
                    return cut(x, w.data, w.scales, w.zeros, None, layout, w.inputs)

                row: dict[str, Any] = {"shape": shape.name, "format": name, "rows": rows}
                for kernel in ("cuda", "triton", "any rows"):
                    if kernel == "triton" and not few.takes(
                        x, first.data, first.zeros, first.scales.shape[1], layout.group
                    ):
                        continue
                    error = (of(kernel, first)[:, :512].double() - wanted).norm() / wanted.norm()
                    took = times([lambda w=w, k=kernel, of=of: of(k, w) for w in weights], device)  # type: ignore[misc]
                    row |= {f"{kernel} us": took * 1e6, f"{kernel} error": float(error)}
                row["of_ceiling"] = first.bytes_read / row["cuda us"] * 1e6 / ceiling
                found.append(row)
                print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            del weights
    return found


FORMS = (
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 64, 4, 4),
    (64, 64, 4, 6),
    (128, 64, 8, 4),
    (128, 64, 8, 6),
    (128, 128, 8, 3),
    (128, 128, 8, 4),
    (128, 64, 4, 4),
    (256, 64, 8, 4),
)
"""Outputs, inputs, warps and stages of the tiles that `--sweep` tries. A program reads the rows for its own outputs: of
64 rows they are four times the bytes of its int4 codes with 64 outputs, and come out of the L2 cache; with 128 half."""


def sweep(device: str, dtype: torch.dtype, rows_of: list[int]) -> list[dict[str, Any]]:
    """The default tile beside others; for each format and number of rows, the tiles by their time over all shapes."""
    from hybridgen.device.launcher import device_of
    from hybridgen.kernels.linear.quantised_kernels import Tile, default_tile, layout_of
    from hybridgen.kernels.linear.quantised_kernels import product as cut

    found = []
    for name in ("fp8", "int4"):
        sums: dict[Any, float] = {}
        for shape in SHAPES:
            first = weight_of(name, shape, device, dtype)
            weights = [copy(first) for _ in range(copies_of(list(first.tensors().values()), device))]
            layout = layout_of(first.kind, first.zeros is not None, shape.inputs, first.block, first.scales.shape[1])
            assert layout is not None
            for rows in rows_of:
                x = torch.randn(rows, shape.inputs, device=device).to(dtype)
                height = max(16, 1 << (rows - 1).bit_length())
                processors = device_of(x).processors
                usual = default_tile(layout, rows, shape.outputs, shape.inputs, processors)
                tiles: dict[Any, list[Any]] = {usual: ["default"]}
                for form in FORMS:
                    outputs, inputs, warps, stages = form
                    programs = -(-shape.outputs // outputs)
                    most = [n for n in (1, 2, 3, 4, 6, 8) if 0.7 * processors <= n * programs <= 3.2 * processors]
                    for splits in most or [1]:
                        tiles.setdefault(Tile(outputs, height, inputs, splits, warps, stages), []).append(form)

                def call(weight: QuantisedWeight, tile: Tile, x: Tensor = x, layout: Any = layout) -> Tensor:
                    return cut(x, weight.data, weight.scales, weight.zeros, None, layout, weight.inputs, tile)

                def compiled(tile: Tile, call: Any = call, first: QuantisedWeight = first) -> str | None:
                    try:
                        call(first, tile)
                    except Exception as error:  # more shared memory than there is
                        return type(error).__name__
                    return None

                with ThreadPoolExecutor(8) as pool:
                    problems = dict(zip(tiles, pool.map(compiled, tiles), strict=True))
                results = sorted(
                    (times([lambda w=w, tile=tile: call(w, tile) for w in weights], device) * 1e6, tile)  # type: ignore[misc]
                    for tile in tiles
                    if problems[tile] is None
                )
                best: dict[Any, float] = {}
                for took, tile in results:
                    for form in tiles[tile]:
                        best.setdefault(form, took)
                for form, took in best.items():
                    sums[rows, form] = sums.get((rows, form), 0.0) + took
                row = {"shape": shape.name, "format": name, "rows": rows, "default": [best.get("default"), usual]}
                found.append(row | {"times": [[took, tile] for took, tile in results]})
                print(
                    f"sweep   {shape.name:8} {name:5} rows {rows:3} default {best['default']:.1f} us {tuple(usual)}, "
                    "best " + ", ".join(f"{took:.1f} {tuple(tile)}" for took, tile in results[:4]),
                    flush=True,
                )
            del weights
        for rows in rows_of:
            print(
                f"sweep   {name} rows {rows}: all four products by (outputs, inputs, warps, stages), best splits each"
            )
            whole = sorted((took, str(form)) for (count, form), took in sums.items() if count == rows)
            for took, form in whole:
                print(f"        {took:8.1f} us {form}", flush=True)
            found.append({"format": name, "rows": rows, "whole": whole})
    return found


def run_steps(args: argparse.Namespace, models: list[str], all_batches: list[int], device: str) -> list[dict[str, Any]]:
    """Milliseconds of a decode step, and of the prefill of 32 prompts of 512 tokens."""
    found = []
    for given in models:
        name, _, own = given.partition(":")
        batches = [int(own)] if own else all_batches
        for kind in args.kinds:
            # `fp8-w8a8`: FP8 weights, and activations of many rows in FP8 too.
            weights = None if kind == "none" else kind.partition("-")[0]
            begin = time.perf_counter()
            model = random_model(name, shape_dtype(name, device), device, quantised=weights)
            release()
            print(f"steps   {name} {kind}: weights made in {time.perf_counter() - begin:.1f} s", flush=True)
            small = name == "tiny"
            prompts, length, new = (4, 80, 8) if small else (32, 512, 128)
            options: dict[str, Any] = {"mode": "eager" if device == "cpu" else "hybrid", "decode_buckets": batches}
            options |= {"max_batch": max(prompts, *batches), "max_context": 1024, "prefill_buckets": []}
            options |= {"fp8_activations": kind == "fp8-w8a8", "kv_dtype": args.kv_dtype}
            with hybridgen.Engine.load(model, **options) as engine:
                print(f"steps   {name} {kind}: ready after {time.perf_counter() - begin:.1f} s", flush=True)
                vocab = model.config.vocab_size
                stats = engine.stats()
                row: dict[str, Any] = {"model": name, "kind": kind, "weights": stats.weights, "fused": stats.fused}
                for batch in batches:
                    ids = random_prompts(batch, length // 8, vocab)
                    took = []
                    for _ in range(3):
                        outs = engine.generate(ids, max_new_tokens=new, ignore_eos=True)
                        took.append(statistics.median(out.timing.tpot() for out in outs))
                    row[f"step_ms_{batch}"] = statistics.median(took[1:]) * 1e3
                steps = ", ".join(f"{batch} rows {row[f'step_ms_{batch}']:.2f} ms" for batch in batches)
                print(f"steps   {name} {kind}: {steps}", flush=True)
                if not args.no_prefill:
                    row["prefill_ms"] = prefill_ms(engine, prompts, length, vocab, device)
                    for base in (each for each in found if each["model"] == name and each["kind"] == "none"):
                        row["prefill_over_16_bits"] = row["prefill_ms"] / base["prefill_ms"]
                    print(f"prefill {name} {kind}: {row['prefill_ms']:.0f} ms", flush=True)
                if device == "cuda":
                    row["device_bytes"] = torch.cuda.memory_allocated()
                row["how"] = how_it_ran(engine)
            found.append(row)
            del model, engine
            release()
    return found


def prefill_ms(engine: hybridgen.Engine, prompts: int, length: int, vocab: int, device: str) -> float:
    took = []
    for seed in range(4):
        ids = random_prompts(prompts, length, vocab, seed=seed + 1)
        synchronize(device)
        begin = time.perf_counter()
        engine.generate(ids, max_new_tokens=1, ignore_eos=True)
        synchronize(device)
        took.append(time.perf_counter() - begin)
    return statistics.median(took[1:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--few", action="store_true", help="int4 and few rows by each kernel for them instead")
    parser.add_argument("--sweep", action="store_true", help="try other tiles instead")
    parser.add_argument("--sweep-rows", nargs="+", type=int, default=[64], help="rows of --sweep")
    parser.add_argument("--steps", action="store_true", help="time whole models instead of products")
    parser.add_argument(
        "--models", nargs="+", default=["llama-3.1-8b"], help="shapes for --steps; llama-3.1-8b:64 at so many rows"
    )
    kinds = ["none", "fp8", "fp8-w8a8", "int4"]
    parser.add_argument("--kinds", nargs="+", default=kinds, help="none, fp8, fp8-w8a8, int8, int4")
    parser.add_argument("--kv-dtype", help="fp8: keys and values in 8 bits, with --steps")
    parser.add_argument("--no-prefill", action="store_true", help="with --steps, decode alone")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], help="rows of decode steps")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    device = "cpu" if args.smoke else this_device()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    results: dict[str, Any] = {"benchmark": "quantised", "dtype": str(dtype)}
    with torch.inference_mode(False), torch.no_grad():
        ceiling = read_ceiling(torch.device(device)) or 1e9
        results["read_ceiling_gb_per_s"] = ceiling / 1e9
        if args.steps or args.smoke:
            models, batches = (["tiny"], [1, 2]) if args.smoke else (args.models, args.batches)
            results["steps"] = run_steps(args, models, batches, device)
        if args.few:
            results["few"] = run_few(device, dtype, ceiling)
        elif args.sweep:
            results["sweep"] = sweep(device, dtype, args.sweep_rows)
        elif not args.steps:
            results["errors"] = check(device, dtype, args.smoke)
            results["products"] = run_products(device, dtype, ceiling, args.smoke)
    report(results, args.output)


if __name__ == "__main__":
    main()
