"""How long does the second half of a layer with a mixture take for one token, as one op and as several?

First the op's kernels against a float32 reference, with poisoned memory, and that a chain of layers gives the same bits
again. Then times of a chain of layers with weights of their own in a CUDA graph: by several ops (norm and sums not
compiled together), and by the one op with its blocks cut in some ways.

    python benchmarks/mixtures.py [--layers 6] [--output mixtures.json]
    python benchmarks/mixtures.py --smoke          # tiny, on the CPU reference: checks the script
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import report, this_device
from experts import SHAPES, TINY, Shape, Weights, poisoned, random_weights
from torch import Tensor

from hybridgen.device.timing import graph_seconds
from hybridgen.kernels.linear import experts_one
from hybridgen.kernels.linear.experts import reference
from hybridgen.kernels.linear.experts_form import Normed, Routed, RouteForm
from hybridgen.kernels.linear.mixture import by_ops, mixture, normalised
from hybridgen.kernels.read_ceiling import read_ceiling

REPEATS = 3000
CUTS = {"6 blocks of 5 stages": (6, 5), "4 of 8": (4, 8), "3 of 11": (3, 11)}
"""Blocks of a multiprocessor, and steps that a block copies ahead."""


class Layer(NamedTuple):
    """What the op takes behind the states."""

    norm: Normed
    routed: Routed
    experts: Weights
    added: Tensor
    """What its attention gives."""

    def run(self, way: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Its result for states x."""
        return way(x, self.added, self.norm, self.routed, self.experts.gate_up, self.experts.down, self.experts.form)


def random_layer(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Layer:
    """With logits of about 1, which are well apart as a rule."""
    g = torch.Generator(device).manual_seed(seed)

    def random(*sizes: int, size: float = 1.0) -> Tensor:
        return torch.empty(sizes, device=device).normal_(0, size, generator=g).to(dtype)

    norm = Normed((1 + random(shape.hidden, size=0.1)).to(dtype), 1e-5, 0.0)
    router = random(shape.experts, shape.hidden, size=shape.hidden**-0.5)
    routed = Routed(router, random(shape.experts), shape.chosen, RouteForm(True))
    return Layer(norm, routed, random_weights(shape, dtype, device, seed), random(1, shape.hidden, size=0.1))


def error_of(layer: Layer, x: Tensor) -> float | None:
    """Of the op, relative to what experts give; None where rounding may have chosen others."""
    states = (x + layer.added).float()
    norm, routed, experts = layer.norm, layer.routed, layer.experts
    normed = normalised(states, norm)
    logits = normed @ routed.weight.float().t() + (0 if routed.bias is None else routed.bias.float())
    values, ids = logits.topk(routed.chosen + 1, dim=-1)
    if float(values[0, -2] - values[0, -1]) < 0.03:
        return None
    ids, scores = ids[:, :-1], values[:, :-1].softmax(-1)
    wanted = reference(normed, ids, scores, *experts.flat())
    found = layer.run(mixture, x).float() - states
    return float((found - wanted).norm() / wanted.norm())


def check(shape: Shape, layers: list[Layer], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The largest error of some states, and how often a chain of all layers gives other bits than at first."""
    errors = []
    for seed in range(20):
        g = torch.Generator(device).manual_seed(seed)
        x = torch.empty(1, shape.hidden, device=device).normal_(0, 0.1, generator=g).to(dtype)
        poisoned(shape, 1, dtype, device)
        error = error_of(layers[seed % len(layers)], x)
        errors += [] if error is None else [error]
    # Rounding of the states that the results are added to counts, too.
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    first, repeats, different = chain(layers, mixture, x), 0, 0
    if device == "cuda":
        count = torch.zeros((), dtype=torch.int64, device=device)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(10):
                count += (chain(layers, mixture, x) != first).any()
        count.zero_()
        for _ in range(REPEATS // 10):
            graph.replay()
        repeats, different = REPEATS, int(count)
    found = {"shape": shape.name, "tokens": len(errors), "largest_error": max(errors), "fits": max(errors) < limit}
    print(f"check   {found}, {different} of {repeats} chains with other bits", flush=True)
    return {**found, "repeats": repeats, "repeats_that_differ": different}


def chain(layers: list[Layer], way: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Each layer on what the one before gave."""
    for layer in layers:
        x = layer.run(way, x)
    return x


def times(shape: Shape, layers: list[Layer], dtype: torch.dtype, ceiling: float) -> list[dict[str, Any]]:
    """Microseconds a layer of each way."""
    from hybridgen.kernels.linear.mixture_kernels import mixture_on_cuda

    x = torch.empty(1, shape.hidden, device="cuda").normal_(0, 0.1).to(dtype)
    size = shape.chosen * layers[0].experts.expert_bytes()
    ways: dict[str, tuple[Callable[..., Any], bool, tuple[int, int] | None]] = {
        "several ops": (by_ops, False, None),
        "several ops, experts_one": (by_ops, True, None),
        **{name: (mixture_on_cuda, True, cut) for name, cut in CUTS.items()},
    }
    found = []
    usual = experts_one.RESIDENT, experts_one.STAGES
    for name, (way, one, cut) in ways.items():
        experts_one.IS_ON = one
        experts_one.RESIDENT, experts_one.STAGES = cut or usual
        try:
            took = graph_seconds(lambda way=way: chain(layers, way, x), 15, 4) / len(layers)
        except Exception as error:
            print(f"time    {name}: {type(error).__name__}: {error}", flush=True)
            continue
        row = {"shape": shape.name, "way": name, "us": took * 1e6, "percent_of_ceiling": size / took / ceiling * 100}
        print(f"time    {name:26} {row['us']:7.2f} us a layer, {row['percent_of_ceiling']:.1f} %", flush=True)
        found.append(row)
    experts_one.RESIDENT, experts_one.STAGES = usual
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    device = "cpu" if args.smoke else this_device()
    shape = TINY[1] if args.smoke else SHAPES[0]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    results: dict[str, Any] = {"benchmark": "mixtures"}
    with torch.inference_mode():
        layers = [random_layer(shape, dtype, device, seed) for seed in range(2 if args.smoke else args.layers)]
        results["checks"] = [check(shape, layers, dtype, device)]
        if device == "cuda":
            ceiling = read_ceiling(torch.device(device))
            results["read_ceiling_gb_per_s"] = ceiling / 1e9
            results["times"] = times(shape, layers, dtype, ceiling)
    report(results, args.output)


if __name__ == "__main__":
    main()
