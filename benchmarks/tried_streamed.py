"""Decode attention by `streamed.cu` beside what is used: checks, then times. On the way; not kept."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import ragged
import torch
from common import provenance, write
from ragged import SHAPES, Shape, Step, make_step

from hybridgen.device.launcher import device_of
from hybridgen.device.timing import graph_seconds
from hybridgen.kernels.attention import reference, streamed
from hybridgen.kernels.attention.balanced import Tuning, shares_of
from hybridgen.kernels.attention.common import heads_of
from hybridgen.kernels.attention.streamed import Form
from hybridgen.kernels.read_ceiling import read_ceiling


def heads_for(shape: Shape):
    return heads_of(shape.heads, shape.kv_heads, shape.dim, shape.dim, shape.page, 2)


class Streamed:
    def __init__(
        self,
        shape: Shape,
        step: Step,
        form: Form,
        chunk: int,
        window=0,
        chunked=0,
        softcap=0.0,
        sinks=None,
        append=True,
    ):
        self.shape, self.step, self.form = shape, step, form
        self.tune = Tuning(64, 4, 3, form.resident, chunk, False)
        self.window, self.chunked, self.softcap, self.sinks, self.append = window, chunked, softcap, sinks, append
        self.heads = heads_for(shape)
        rows, columns = len(step.positions), step.block_table.shape[1]
        self.plan = ragged.room(step, self.tune, window, chunked)
        self.shares = shares_of(self.heads, rows, columns, window, chunked, device_of(step.q), self.tune)
        kinds = None if sinks is None else sinks.dtype, step.slots.dtype, step.positions.dtype
        device = device_of(step.q)
        self.stream = streamed.stream_of(self.heads, step.q.dtype, kinds, softcap > 0, append, device, form)
        assert self.stream is not None
        self.counters = torch.zeros(rows * shape.kv_heads, dtype=torch.int32, device="cuda")

    def schedule(self) -> None:
        ragged.write(self.step, self.plan, self.tune, self.window, self.chunked)

    def __call__(self, layer: int) -> torch.Tensor:
        step, shares = self.step, self.shares
        q = step.q[layer]
        tokens = q.shape[0]
        out = torch.empty((tokens, self.shape.heads, self.shape.dim), dtype=q.dtype, device="cuda")
        lines = tokens * shares.row_chunks * self.shape.heads
        partial = torch.empty(lines * (self.shape.dim + 1), dtype=torch.float32, device="cuda")
        where = step.block_table, step.slots, step.positions
        pages = step.k_pages[layer], step.v_pages[layer]
        rest = *pages, self.plan, *where, self.sinks, out, partial, self.counters
        capacity = tokens * shares.row_tiles(step.block_table.shape[1])
        numbers = self.shape.dim**-0.5, self.softcap, capacity, tokens * shares.row_chunks, shares.parts
        self.stream(q, step.k[layer], step.v[layer], rest, lines * self.shape.dim, *numbers)
        return out


def check(
    shape: Shape, form: Form, chunk: int, options: dict[str, Any], rows: int, seed: int, repeats: int
) -> dict[str, Any]:
    torch.manual_seed(seed)
    options = dict(options)
    window, chunked, softcap = options.get("window", 0), options.get("chunk", 0), options.get("softcap", 0.0)
    sinks = torch.randn(shape.heads, device="cuda").bfloat16() if options.get("sinks") else None
    borders = [1, 2, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513, 4000]
    lengths = borders[:rows] + torch.randint(1, 3000, (max(0, rows - len(borders)),)).tolist()
    step = make_step(shape, lengths, 1, ragged.COLUMNS, "cuda", torch.bfloat16, poison=True)
    if window or chunked:
        for slot, length in zip(step.slots.tolist(), lengths, strict=True):
            low = max(0, length - window) if window else (length - 1) // chunked * chunked
            step.block_table[slot, : low // shape.page] = ragged.NO_PAGE
    single = step._replace(
        k_pages=step.k_pages.float(), v_pages=step.v_pages.float(), q=step.q.float(), k=step.k.float(), v=step.v.float()
    )
    where = step.block_table, step.slots, step.positions
    expected = reference.decode_attention(
        single.q[0],
        single.k_pages[0],
        single.v_pages[0],
        *where,
        shape.dim**-0.5,
        window,
        chunked,
        softcap,
        None if sinks is None else sinks.float(),
        single.k[0],
        single.v[0],
    )

    def run(part: Step, append: bool) -> torch.Tensor:
        call = Streamed(shape, part, form, chunk, window, chunked, softcap, sinks, append)
        call.schedule()
        ragged.poison_free_memory("cuda")
        out = call(0)
        torch.cuda.synchronize()
        assert not call.counters.any()
        return out

    wrong = []
    out = run(step, True)
    found = ragged.error(out, expected)
    if not found < ragged.LIMIT:
        per_row = [(n, ragged.error(o, e)) for n, o, e in zip(lengths, out, expected, strict=True)]
        wrong.append(f"error {found} {[(n, round(e, 4)) for n, e in per_row if not e < 0.02][:12]}")
    page = step.block_table[step.slots.long(), step.positions // shape.page].long()
    at = step.positions % shape.page
    if not (
        torch.equal(step.k_pages[0, page, :, at], step.k[0]) and torch.equal(step.v_pages[0, page, :, at], step.v[0])
    ):
        wrong.append("the new K and V are not in the pages")
    order = torch.randint(0, rows, (rows,), device="cuda")
    if not torch.equal(run(step.take(order), True), out[order]):
        wrong.append("bits depend on neighbours")
    alone = torch.arange(rows - 1, rows, device="cuda")
    if not torch.equal(run(step.take(alone), True), out[alone]):
        wrong.append("bits of a row alone")
    written = run(step, False)
    if not torch.equal(written, out):
        wrong.append(f"other bits with all K and V in the pages, error {ragged.error(written, expected)}")
    call = Streamed(shape, step, form, chunk, window, chunked, softcap, sinks, False)
    call.schedule()
    other = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(repeats):
        other += (call(0) != out).any()
    torch.cuda.synchronize()
    if other:
        wrong.append(f"{int(other)} of {repeats} repeats differ")
    return {
        "shape": shape.name,
        "form": form._asdict(),
        "chunk": chunk,
        "options": options,
        "rows": rows,
        "error": found,
        "repeats": repeats,
        "wrong": wrong,
    }


def time_streamed(shape: Shape, step: Step, form: Form, chunk: int) -> tuple[float, float]:
    call = Streamed(shape, step, form, chunk)

    def whole() -> None:
        call.schedule()
        for layer in range(shape.layers):
            call(layer % ragged.LAYERS_IN_MEMORY)

    def same() -> None:
        for layer in range(shape.layers):
            call(layer % ragged.LAYERS_IN_MEMORY)

    call.schedule()
    return graph_seconds(whole, 7, 1) / shape.layers, graph_seconds(same, 7, 1) / shape.layers


def time_apart(shape: Shape, step: Step, form: Form, chunk: int) -> float:
    """Behind a small kernel, less that kernel's own time."""
    call = Streamed(shape, step, form, chunk)

    def with_attention() -> None:
        for layer in range(shape.layers):
            step.q[layer % ragged.LAYERS_IN_MEMORY].mul_(1.0)
            call(layer % ragged.LAYERS_IN_MEMORY)

    def without() -> None:
        for layer in range(shape.layers):
            step.q[layer % ragged.LAYERS_IN_MEMORY].mul_(1.0)

    call.schedule()
    return (graph_seconds(with_attention, 7, 1) - graph_seconds(without, 7, 1)) / shape.layers


