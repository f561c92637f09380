"""How long is a decode step of one to eight columns in the persistent kernel for them, by format of the weights?

Random weights of published shapes, quantised ones as random codes with scales. Each variant is compared with the
float32 reference on exactly dequantised weights first: fresh inputs, stale words of the step before, unwritten places
of the cache that are no numbers; requests of one token, one request of several, and a mix. Then one fixed step is
repeated in a CUDA graph and all logits are compared bit for bit on the device, with steps of fewer columns in between.
Then replays are timed, against a read ceiling measured in the same run.

With `--context` also the tokens of one request behind so many positions: first the bits of four tokens in one step
against four steps of one, and 500 repeats, then times of 1, 4 and 8. "Turned" has the tokens in the reverse order: then
their units do not stand side by side, and each token reads the context anew.

    python benchmarks/rows.py [--models llama-3.2-1b llama-3.1-8b] [--formats bf16 fp8 int4] [--output results.json]
    python benchmarks/rows.py --smoke
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import random_decoder, release, report, shape_dtype
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.fused import reference
from hybridgen.fused.rows.formats import PROJECTIONS, formats_of, stored
from hybridgen.kernels.attention.reference import as_bytes
from hybridgen.kernels.linear.layout import Block
from hybridgen.models.decoder import Decoder, DecoderLayer, Linear
from hybridgen.models.quantised import QuantisedWeight

PAGE_SIZE = 64
ROOM = 1024
"""Positions of each request."""
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclasses.dataclass(frozen=True)
class Form:
    """How weights are stored."""

    layers: str
    """The kind of the projections; empty: 16 bits."""
    head: str
    """The same of the head, with a scale for each output."""
    group: int = 0
    """Inputs that share a scale; 0: all of an output."""
    outputs: int = 1
    """Outputs that share one."""
    zeros: bool = False
    attention: str | None = None
    """The kind of the projections of attention, where it is another."""
    ends: str | None = None
    """The kind of the first layer and, of more than two, of the last one, where it is another."""


FORMATS = {
    "bf16": Form("", ""),
    "fp16": Form("", ""),
    "fp8": Form("fp8", "fp8"),
    "fp8-head16": Form("fp8", ""),
    "fp8-blocks": Form("fp8", "fp8", group=128, outputs=128),
    "int8": Form("int8", "int8"),
    "int8-g128": Form("int8", "fp8", group=128),
    "int4": Form("int4", "fp8", group=128),
    "int4-zeros": Form("int4", "fp8", group=128, zeros=True),
    "int4-g64": Form("int4", "fp8", group=64),
    "int4-g32": Form("int4", "fp8", group=32),
    "int4-head16": Form("int4", "", group=128),
    "int4-mixed": Form("int4", "fp8", group=128, ends=""),
    "int4-fp8": Form("int4", "fp8", group=128, attention="fp8"),
    "int4-fp8-mixed": Form("int4", "fp8", group=128, attention="fp8", ends=""),
    "fp8-mixed": Form("fp8", "fp8", ends=""),
    "mxfp4": Form("mxfp4", "fp8", group=32),
    "mxfp4-mixed": Form("mxfp4", "fp8", group=32, ends=""),
}
"""`mixed` ones have 16 bits in the first and the last layer."""


def quantised(linear: Linear, kind: str, form: Form) -> Linear:
    """A weight of the same shape with random codes; without a kind the weight itself."""
    if not kind:
        return linear
    outputs, inputs = linear.weight.shape
    device, dtype = next(iter(linear.weight.tensors().values())).device, linear.weight.format.dtype
    groups = kind == form.layers and form.group
    block = Block(form.outputs, groups or inputs)
    if kind == "fp8":
        data, size = torch.empty(outputs, inputs, device=device).normal_(0, 64).to(torch.float8_e4m3fn), 64.0
    elif kind == "int8":
        data, size = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8), 73.0
    elif kind == "mxfp4":
        data, size = torch.randint(0, 256, (outputs, inputs // 2), device=device, dtype=torch.uint8), 2.9
    else:
        # Codes 1 to 15 stand for -7 to 7. With 0 (-8) among them the mean would not be zero: all outputs would share a
        # large part, attention would choose between nearly equal scores of neighbours, and the check would tell little.
        data, size = torch.zeros(outputs, inputs // 8, dtype=torch.int32, device=device), 4.7
        for shift in range(0, 32, 4):
            data |= torch.randint(1, 16, data.shape, device=device, dtype=torch.int32) << shift
    scales = (torch.rand(block.grid(outputs, inputs), device=device) * 0.5 + 0.75) / (size * inputs**0.5)
    zeros = torch.randint(7, 10, scales.shape, device=device, dtype=torch.uint8) if form.zeros else None
    if kind == "mxfp4":
        scales = (127 + scales.log2() + torch.rand_like(scales)).round().to(torch.uint8)
    elif kind != "fp8":
        scales = scales.to(dtype)
    return Linear(QuantisedWeight(kind, data, scales, zeros, inputs, block, dtype), linear.bias)


def in_format(model: Decoder, name: str) -> Decoder:
    """The model with its projections in a format."""
    form = FORMATS[name]

    def kind(index: int, name: str) -> str:
        last = len(model.layers) - 1
        if form.ends is not None and index in (0, last if last > 1 else 0):
            return form.ends
        return form.layers if form.attention is None or name in ("gate_up", "down") else form.attention

    def layer(index: int, of: DecoderLayer) -> DecoderLayer:
        parts = {each: getattr(of, each) for each in PROJECTIONS}
        new = {each: quantised(part, kind(index, each), form) for each, part in parts.items()}
        return dataclasses.replace(of, **new)

    head = quantised(model.head, form.head, Form("", ""))
    return dataclasses.replace(model, layers=tuple(layer(*each) for each in enumerate(model.layers)), head=head)


class Cache:
    """Pages of eight requests, and steps of columns over them."""

    def __init__(self, model: Decoder, dtype: torch.dtype | None = None) -> None:
        """`dtype`: of keys and values; None: the model's."""
        self.model, device = model, model.device
        count = ROOM // PAGE_SIZE
        size = 8 * count + 1, model.kv_heads, PAGE_SIZE, model.head_dim
        self.pages = tuple(
            LayerPages(*(torch.empty(size, dtype=dtype or model.dtype, device=device) for _ in range(2)))
            for _ in model.layers
        )
        self.block_table = (torch.randperm(8 * count, device=device) + 1).view(8, count).to(torch.int32)
        self.ids = torch.zeros(8, dtype=torch.int64, device=device)
        self.positions = torch.zeros(8, dtype=torch.int64, device=device)
        self.slots = torch.zeros(8, dtype=torch.int32, device=device)

    def fill(self, columns: list[tuple[int, int]], numbers: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """New keys and values before each column's request, and none behind; the inputs of a step.

        Args:
            numbers: places behind are numbers, too: the step will be timed at other positions.
        """
        lengths: dict[int, int] = {}
        for slot, position in columns:
            lengths[slot] = min(position, lengths.get(slot, position))
        for part in (part for layer in self.pages for part in layer):
            bits = as_bytes(part)
            none = torch.nan if bits is part else 0x7F
            bits.copy_(as_bytes(torch.randn(part.shape, dtype=self.model.dtype, device=part.device).to(part.dtype)))
            if numbers:
                continue
            bits[0] = none
            for slot in range(8):
                length = lengths.get(slot, 0)
                pages = self.block_table[slot].long()
                bits[pages[-(-length // PAGE_SIZE) :]] = none
                if length % PAGE_SIZE:
                    bits[pages[length // PAGE_SIZE], :, length % PAGE_SIZE :] = none
        n = len(columns)
        self.ids[:n] = torch.randint(0, self.model.vocab, (n,), device=self.ids.device)
        self.slots[:n] = torch.tensor([slot for slot, _ in columns], device=self.ids.device)
        self.positions[:n] = torch.tensor([position for _, position in columns], device=self.ids.device)
        return self.ids[:n], self.positions[:n], self.slots[:n]


CASES = {
    "eight rows": [(row, (37 * row + 61) % 700) for row in range(8)],
    "three rows": [(5, 0), (2, 64), (7, 901)],
    "one row": [(3, 511)],
    "five tokens of one": [(4, position) for position in range(126, 131)],
    "eight tokens of one": [(1, position) for position in range(700, 708)],
    "a mix": [(6, 300), (6, 301), (6, 302), (0, 63), (2, 0), (2, 1), (5, 640)],
}


def poison(step: Any, model: Decoder) -> None:
    """Stale words: the numbers of the last write, with values that would show."""
    words = [stored(getattr(layer, name)) for layer in model.layers for name in PROJECTIONS]
    for name, part in step.parts.items():
        read = [stored(model.head)] if name == "last" else words
        half = model.dtype is torch.float16 or any(weight.format.bits < 16 for weight in read)
        mask, value = (0x00010001, 0x7BFE7BFE) if half else (0x20002000, 0x5F005F00)
        if name == "qkv" or "squares" in name:
            mask, value = 0xFF, 0x7FC00000
        part.bitwise_and_(mask).bitwise_or_(value & ~mask)
    step.logits.fill_(torch.nan)


def last_bits(ours: Tensor, theirs: Tensor) -> Tensor:
    """Whether codes of e4m3 are the same, or neighbours."""

    def order(codes: Tensor) -> Tensor:
        bits = as_bytes(codes).int()
        return torch.where(bits > 127, 128 - bits, bits)

    return (order(ours) - order(theirs)).abs() <= 1


@contextmanager
def rounded_as(cache: Cache, inputs: tuple[Tensor, Tensor, Tensor]) -> Iterator[None]:
    """With keys and values in 8 bits the reference goes on with the step's own codes, where these are the nearest or
    their neighbours. A last bit is 6 to 12 % there, and a number between two codes may become either: a token that
    sees few others has that in its logits. Other codes stay the reference's, so that they show."""
    if cache.pages[0].keys.element_size() > 1:
        yield
        return
    (_, positions, slots), layers, project = inputs, iter(cache.pages), reference.queries_keys_values
    pages, places = cache.block_table[slots.long(), positions // PAGE_SIZE].long(), positions % PAGE_SIZE

    def followed(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        queries, *new = project(*args)
        for i, part in enumerate(next(layers)):
            written = as_bytes(part)[pages, :, places].view(part.dtype)
            nearest = new[i].to(part.dtype)
            new[i] = torch.where(last_bits(written, nearest), written.float(), new[i])
        return queries, *new

    reference.queries_keys_values = followed
    try:
        yield
    finally:
        reference.queries_keys_values = project


def check(step: Any, cache: Cache) -> dict[str, float]:
    """Relative error of the logits of each case; the new cache rows are compared, too."""
    errors = {}
    for name, columns in CASES.items():
        inputs = cache.fill(columns)
        ids, positions, slots = inputs
        pages = tuple(LayerPages(layer.keys.clone(), layer.values.clone()) for layer in cache.pages)
        poison(step, cache.model)
        logits = step(*inputs)
        torch.cuda.synchronize()
        with rounded_as(cache, inputs):
            expected = reference.step(cache.model, pages, ids, positions, cache.block_table[slots.long()])
        worst = float(((logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
        for ours, theirs in zip(cache.pages, pages, strict=True):
            for actual, wanted in zip(ours, theirs, strict=True):
                actual, wanted = actual.float(), wanted.float()
                written = ~wanted.isnan()
                if not torch.equal(actual.isnan(), ~written):
                    worst = float("nan")
                off = (actual - wanted)[written].norm() / wanted[written].norm()
                worst = max(worst, float(off)) if worst == worst else worst
        errors[name] = float("nan") if step.faulted else worst
    return errors


def repeat(step: Any, cache: Cache, times: int, case: str = "eight rows") -> dict[str, int]:
    """Replays of one fixed step whose logits were not those of the first, bit for bit."""
    inputs = cache.fill(CASES[case], numbers=True)
    step(*inputs)
    first = step.logits.clone().view(torch.int16)
    count = min(3, len(inputs[0]))
    few = cache.ids[:count], cache.positions[:count], cache.slots[:count]
    different = torch.zeros(1, dtype=torch.int64, device=first.device)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    with torch.cuda.graph(graphs[0]):
        step(*inputs)
        different += (step.logits.view(torch.int16) != first).any()
    with torch.cuda.graph(graphs[1]):
        step(*few)
        different += (step.logits[:count].view(torch.int16) != first[:count]).any()
    different.zero_()
    for index in range(times):
        graphs[index % 5 == 4].replay()
    torch.cuda.synchronize()
    return {"steps": times, "different": int(different), "gave_up": int(step.faulted)}


def timed(step: Any, cache: Cache, columns: list[int], positions: list[int], ceiling: float) -> list[dict[str, Any]]:
    from hybridgen.device.timing import graph_seconds

    model, lines = cache.model, []
    cache.fill([(row, 0) for row in range(8)], numbers=True)
    for position in positions:
        for count in columns:
            cache.positions.fill_(position)
            inputs = cache.ids[:count], cache.positions[:count], cache.slots[:count]
            took = graph_seconds(lambda inputs=inputs: step(*inputs), calls=20)
            read = (
                2
                * count
                * position
                * model.kv_heads
                * model.head_dim
                * len(model.layers)
                * cache.pages[0].keys.element_size()
            )
            share = (model.weight_bytes + read) / took / ceiling
            lines.append({"columns": count, "position": position, "us": took * 1e6, "of_ceiling": share})
    cache.positions.copy_(torch.arange(512, 520))
    cache.slots.zero_()
    inputs = cache.ids[:4], cache.positions[:4], cache.slots[:4]
    took = graph_seconds(lambda: step(*inputs), calls=20)
    lines.append({"columns": 4, "position": 512, "us": took * 1e6, "one_request": True})
    return lines


def behind(model: Decoder, context: int, cached: torch.dtype | None) -> list[dict[str, Any]]:
    """Tokens of one request behind a long context."""
    from hybridgen.device.timing import graph_seconds
    from hybridgen.fused.rows.step import RowsStep

    device, count = model.device, (context + 8) // PAGE_SIZE + 1
    size = count + 1, model.kv_heads, PAGE_SIZE, model.head_dim
    pages = tuple(
        LayerPages(*(torch.randn(size, dtype=model.dtype, device=device).to(cached or model.dtype) for _ in range(2)))
        for _ in model.layers
    )
    table = (torch.randperm(count, device=device) + 1).view(1, count).to(torch.int32)
    step = RowsStep(model, pages, block_table=table)
    torch.cuda.synchronize()
    ids = torch.randint(0, model.vocab, (8,), device=device)
    positions = torch.arange(context, context + 8, device=device)
    slots = torch.zeros(8, dtype=torch.int32, device=device)
    alone = torch.stack([step(ids[i : i + 1], positions[i : i + 1], slots[:1])[0].clone() for i in range(4)])
    together = step(ids[:4], positions[:4], slots[:4]).clone()
    different = torch.zeros(1, dtype=torch.int64, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        different += (step(ids[:4], positions[:4], slots[:4]).view(torch.int16) != together.view(torch.int16)).any()
    different.zero_()
    for _ in range(500):
        graph.replay()
    torch.cuda.synchronize()
    check = {"equal_to_single_steps": torch.equal(alone, together), "different": int(different), "steps": 500}
    lines = [{"context": context, "tokens": 4, **check}]
    for tokens in (1, 4, 8):
        for turned in (False, True)[: 1 + (tokens > 1)]:
            which = torch.arange(tokens, device=device)
            which = which.flip(0) if turned else which
            inputs = ids[which], positions[which], slots[:tokens]
            took = graph_seconds(lambda inputs=inputs: step(*inputs), calls=5)
            lines.append({"context": context, "tokens": tokens, "turned": turned, "us": took * 1e6})
    for line in lines:
        print(f"    {line}", flush=True)
    step.kernel.close()
    return lines


@dataclasses.dataclass
class Variant:
    """A kernel for a model, and what was found of it."""

    cache: Cache
    step: Future[Any]
    line: dict[str, Any]
    first: bool
    """Whether it has the default tuning."""


def variants(
    name: str,
    form: str,
    tunings: list[dict[str, int]],
    half: bool,
    layers: int | None,
    cached: torch.dtype | None,
    room: int,
    pool: ThreadPoolExecutor,
) -> list[Variant]:
    """The kernels of a model for contexts of up to `room` positions; they are compiled meanwhile."""
    from hybridgen.fused.rows.shape import default_tuning
    from hybridgen.fused.rows.step import RowsStep

    dtype = torch.float16 if half or form == "fp16" else shape_dtype(name, "cuda")
    model = in_format(random_decoder(name, dtype, "cuda", room, layers=layers), form)
    release()
    cache = Cache(model, cached)
    torch.cuda.synchronize()

    def make(changes: dict[str, int]) -> Any:
        tuning = dataclasses.replace(default_tuning(model), **changes)
        step = RowsStep(model, cache.pages, block_table=cache.block_table, tuning=tuning)
        torch.cuda.synchronize()
        return step

    line = {"model": name, "layers": len(model.layers), "format": form, "dtype": str(dtype)}
    return [Variant(cache, pool.submit(make, each), dict(line), not index) for index, each in enumerate(tunings)]


def try_out(variant: Variant, times: int) -> None:
    """Compare with the reference, and repeat."""
    begin, line = time.monotonic(), variant.line
    try:
        step = variant.step.result()
        line["tuning"] = dataclasses.asdict(step.tuning)
        line |= {n.lower(): step.kernel.attribute(n) for n in ("NUM_REGS", "LOCAL_SIZE_BYTES")}
        line["errors"] = check(step, variant.cache)
        line["ok"] = all(error < TOLERANCE[variant.cache.model.dtype] for error in line["errors"].values())
        if line["ok"]:
            times = times if variant.first else times // 10
            line["repeats"] = repeat(step, variant.cache, times)
            line["repeats_of_other_columns"] = {
                case: repeat(step, variant.cache, times, case) for case in ("one row", "eight tokens of one", "a mix")
            }
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"[:500]
    errors = {case: round(error, 4) for case, error in line.get("errors", {}).items()}
    sizes = [line.get(each) for each in ("model", "format", "tuning", "num_regs", "local_size_bytes", "error")]
    print(*sizes, "ok" if line.get("ok") else "WRONG", errors, flush=True)
    several = {"eight rows": line.get("repeats"), **line.get("repeats_of_other_columns", {})}
    print(f"    {several} {time.monotonic() - begin:.1f} s", flush=True)


def smoke() -> list[Any]:
    """What the kernel would be compiled with, and the reference on quantised weights; on any machine."""
    from hybridgen.fused.rows.shape import default_tuning, shape_of

    lines = []
    for form in FORMATS:
        model = random_decoder("small", torch.bfloat16, "cpu", 80)
        model = in_format(dataclasses.replace(model, layers=model.layers * 3), form)
        weights = [[stored(getattr(layer, name)) for name in PROJECTIONS] for layer in model.layers]
        layers = formats_of(weights)
        shape = shape_of(
            model, layers, stored(model.head).format, default_tuning(model), page_size=PAGE_SIZE, blocks=132,
            shared_memory=227 * 1024,
        )  # fmt: skip
        lines.append({"format": form, "weight_bytes": model.weight_bytes, "stages": shape.defines["STAGES"]})
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--layers", type=int, help="only so many of each model")
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8", "int4"], choices=FORMATS)
    parser.add_argument("--columns", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--positions", nargs="+", type=int, default=[64, 512])
    parser.add_argument(
        "--repeats", type=int, default=10_000, help="of four fixed steps each; a tenth for other tunings"
    )
    parser.add_argument("--tunings", nargs="*", default=[], help="others to try, for example piece=1024,in_flight=3")
    parser.add_argument("--context", nargs="*", type=int, default=[], help="tokens of one request behind so many")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so long")
    parser.add_argument("--half", action="store_true", help="float16 models")
    parser.add_argument("--cache-fp8", action="store_true", help="keys and values in 8 bits")
    parser.add_argument("--smoke", action="store_true", help="plans only, on any machine")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    results: dict[str, Any] = {"benchmark": "rows"}
    if args.smoke:
        report(results | {"plans": smoke()}, args.output)
        return
    from hybridgen.kernels.read_ceiling import read_ceiling

    begin = time.monotonic()
    torch.manual_seed(0)
    ceiling = read_ceiling(torch.device("cuda"))
    release()
    print(f"read ceiling {ceiling / 1e9:.0f} GB/s", flush=True)
    results["read_ceiling_gb_per_s"] = ceiling / 1e9
    others = [{k: int(v) for k, v in (pair.split("=") for pair in text.split(","))} for text in args.tunings]
    cached = torch.float8_e4m3fn if args.cache_fp8 else None
    results["cache"] = "fp8" if args.cache_fp8 else "16 bits"
    found: list[Variant] = []
    room = max([ROOM, *(context + 16 for context in args.context)])
    with ThreadPoolExecutor(12) as pool:
        for name in args.models:
            for form in args.formats:
                found += variants(name, form, [{}, *others], args.half, args.layers, cached, room, pool)
        wait([variant.step for variant in found])  # loading a kernel disturbs a graph that is being recorded
        for variant in found:
            if time.monotonic() - begin < args.seconds:
                try_out(variant, args.repeats)
    lines = results["variants"] = [variant.line for variant in found]
    good = [variant for variant in found if variant.line.get("ok")]
    for variant in sorted(good, key=lambda each: not each.first):
        if time.monotonic() - begin > args.seconds:
            break
        columns, positions = (args.columns, args.positions) if variant.first else (args.columns[-1:], [512])
        variant.line["times"] = timed(variant.step.result(), variant.cache, columns, positions, ceiling)
        print(variant.line["model"], variant.line["format"], variant.line["tuning"])
        for each in variant.line["times"]:
            print(f"    {each}", flush=True)
    for variant in good:
        for context in args.context if variant.first else ():
            if time.monotonic() - begin < args.seconds:
                print(variant.line["model"], variant.line["format"], flush=True)
                variant.line.setdefault("behind", []).extend(behind(variant.cache.model, context, cached))
                release()
    report(results, args.output)
    found_different = [
        each["different"] or each["gave_up"]
        for line in lines
        if line.get("ok")
        for each in (line["repeats"], *line["repeats_of_other_columns"].values())
    ]
    if any(found_different) or not all(line.get("ok") for line in lines):
        raise SystemExit("a variant was not run, computes something else, or not the same each time")


if __name__ == "__main__":
    main()
