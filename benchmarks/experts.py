"""How fast are the chosen experts of a mixture, against what reading their weights alone would take?

First the op's kernels against a float32 reference at rows of 1 to 64 (and 200), with poisoned memory; then that a fixed
step gives the same bits 3,000 times, and a row the same bits alone and in company. Then times in a CUDA graph, over
copies of the weights and ids that change from call to call, beside the bytes of the experts that were chosen over the
read ceiling of the same run, and beside the ways that transformers has for experts of 16 bits. `--sweep` tries other
tiles; `--steps` times whole models with random weights in mode `hybrid`.

    python benchmarks/experts.py [--output experts.json]
    python benchmarks/experts.py --shapes qwen3-30b-a3b --sweep --rows 1 8 --output sweep.json
    python benchmarks/experts.py --steps gpt-oss-20b-mxfp4 qwen3-30b-a3b --output steps.json
    python benchmarks/experts.py --smoke          # tiny, on the CPU reference: checks the script
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    how_it_ran,
    random_model,
    random_prompts,
    release,
    report,
    shape_dtype,
    this_device,
)
from torch import Tensor
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import hybridgen
from hybridgen.device.timing import graph_seconds
from hybridgen.kernels.linear import experts as op
from hybridgen.kernels.linear.experts_form import DENSE, FEW_ROWS, Form, Projection
from hybridgen.kernels.linear.layout import Block
from hybridgen.kernels.read_ceiling import read_ceiling
from hybridgen.models.packed_experts import pad_rows

SILU, CLAMPED = Form("silu"), Form("clamped", interleaved=True, alpha=1.702, limit=7.0)


class Shape(NamedTuple):
    """A layer's experts."""

    name: str
    experts: int
    chosen: int
    hidden: int
    width: int
    form: Form
    kind: str = DENSE
    block: Block | None = None
    biased: bool = False


SHAPES = [
    Shape("gpt-oss-20b mxfp4", 32, 4, 2880, 2880, CLAMPED, "mxfp4", Block(1, 32), True),
    Shape("gpt-oss-20b", 32, 4, 2880, 2880, CLAMPED._replace(transposed=True), biased=True),
    Shape("qwen3-30b-a3b", 128, 8, 2048, 768, SILU),
    Shape("qwen3-30b-a3b fp8", 128, 8, 2048, 768, SILU, "fp8", Block(128, 128)),
    Shape("qwen3-30b-a3b int4", 128, 8, 2048, 768, SILU, "int4", Block(1, 128)),
]
TINY = [
    Shape("tiny", 6, 2, 64, 96, SILU),
    Shape("tiny mxfp4", 6, 2, 64, 96, CLAMPED, "mxfp4", Block(1, 32), True),
]
CHECKED_ROWS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 48, 63, 64, 200)
REPEATS = 3000
CALLS = 8
"""Of the op in a graph that is timed, each with ids of its own."""


class Weights(NamedTuple):
    """What the op gets behind the router's weights."""

    gate_up: Projection
    down: Projection
    form: Form
    kind: str
    block: Block | None

    def flat(self) -> tuple[Any, ...]:
        """As the operator takes them."""
        outputs, inputs = self.block or Block(0, 0)
        form = self.form
        return (
            *itertools.chain(self.gate_up, self.down),
            self.kind, outputs, inputs, form.transposed, form.interleaved, form.activation, form.alpha, form.limit,
        )  # fmt: skip

    def expert_bytes(self) -> int:
        """Of one expert's weights."""
        return sum(each[0].nbytes for each in (*self.gate_up, *self.down) if each is not None)


