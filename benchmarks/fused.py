"""How long is a decode step of a few rows, fused, and how near to the time that reading the weights takes?

The chain of Triton kernels on random weights of published shapes, captured in a CUDA graph: device time of replays,
against a read ceiling measured in the same run. Logits and the new cache rows are compared with the float32 reference
first. On a machine without Triton or a GPU, `--smoke` runs the reference alone.

    python benchmarks/fused.py [--models llama-3.2-1b llama-3.1-8b] [--tune 20] [--output results.json]
    python benchmarks/fused.py --smoke
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import random_decoder, release, report, shape_dtype
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.device.timing import graph_seconds
from hybridgen.fused import reference
from hybridgen.kernels.read_ceiling import read_ceiling
from hybridgen.models.decoder import Decoder

PAGE_SIZE = 64
ROWS = (1, 2, 4, 8, 16)


class Case:
    """Rows at one position with random caches."""

    def __init__(self, model: Decoder, rows: int, position: int) -> None:
        count = position // PAGE_SIZE + 1
        size = rows * count + 1, model.kv_heads, PAGE_SIZE, model.head_dim
        self.pages = tuple(
            LayerPages(*(torch.empty(size, dtype=model.dtype, device=model.device).normal_() for _ in range(2)))
            for _ in model.layers
        )
        table = torch.randperm(rows * count, device=model.device) + 1
        self.block_table = table.view(rows, count).to(torch.int32)
        self.tokens = torch.arange(rows, device=model.device) * 37 % model.vocab
        self.positions = torch.full((rows,), position, device=model.device)
        self.slots = torch.arange(rows, dtype=torch.int32, device=model.device)
        self.out = torch.full((rows, model.vocab), torch.nan, dtype=model.dtype, device=model.device)

    @property
    def args(self) -> tuple[Tensor, ...]:
        return self.tokens, self.positions, self.slots, self.block_table, self.out

    def expected(self, model: Decoder) -> Tensor:
        return reference.step(model, self.pages, self.tokens, self.positions, self.block_table)

    def kv_bytes(self, model: Decoder) -> int:
        """Keys and values that a step reads."""
        cached = int(self.positions.sum()) * model.kv_heads * model.head_dim
        return 2 * cached * len(model.layers) * model.dtype.itemsize


def time_parts(step: Any, model: Decoder, case: Case, ceiling: float) -> list[dict[str, Any]]:
    """Each projection and attention alone, over all layers: microseconds a layer, and the share of the ceiling."""
    lines = []
    rows, layers = len(case.tokens), len(model.layers)
    calls: list[tuple[str, int, int, Callable[[], Any]]] = []
    for name in ("qkv", "out", "gate_up", "down", "head"):
        features, inner, gated = step.shape(name)
        read = features * inner * (2 if gated else 1) * model.dtype.itemsize
        calls.append((name, 1 if name == "head" else layers, read, lambda name=name: step.project_all(name, rows)))
    attend = case.positions, case.slots, case.block_table
    calls.append(("attention", layers, case.kv_bytes(model) // layers, lambda: step.attend_all(*attend)))
    for name, count, read, call in calls:
        took = graph_seconds(call, calls=5) / count
        lines.append({"part": name, "rows": rows, "us": took * 1e6, "percent_of_ceiling": read / took / ceiling * 100})
        print(f"  {name:9} rows {rows:2} {took * 1e6:7.2f} us {read / took / ceiling * 100:5.1f} %", flush=True)
    return lines


def run_model(
    name: str,
    rows: Sequence[int],
    position: int,
    seconds: float,
    tiles: Mapping[str, Any] | None,
    ceiling: float,
) -> dict[str, Any]:
    from hybridgen.fused.chain.search import tune
    from hybridgen.fused.chain.step import ChainStep
    from hybridgen.fused.chain.tiles import Tile

    model = random_decoder(name, shape_dtype(name, "cuda"), "cuda", position + 1)
    floor = model.weight_bytes / ceiling
    step = ChainStep(model, tiles=tiles)
    if seconds:
        spent = time.monotonic()
        shortest = float("inf")
        tried: dict[str, int] = {}

        def keep(key: str, tile: Tile, took: float) -> None:
            nonlocal shortest
            tried[key] = tried.get(key, 0) + 1
            if took < shortest:
                shortest = took
                print(f"  {key:10} {took * 1e6:8.1f} us  {tuple(tile)}", flush=True)

        cases = {count: Case(model, count, position) for count in rows}

        def launch(count: int) -> None:
            step.attach(cases[count].pages)
            step(*cases[count].args)

        tune(step, launch, rows=rows, seconds=seconds, report=keep)
        del cases
        print(f"  tuned in {time.monotonic() - spent:.0f} s; tried {tried}", flush=True)
    parts = []
    lines = []
    for count in rows:
        case = Case(model, count, position)
        step.attach(case.pages)
        expected = case.expected(model)
        step(*case.args)
        error = float((case.out.float() - expected).norm() / expected.norm())
        first = case.out.clone()
        step(*case.args)
        repeats = torch.equal(first, case.out)
        took = graph_seconds(lambda case=case: step(*case.args), calls=20)
        if count in (1, 8):
            parts += time_parts(step, model, case, ceiling)
        read = model.weight_bytes + case.kv_bytes(model)
        lines.append(
            {
                "rows": count,
                "us": took * 1e6,
                "gb_per_s": read / took / 1e9,
                "percent_of_ceiling": read / took / ceiling * 100,
                "relative_error": error,
                "repeats": repeats,
            }
        )
        print(
            f"{name:13} rows {count:2} {took * 1e6:8.1f} us (weights {floor * 1e6:.0f}) {read / took / 1e9:6.0f} GB/s "
            f"{read / took / ceiling * 100:5.1f} %  error {error:.4f} {'' if repeats else 'NOT REPEATABLE'}",
            flush=True,
        )
    return {"model": name, "dtype": str(model.dtype), "position": position, "floor_us": floor * 1e6,
            "steps": lines, "parts": parts, "tiles": {key: list(tile) for key, tile in step.tiles.items()}}  # fmt: skip


def run_smoke() -> dict[str, Any]:
    """The reference on the CPU: that the case and the decoder fit each other."""
    model = random_decoder("tiny", torch.float32, "cpu", 80)
    lines = []
    for rows in (1, 3):
        case = Case(model, rows, 70)
        begin = time.perf_counter()
        logits = case.expected(model)
        lines.append({"rows": rows, "us": (time.perf_counter() - begin) * 1e6, "finite": bool(logits.isfinite().all())})
        print(f"tiny, reference, rows {rows}: {lines[-1]['us']:.0f} us", flush=True)
    return {"model": "tiny", "steps": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--position", type=int, default=512)
    parser.add_argument("--tune", type=float, default=0.0, metavar="SECONDS", help="tune each model's tiles first")
    parser.add_argument("--tiles", type=Path, help="JSON of tiles by model, as an earlier result has them")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    results: dict[str, Any] = {"benchmark": "fused"}
    if args.smoke:
        report(results | {"models": [run_smoke()]}, args.output)
        return
    torch.manual_seed(0)
    ceiling = read_ceiling(torch.device("cuda"))
    release()
    print(f"read ceiling {ceiling / 1e9:.0f} GB/s", flush=True)
    tiles: dict[str, Any] = {}
    if args.tiles:
        tiles = {entry["model"]: entry["tiles"] for entry in json.loads(args.tiles.read_text())["models"]}
    models = []
    for name in args.models:
        models.append(run_model(name, args.rows, args.position, args.tune, tiles.get(name), ceiling))
        release()
    report(results | {"read_ceiling_gb_per_s": ceiling / 1e9, "models": models}, args.output)


if __name__ == "__main__":
    main()
