"""Does a fixed call of a kernel give the same bits thousands of times?

A race between a kernel's threads shows in few calls of thousands. Each call runs again and again in a CUDA graph, into
new memory, and every bit of what it gives is compared with the first call's: products with quantised weights by format
and rows, those in 16 bits by cublasLt, experts in MXFP4, decode attention over keys and values in 8 bits with and
without the step's own, attention by a schedule, the projections of a few rows, routers, the choice of tokens, and whole
steps of the persistent kernel for one row and of the chain (those of the kernel for several columns are in `rows.py`).

    python benchmarks/repeats.py [--times 3000] [--only experts attention] [--output repeats.json]
    python benchmarks/repeats.py --smoke          # twice, tiny, on the CPU: checks the script
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attention
import experts
import fused
import quantised
import ragged_steps
import sampling
import torch
from common import provenance, random_decoder, release, this_device, write
from torch import Tensor

from hybridgen.execution.products import by_cublaslt
from hybridgen.kernels.attention.ops import Options, decode_attention
from hybridgen.kernels.linear.experts_form import RouteForm
from hybridgen.kernels.linear.route import route
from hybridgen.kernels.step.linear import few_rows
from hybridgen.models.decoder import Decoder

KINDS = (
    "products",
    "cublaslt",
    "experts",
    "attention",
    "scheduled",
    "projections",
    "routers",
    "tokens",
    "one row",
    "chain",
)
_IN_A_GRAPH = 10

Call = Callable[[], Tensor | tuple[Tensor, ...]]


def products(device: str, dtype: torch.dtype, smoke: bool) -> Iterator[tuple[str, Call]]:
    shapes = [quantised.Shape("tiny", 96, 256)] if smoke else [quantised.SHAPES[0], quantised.SHAPES[3]]
    for shape in shapes:
        for name in quantised.FORMATS:
            weight = quantised.weight_of(name, shape, device, dtype)
            for rows in (1, 8, 64):
                x = torch.randn(rows, shape.inputs, device=device).to(dtype)
                yield f"{shape.name} {name}, {rows} rows", partial(quantised.product, weight, x)


def cublaslt(device: str, dtype: torch.dtype, smoke: bool) -> Iterator[tuple[str, Call]]:
    """Products as steps have them that multiply by cublasLt; a CPU has one library."""

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        with nullcontext() if device == "cpu" else by_cublaslt():
            return torch.mm(x, weight.t())

    shapes = [quantised.Shape("tiny", 96, 256)] if smoke else [quantised.SHAPES[0], quantised.SHAPES[3]]
    for shape in shapes:
        weight = torch.randn(shape.outputs, shape.inputs, device=device).to(dtype)
        for rows in (24, 32, 56, 64, 96, 128, 160, 192, 208):
            x = torch.randn(rows, shape.inputs, device=device).to(dtype)
            yield f"{shape.name}, {rows} rows", partial(multiply, x, weight)


def chosen_experts(device: str, dtype: torch.dtype, smoke: bool) -> Iterator[tuple[str, Call]]:
    for shape in experts.TINY if smoke else experts.SHAPES[:1]:
        weights = experts.random_weights(shape, dtype, device)
        for rows in (1, 2, 8, 9, 64):
            given = experts.routed(shape, rows, dtype, device, rows)
            yield f"{shape.name}, {rows} tokens", partial(experts.run, weights, given)


def decode(device: str, dtype: torch.dtype, smoke: bool) -> Iterator[tuple[str, Call]]:
    shapes = [attention.Shape("tiny", 4, 2, 16)] if smoke else attention.SHAPES
    for shape in shapes:
        for batch, context in [(3, 40)] if smoke else [(1, 32768), (8, 1000), (8, 32768), (64, 4096)]:
            case = attention.in_8_bits(attention.decode_case(shape, [context] * batch, device, dtype, 1))
            options = Options(shape.dim**-0.5)
            new = {name: torch.randn(batch, shape.kv_heads, shape.dim, device=device).to(dtype) for name in ("k", "v")}
            places = attention.places_of(case, 0)
            name = f"{shape.name} fp8, {batch} rows of {context}"
            yield name, partial(decode_attention, case.q[0], places, options)
            yield f"{name}, with the step's own", partial(decode_attention, case.q[0], places, options, **new)


def scheduled(device: str, dtype: torch.dtype, smoke: bool) -> Iterator[tuple[str, Call]]:
    """Attention by a schedule, which is written anew in each call: as steps do it, and by Triton's kernels. One row has
    several chunks whatever the others have."""
    if smoke:
        return  # `ragged.py --smoke` runs it, in Triton's interpreter
    for shape in ragged_steps.SHAPES:
        for rows in (24, 64, 256):
            lengths = [9000, *ragged_steps.ragged(rows - 1)]
            step = ragged_steps.make_step(shape, lengths, 1, 9000 // shape.page + 1, device, dtype)
            for sinks in (None, torch.randn(shape.heads, device=device, dtype=dtype)):
                for tune in (None, ragged_steps.usual(shape)):

                    def call(step: ragged_steps.Step = step, tune: Any = tune, sinks: Tensor | None = sinks) -> Tensor:
                        plan = ragged_steps.room(step, tune)
                        ragged_steps.write(step, plan, tune)
                        return ragged_steps.scheduled(step, 0, plan, tune, sinks=sinks)

                    how = ", sinks" * (sinks is not None) + ", Triton" * (tune is not None)
                    yield f"{shape.name}, {rows} rows{how}", call


def projections(device: str, dtype: torch.dtype, smoke: bool) -> Iterator[tuple[str, Call]]:
    for outputs, inputs in ((6, 24),) if smoke else ((5120, 2880), (2880, 4096), (4096, 14336)):
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        for rows in (1, 4):
            x = torch.randn(rows, inputs, device=device).to(dtype)
            yield f"{outputs} x {inputs}, {rows} rows", partial(few_rows, x, weight)


def routers(device: str, dtype: torch.dtype, smoke: bool) -> Iterator[tuple[str, Call]]:
    for count, inputs in ((5, 24),) if smoke else ((32, 2880), (128, 2048)):
        weight = torch.randn(count, inputs, device=device).to(dtype)
        for rows in (1, 64):
            x = torch.randn(rows, inputs, device=device).to(dtype)
            yield f"{count} x {inputs}, {rows} rows", partial(route, x, weight, None, 4, RouteForm(True))


def tokens(device: str, dtype: torch.dtype, smoke: bool) -> Iterator[tuple[str, Call]]:
    """Choosing a token for each row, with every kind of filter."""
    for kind in ("flat", "peaked"):
        for rows in (2,) if smoke else (1, 64, 256):
            logits = sampling.make_logits(kind, rows, 500 if smoke else 128256, dtype, device)
            for case in sampling.CASES:
                yield f"{kind}, {case}, {rows} rows", sampling.ways(case, logits)["op"]


SHAPES = ("llama-3.2-1b", "qwen3-0.6b", "llama-3.1-8b")


def decoders(
    smoke: bool, dtypes: tuple[torch.dtype, ...], device: str, shapes: Sequence[str]
) -> Iterator[tuple[str, Decoder]]:
    for name in ("tiny",) if smoke else shapes:
        for dtype in dtypes[: 1 if smoke or name == SHAPES[-1] else None]:
            yield f"{name} {str(dtype).removeprefix('torch.')}", random_decoder(name, dtype, device, 5000)
            release()


def one_row(device: str, dtype: torch.dtype, smoke: bool, shapes: Sequence[str] = SHAPES) -> Iterator[tuple[str, Call]]:
    """The short way of attention, and the long one."""
    for name, model in decoders(smoke, (dtype, torch.float16), device, shapes):
        for position in (40,) if smoke else (512, 4900):
            case = fused.Case(model, 1, position)
            if smoke:
                yield name, partial(case.expected, model)
                continue
            from hybridgen.fused.persistent.step import PersistentStep

            state = torch.stack([case.tokens, case.positions, torch.zeros_like(case.positions)])
            rows = case.slots.long()
            step = PersistentStep(model, case.pages, rows=rows, state=state, block_table=case.block_table)
            torch.cuda.synchronize()
            yield f"{name}, position {position}", step
            step.kernel.close()


def chain(device: str, dtype: torch.dtype, smoke: bool, shapes: Sequence[str] = SHAPES) -> Iterator[tuple[str, Call]]:
    for name, model in decoders(smoke, (dtype,), device, shapes):
        for rows in (2,) if smoke else (2, 8, 16):
            case = fused.Case(model, rows, 40 if smoke else 512)
            if smoke:
                yield name, partial(case.expected, model)
                continue
            from hybridgen.fused.chain.step import ChainStep

            step = ChainStep(model)
            step.attach(case.pages)

            def call(step: Any = step, case: fused.Case = case) -> Tensor:
                step(*case.args)
                return case.out

            yield f"{name}, {rows} rows", call


CASES = dict(
    zip(
        KINDS,
        (products, cublaslt, chosen_experts, decode, scheduled, projections, routers, tokens, one_row, chain),
        strict=True,
    )
)


def bits(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def unequal(call: Call, times: int, device: str) -> tuple[int, int]:
    """How many calls there were, and how many gave other bits than the first."""
    first = [each.clone() for each in bits(call())]
    if device == "cpu":
        found = [bits(call()) for _ in range(2)]
        return 2, sum(not all(map(torch.equal, first, each)) for each in found)
    different = torch.zeros((), dtype=torch.int64, device=device)

    def compared() -> None:
        other = torch.zeros((), dtype=torch.bool, device=device)
        for one, again in zip(first, bits(call()), strict=True):
            other |= (one != again).any()
        different.add_(other)

    compared()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_IN_A_GRAPH):
            compared()
    different.zero_()
    rounds = -(-times // _IN_A_GRAPH)
    for _ in range(rounds):
        graph.replay()
    return rounds * _IN_A_GRAPH, int(different)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3000, help="calls of each case, at least")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=SHAPES, help='of "one row" and "chain"')
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    device = "cpu" if args.smoke else this_device()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    results = {"provenance": provenance(), "benchmark": "repeats", "calls": 0, "other_bits": 0, "rows": rows}
    with torch.inference_mode(False), torch.no_grad():
        for kind in args.only:
            shapes = {"shapes": args.models} if kind in ("one row", "chain") else {}
            for name, call in CASES[kind](device, dtype, args.smoke, **shapes):
                calls, different = unequal(call, args.times, device)
                rows.append({"kind": kind, "case": name, "calls": calls, "other_bits": different})
                print(f"{kind:<12} {name:<60} {calls} calls, {different} with other bits", flush=True)
                results["calls"] += calls
                results["other_bits"] += different
                write(results, args.output)  # what was found stays if the rest is cut off
    print(json.dumps(results))


if __name__ == "__main__":
    main()