def random_weights(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Weights:
    """Random experts whose results are about as large as their inputs."""
    g = torch.Generator(device).manual_seed(seed)

    def projection(outputs: int, inputs: int) -> Projection:
        size = inputs**-0.5
        bias = None
        if shape.biased:
            bias = torch.empty(shape.experts, outputs, dtype=dtype, device=device).normal_(0, 0.1, generator=g)
        if shape.kind == DENSE:
            sizes = (inputs, outputs) if shape.form.transposed else (outputs, inputs)
            data = torch.empty(shape.experts, *sizes, dtype=dtype, device=device).normal_(0, size, generator=g)
            return Projection(data, None, None, bias)
        assert shape.block is not None
        lines, groups = shape.block.grid(outputs, inputs)
        grid = shape.experts, lines, groups
        if shape.kind == "mxfp4":
            sizes = shape.experts, outputs, inputs // 2
            data = torch.randint(0, 256, sizes, dtype=torch.uint8, device=device, generator=g)
            scales = torch.randint(119, 122, grid, dtype=torch.uint8, device=device, generator=g)
            return Projection(data, pad_rows(scales), None, bias)
        if shape.kind == "fp8":
            values = torch.empty(shape.experts, outputs, inputs, dtype=dtype, device=device).normal_(0, 1, generator=g)
            scales = torch.rand(grid, device=device, generator=g) * size + size / 2
            return Projection(values.to(torch.float8_e4m3fn), scales, None, bias)
        sizes = shape.experts, outputs, -(-inputs // 8)
        data = torch.randint(-(2**31), 2**31, sizes, dtype=torch.int32, device=device, generator=g)
        scales = ((torch.rand(grid, device=device, generator=g) + 0.5) * size / 4.6).to(dtype)
        return Projection(data, scales, None, bias)

    gate_up, down = projection(2 * shape.width, shape.hidden), projection(shape.hidden, shape.width)
    return Weights(gate_up, down, shape.form, shape.kind, shape.block)


def routed(shape: Shape, rows: int, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """States, distinct experts of each and weights that sum to 1."""
    g = torch.Generator(device).manual_seed(seed)
    x = torch.empty(rows, shape.hidden, device=device).normal_(generator=g).to(dtype)
    scores = torch.rand(rows, shape.experts, device=device, generator=g)
    values, ids = scores.topk(shape.chosen, dim=-1)
    return x, ids, (values / values.sum(-1, keepdim=True)).to(dtype)


def run(weights: Weights, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return op.experts(*given, *weights)


def poisoned(shape: Shape, rows: int, dtype: torch.dtype, device: str) -> None:
    """Leave NaN where the op's own memory is likely to be."""
    sizes = (rows, shape.hidden), (rows * shape.chosen, shape.width), (4 * rows * shape.chosen, shape.hidden)
    poison = [
        torch.full(size, torch.nan, device=device, dtype=kind) for size in sizes for kind in (dtype, torch.float32)
    ]
    del poison


def check(shape: Shape, dtype: torch.dtype, device: str, smoke: bool) -> dict[str, Any]:
    """The largest error over rows, relative to the float32 result, and whether bits are equal again and in company."""
    weights = random_weights(shape, dtype, device)
    worst, apart = 0.0, 0
    for rows in (1, 3) if smoke else CHECKED_ROWS:
        x, ids, factors = given = routed(shape, rows, dtype, device, rows)
        poisoned(shape, rows, dtype, device)
        out = run(weights, given)
        wanted = op.reference(x.float(), ids, factors.float(), *weights.flat())
        # A sum is not finite where anything was read that nobody had written.
        worst = max(worst, float((out.float() - wanted).norm() / wanted.norm()))
        if rows <= FEW_ROWS and device != "cpu":
            for row in {0, rows // 2, rows - 1}:
                alone = run(weights, (x[row : row + 1], ids[row : row + 1], factors[row : row + 1]))
                apart += not torch.equal(alone[0], out[row])
    differing = sum(unequal_repeats(shape, weights, rows, dtype, device, smoke) for rows in (1, 8, 64))
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    found = {
        "shape": shape.name,
        "largest_error": worst,
        "fits": worst < limit,
        "rows_that_differ_alone": apart,
        "repeats": 3 * REPEATS,
        "repeats_that_differ": differing,
    }
    print(
        f"check   {shape.name:20} error {worst:.2e} {'' if worst < limit else 'TOO LARGE'}, other bits alone {apart}, "
        f"again {differing}",
        flush=True,
    )
    return found


def unequal_repeats(shape: Shape, weights: Weights, rows: int, dtype: torch.dtype, device: str, smoke: bool) -> int:
    """How many of many equal calls gave other bits than the first."""
    given = routed(shape, rows, dtype, device, 77)
    first = run(weights, given).clone()
    different = torch.zeros((), dtype=torch.int64, device=device)
    if device == "cpu":
        return sum(not torch.equal(run(weights, given), first) for _ in range(2 if smoke else 20))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(10):
            different += (run(weights, given) != first).any()
    different.zero_()
    for _ in range(REPEATS // 10):
        graph.replay()
    return int(different)


def seconds(calls: Sequence[Callable[[], Any]], device: str) -> float:
    """Of one call: all of them in one CUDA graph, replayed."""

    def all_of_them() -> None:
        for call in calls:
            call()

    if device == "cpu":
        begin = time.perf_counter()
        all_of_them()
        return (time.perf_counter() - begin) / len(calls)
    return graph_seconds(all_of_them, 9, 1) / len(calls)


def run_times(
    shape: Shape, dtype: torch.dtype, device: str, rows_of: list[int], ceiling: float, smoke: bool
) -> list[dict[str, Any]]:
    """Times of the op, and of transformers' ways, at each number of rows."""
    copies = [random_weights(shape, dtype, device, seed) for seed in range(2)]
    found = []
    for rows in rows_of:
        givens = [routed(shape, rows, dtype, device, 1000 * rows + call) for call in range(2 if smoke else CALLS)]
        active = statistics.fmean(len(ids.unique()) for _, ids, _ in givens)
        size = active * copies[0].expert_bytes()
        ways: dict[str, list[Callable[[Any], Any]]] = {"op": [partial(run, weights) for weights in copies]}
        if shape.kind == DENSE and device == "cuda":
            for name in ("grouped_mm", "batched_mm") if rows <= 16 else ("grouped_mm",):
                ways[name] = [partial(call_own, own_module(shape, weights), name) for weights in copies]
        for name, way in ways.items():
            calls = [partial(way[place % 2], given) for place, given in enumerate(givens)]
            try:
                took = seconds(calls, device)
            except Exception as error:
                print(f"time    {shape.name:20} rows {rows:3} {name}: {type(error).__name__}", flush=True)
                continue
            row = {
                "shape": shape.name,
                "rows": rows,
                "way": name,
                "us": took * 1e6,
                "active_experts": active,
                "active_bytes": size,
                "percent_of_ceiling": size / took / ceiling * 100,
            }
            if name == "op" and device == "cuda":
                row["kernels_us"] = kernels(calls)
            found.append(row)
            print(
                f"time    {shape.name:20} rows {rows:3} {name:10} {row['us']:8.1f} us, {active:5.1f} experts, "
                f"{row['percent_of_ceiling']:5.1f} % of the ceiling {row.get('kernels_us', '')}",
                flush=True,
            )
    return found


def own_module(shape: Shape, weights: Weights) -> Any:
    """A module of transformers over the same weights."""
    sizes: dict[str, Any] = {"hidden_size": shape.hidden, "num_experts_per_tok": shape.chosen}
    with torch.device("meta"):
        if shape.biased:
            config: Any = GptOssConfig(intermediate_size=shape.width, num_local_experts=shape.experts, **sizes)
            module: Any = GptOssExperts(config)
        else:
            config = Qwen3MoeConfig(moe_intermediate_size=shape.width, num_experts=shape.experts, **sizes)
            module = Qwen3MoeExperts(config)
    for name, one in (("gate_up_proj", weights.gate_up), ("down_proj", weights.down)):
        setattr(module, name, torch.nn.Parameter(one.data, requires_grad=False))
        if one.bias is not None:
            setattr(module, f"{name}_bias", torch.nn.Parameter(one.bias, requires_grad=False))
    return module


def call_own(module: Any, name: str, given: tuple[Tensor, Tensor, Tensor]) -> Any:
    module.config._experts_implementation = name
    return module(*given)


def kernels(calls: Sequence[Callable[[], Any]]) -> dict[str, float]:
    """Microseconds of each kernel of a call, by the profiler; they may overlap."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            call()
        torch.cuda.synchronize()
    sums: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        sums[event.key[:24]] += event.self_device_time_total / len(calls)
    return {name: round(value, 2) for name, value in sums.items() if value > 0.2}


def sweep(shape: Shape, dtype: torch.dtype, device: str, rows_of: list[int]) -> list[dict[str, Any]]:
    """Times with other tiles for one projection at a time."""
    from hybridgen.device.launcher import device_of
    from hybridgen.kernels.linear.experts_launch import Tile, default_tile, experts_on_cuda, shape_of

    if shape.kind == "mxfp4":
        return sweep_few(shape, dtype, device, rows_of)
    copies = [random_weights(shape, dtype, device, seed) for seed in range(2)]
    block = shape.block or Block(0, 0)
    processors = device_of(copies[0].gate_up.data).processors
    shapes = [
        shape_of(copies[0].gate_up, shape.kind, shape.hidden, block, shape.form.transposed),
        shape_of(copies[0].down, shape.kind, shape.width, block, shape.form.transposed),
    ]
    usual = [
        default_tile(each, shape.chosen, False, dtype, processors, cuts=cuts)
        for each, cuts in zip(shapes, (False, True), strict=True)
    ]
    steps = {"mxfp4": (128,), "fp8": (64, 128), "int4": (128, 64)}.get(shape.kind, (64, 128))
    forms = [(64, 4), (128, 8)] if shape.kind != DENSE else [(64, 4), (128, 4), (128, 8), (32, 4)]
    found = []
    for place, name in enumerate(("gate_up", "down")):
        tiles = [usual[place]]
        for (outputs, warps), step, stages, height in itertools.product(forms, steps, (3, 4, 5, 6), (16,)):
            for splits in (1, 2, 4) if place else (1,):
                tiles.append(Tile(outputs, height, step, splits, warps, stages))
        tiles = list(dict.fromkeys(tiles))

        def pair(tile: Any, place: int = place) -> tuple[Any, Any]:
            return (tile, usual[1]) if place == 0 else (usual[0], tile)

        for rows in rows_of:
            givens = [routed(shape, rows, dtype, device, 1000 * rows + call) for call in range(CALLS)]

            def call(tile: Any, number: int, givens: Any = givens, pair: Any = pair) -> Tensor:
                return experts_on_cuda(*givens[number], *copies[number % 2].flat(), tiles=pair(tile))

            def compiled(tile: Any, call: Any = call) -> str | None:
                try:
                    call(tile, 0)
                except Exception as error:  # more shared memory than there is
                    return type(error).__name__
                return None

            with ThreadPoolExecutor(8) as pool:
                problems = dict(zip(tiles, pool.map(compiled, tiles), strict=True))
            results = sorted(
                (seconds([lambda n=n, tile=tile, call=call: call(tile, n) for n in range(CALLS)], device) * 1e6, tile)
                for tile in tiles
                if problems[tile] is None
            )
            default = next((took for took, tile in results if tile == usual[place]), None)
            found.append({"shape": shape.name, "projection": name, "rows": rows, "default": default, "times": results})
            print(
                f"sweep   {shape.name} {name} rows {rows}: default {default} {tuple(usual[place])}, best "
                + ", ".join(f"{took:.1f} {tuple(tile)}" for took, tile in results[:5]),
                flush=True,
            )
    return found


def sweep_few(shape: Shape, dtype: torch.dtype, device: str, rows_of: list[int]) -> list[dict[str, Any]]:
    """Times of the kernels for few tokens in MXFP4 with other tiles, and of the kernels for any number of tokens."""
    from hybridgen.device.launcher import device_of
    from hybridgen.kernels.linear.experts_few import FewTile, default_tile
    from hybridgen.kernels.linear.experts_launch import default_tile as any_tile
    from hybridgen.kernels.linear.experts_launch import experts_on_cuda, shape_of

    copies = [random_weights(shape, dtype, device, seed) for seed in range(2)]
    block = shape.block or Block(0, 0)
    processors = device_of(copies[0].gate_up.data).processors
    parts = (copies[0].gate_up, shape.hidden, False), (copies[0].down, shape.width, True)
    general = tuple(
        any_tile(shape_of(one, shape.kind, k, block, False), shape.chosen, False, dtype, processors, cuts=cuts)
        for one, k, cuts in parts
    )
    usual = default_tile(shape.hidden), default_tile(shape.width)
    tiles = [FewTile(warps, count, limit) for warps in (2, 4, 8) for count in (1, 2) for limit in (0, 64, 80, 96, 128)]
    tiles += [FewTile(4, 1, 168, turns, late) for turns in (2, 4) for late in (False, True)]
    variants: list[tuple[str, dict[str, Any]]] = [("general", {"tiles": general}), ("usual", {"few_tiles": usual})]
    variants += [(f"gate_up {tuple(tile)}", {"few_tiles": (tile, usual[1])}) for tile in tiles]
    variants += [(f"down {tuple(tile)}", {"few_tiles": (usual[0], tile)}) for tile in tiles]
    found = []
    for rows in rows_of:
        givens = [routed(shape, rows, dtype, device, 1000 * rows + call) for call in range(CALLS)]

        def call(options: dict[str, Any], number: int, givens: Any = givens) -> Tensor:
            return experts_on_cuda(*givens[number], *copies[number % 2].flat(), **options)

        def compiled(variant: tuple[str, dict[str, Any]], call: Any = call) -> str | None:
            try:
                call(variant[1], 0)
            except Exception as raised:  # more registers than there are
                return type(raised).__name__
            return None

        with ThreadPoolExecutor(16) as pool:
            problems = list(pool.map(compiled, variants))
        wanted = call(variants[0][1], 0).float()
        results = []
        for (name, options), problem in zip(variants, problems, strict=True):
            if problem is not None:
                print(f"sweep   {name}: {problem}", flush=True)
                continue
            error = float((call(options, 0).float() - wanted).norm() / wanted.norm())
            took = seconds([partial(call, options, n) for n in range(CALLS)], device) * 1e6
            results.append((took, name, error))
        found.append({"shape": shape.name, "rows": rows, "times": results})
        for took, name, error in results[:2] + sorted(results[2:]):
            print(f"sweep   {shape.name} rows {rows} {took:7.1f} us {name} apart {error:.1e}", flush=True)
    return found


def run_steps(names: list[str], batches: list[int], device: str) -> list[dict[str, Any]]:
    """Milliseconds of decode steps of whole models with random weights. `-mxfp4` at the end packs their experts."""
    found = []
    for name in names:
        shape, packed = name.removesuffix("-mxfp4"), name.endswith("-mxfp4")
        model = random_model(shape, shape_dtype(shape, device), device, quantised="mxfp4" if packed else None)
        release()
        mode = "graph" if device == "cpu" else "hybrid"
        options: dict[str, Any] = {"mode": mode, "decode_buckets": batches, "max_batch": max(batches)}
        options |= {"max_context": 512, "prefill_buckets": []}
        with hybridgen.Engine.load(model, **options) as engine:
            row: dict[str, Any] = {"model": name}
            for batch in batches:
                ids = random_prompts(batch, 16 if device == "cpu" else 64, model.config.vocab_size)
                took = []
                for _ in range(3):
                    outs = engine.generate(ids, max_new_tokens=4 if device == "cpu" else 100, ignore_eos=True)
                    took.append(statistics.median(out.timing.tpot() for out in outs))
                row[f"step_ms_{batch}"] = statistics.median(took[1:]) * 1e3
            print(f"steps   {row}", flush=True)
            row["how"] = how_it_ran(engine)
        found.append(row)
        del model, engine
        release()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--shapes", nargs="+", help="of " + ", ".join(shape.name for shape in SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64], help="tokens of the calls that are timed")
    parser.add_argument("--sweep", action="store_true", help="try other tiles instead")
    parser.add_argument("--steps", nargs="+", help="time whole models of these shapes instead")
    parser.add_argument("--no-check", action="store_true", help="times alone")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    device = this_device() if not args.smoke else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = TINY if args.smoke else [shape for shape in SHAPES if not args.shapes or shape.name in args.shapes]
    rows = [1, 3] if args.smoke else args.rows
    torch.manual_seed(0)
    results: dict[str, Any] = {"benchmark": "experts", "dtype": str(dtype)}
    with torch.inference_mode(False), torch.no_grad():
        ceiling = read_ceiling(torch.device(device)) or 1e9
        results["read_ceiling_gb_per_s"] = ceiling / 1e9
        if args.steps or args.smoke:
            results["steps"] = run_steps(args.steps or ["tiny-moe", "tiny-moe-mxfp4"], rows, device)
        if args.sweep:
            results["sweep"] = [row for shape in shapes for row in sweep(shape, dtype, device, rows)]
        elif not args.steps:
            if not args.no_check:
                results["checks"] = [check(shape, dtype, device, args.smoke) for shape in shapes]
            results["times"] = [
                row for shape in shapes for row in run_times(shape, dtype, device, rows, ceiling, args.smoke)
            ]
    report(results, args.output)


if __name__ == "__main__":
    main()