def cases():
    for shape in SHAPES:
        for count in (64, 128, 256):
            yield shape, "100-2000", ragged.ragged(count)
    yield SHAPES[0], "530", [530] * 256
    yield SHAPES[1], "530", [530] * 256
    for count in (24, 32, 48):
        yield SHAPES[0], "100-2000", ragged.ragged(count)
        yield SHAPES[0], "1024", [1024] * count
    yield SHAPES[0], "530", [530] * 32
    yield SHAPES[0], "1800", [1800] * 72
    yield SHAPES[0], "4096", [4096] * 64
    yield SHAPES[1], "100-2000", ragged.ragged(32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--forms", type=int, default=9)
    parser.add_argument("--checks", type=int, default=99)
    args = parser.parse_args()
    begin = time.perf_counter()
    results: dict[str, Any] = {"benchmark": "tried_streamed", "check": [], "ragged": []}
    forms = {
        128: [
            (Form(32, 4, 2), (512, 1024, 2048)),
            (Form(32, 2, 3), (1024, 2048)),
        ],
        64: [
            (Form(64, 2, 4), (512, 1024, 2048)),
            (Form(64, 4, 3), (1024, 2048)),
            (Form(32, 2, 4), (2048,)),
            (Form(64, 2, 5), (2048,)),
        ],
    }
    with torch.inference_mode():
        some = [(shape, {}, rows) for shape in SHAPES for rows in (40, 1)]
        some += [(SHAPES[0], options, 30) for options in ragged.OPTIONS] + [(SHAPES[1], ragged.OPTIONS[2], 30)]
        for shape, options, rows in some[: args.checks]:
            try:
                row = check(shape, forms[shape.dim][0][0], 512, options, rows, 1, args.repeats)
            except AssertionError as error:
                row = {"shape": shape.name, "options": options, "wrong": [repr(error)]}
            results["check"].append(row)
            print(
                f"{time.perf_counter() - begin:5.1f} s check {row['shape']} {options} rows {rows}: error {row.get('error', 9):.1e} {row['wrong'] or 'right'}",
                flush=True,
            )
        write(results, args.output)
        ceiling = read_ceiling(torch.device("cuda", 0))
        results["read_ceiling_gb_per_s"] = ceiling / 1e9
        print(f"read ceiling {ceiling / 1e9:.0f} GB/s", flush=True)
        for shape, name, lengths in cases():
            step = make_step(shape, lengths, ragged.LAYERS_IN_MEMORY, ragged.COLUMNS, "cuda", torch.bfloat16)
            floor = sum(lengths) * shape.kv_heads * shape.dim * 4 / ceiling
            line = f"{shape.name:13} {len(lengths):3} {name:9} floor {floor * 1e6:6.1f}"
            base = {"model": shape.name, "batch": len(lengths), "contexts": name}
            if len(lengths) < 64:
                took = ragged.time_split(shape, step)
                results["ragged"].append(base | {"form": "split", "us": took * 1e6, "percent": floor / took * 100})
                line += f" | split {took * 1e6:6.1f}"
                few = ragged.usual(shape)._replace(chunk=512)
                took = ragged.time_step(shape, step, few)
                results["ragged"].append(base | {"form": "used", "us": took * 1e6, "percent": floor / took * 100})
            else:
                took = ragged.time_step(shape, step, ragged.usual(shape))
            results["ragged"].append(base | {"form": "used", "us": took * 1e6, "percent": floor / took * 100})
            line += f" | used {took * 1e6:6.1f} {floor / took * 100:4.1f}%"
            for number, (form, chunks) in enumerate(forms[shape.dim][: args.forms]):
                for chunk in chunks:
                    took, alone = time_streamed(shape, step, form, chunk)
                    results["ragged"].append(
                        base
                        | {
                            "form": form._asdict(),
                            "chunk": chunk,
                            "us": took * 1e6,
                            "percent": floor / took * 100,
                            "without_schedule_us": alone * 1e6,
                        }
                    )
                    line += f" | {number}/{chunk} {took * 1e6:6.1f} {floor / took * 100:4.1f}% ({alone * 1e6:.1f})"
                    if number < 1 and chunk == 2048 and len(lengths) in (64, 128):
                        apart = time_apart(shape, step, form, chunk)
                        results["ragged"][-1]["behind_a_small_kernel_us"] = apart * 1e6
                        line += f" [{apart * 1e6:.1f}]"
            print(f"{time.perf_counter() - begin:5.1f} s {line}", flush=True)
            del step
            write({"provenance": provenance(), **results}, args.output)
            if time.perf_counter() - begin > args.seconds:
                print("out of time")
                break


if __name__ == "__main__":
    main()
