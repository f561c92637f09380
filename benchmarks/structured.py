"""What does a JSON schema cost while tokens are generated: the rate with it and without it, batch by batch.

A model of a published shape with random weights, drawing at temperature 1; prompts are a few ids. The schema is an
array that is far from its least length when `--new` tokens are there, so that both kinds of rows make as many. Strings
of a limited length take llguidance longer, and are the third kind. Rates are of decode: tokens after the first ones
over the time after them, the median of calls that take turns. One more call of each kind tells what the host does in a
step (`host_us`): wait for the step before, follow the grammars with its tokens, make the masks, send them, and launch
what is left. `checked` texts of a schema that ends are read by jsonschema, where it is installed.

    python benchmarks/structured.py [--model llama-3.2-1b] [--batches 1 32] [--output results.json]
    python benchmarks/structured.py --smoke      # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints import write_checkpoint
from common import how_it_ran, random_prompts, release, report, shape_dtype, this_device

import hybridgen
from hybridgen.execution.masks import TokenMasks
from hybridgen.execution.ring import TokenRing
from hybridgen.execution.runner import ModelRunner
from hybridgen.sampling.own import OwnRows

ITEM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "member": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "member", "tags"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": ITEM, "minItems": 1000}
SHORT = {"type": "string", "maxLength": 40}
SHORT_ITEM = ITEM | {"properties": ITEM["properties"] | {"name": SHORT}}
LIMITED = ENDLESS | {"items": SHORT_ITEM}
WARM_UP = 8


def decode_rate(engine: hybridgen.Engine, prompts: list[list[int]], fields: dict[str, Any], new: int) -> float:
    """Tokens per second of a call, those of its prefill apart."""
    outs = engine.generate(prompts, max_new_tokens=new, temperature=1.0, seed=7, **fields)
    counts = {len(out.token_ids) for out in outs}
    if counts != {new}:
        raise SystemExit(f"texts of {sorted(counts)} tokens where all should have {new}")
    first = max(out.timing.ttft or 0.0 for out in outs)
    return (new - 1) * len(outs) / (max(out.timing.total for out in outs) - first)


PARTS: dict[str, tuple[type, str]] = {
    "wait": (TokenRing, "wait"),
    "wait and follow": (OwnRows, "catch_up"),
    "masks": (OwnRows, "fill"),
    "send": (TokenMasks, "send"),
    "behind the forward": (ModelRunner, "_finish"),
}
"""What is timed on the host. The last has all others in it, and the launch of the sampler."""


@contextmanager
def timed_parts() -> Iterator[dict[str, list[float]]]:
    """Meanwhile the host's calls are timed; seconds by part."""
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                seconds[part].append(time.perf_counter() - start)

        return call

    before = {part: getattr(owner, name) for part, (owner, name) in PARTS.items()}
    for part, (owner, name) in PARTS.items():
        setattr(owner, name, timed(part, before[part]))
    try:
        yield seconds
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, before[part])


def host_parts(
    engine: hybridgen.Engine, prompts: list[list[int]], fields: dict[str, Any], new: int
) -> dict[str, dict[str, float]]:
    """Microseconds of the host's parts of a step: median, mean and the worst of a hundred."""
    with timed_parts() as seconds:
        decode_rate(engine, prompts, fields, new)
    found = {}
    for part, times in seconds.items():
        if times:
            ordered = [1e6 * each for each in sorted(times)]
            worst = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
            found[part] = {"median": statistics.median(ordered), "mean": statistics.fmean(ordered), "p99": worst}
    return found


def warm(engine: hybridgen.Engine, prompts: list[list[int]], kinds: dict[str, dict[str, Any]]) -> None:
    """What the calls run is recorded at the end of earlier ones."""
    for _ in range(2):
        for fields in kinds.values():
            engine.generate(prompts, max_new_tokens=WARM_UP, temperature=1.0, seed=7, **fields)
            while engine.idle():
                pass


def checked(engine: hybridgen.Engine, prompts: list[list[int]]) -> dict[str, int]:
    """How many texts ended, and how many of those jsonschema takes."""
    import jsonschema

    outs = engine.generate(prompts, max_new_tokens=200, temperature=1.0, seed=3, json_schema=SHORT_ITEM)
    ended = [out.text for out in outs if out.finish_reason == "stop"]
    valid = 0
    for text in ended:
        jsonschema.validate(json.loads(text), SHORT_ITEM)
        valid += 1
    return {"texts": len(outs), "ended": len(ended), "valid": valid}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of common.shape_config")
    parser.add_argument("--mode", default="hybrid")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    name, device, batches, new = arguments.model, this_device(), arguments.batches, arguments.new
    options: dict[str, Any] = {"max_batch": max(batches), "max_context": 512, "kv_memory": "4GiB", "progress": False}
    repeats = arguments.repeats
    if arguments.smoke:
        name, batches, new, repeats = "tiny", [2], 12, 1
        options |= {"compile_backend": "eager", "max_batch": 2, "max_context": 256, "kv_memory": "16MiB"}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"ignore_eos": True},
        "json schema": {"json_schema": ENDLESS},
        "limited strings": {"json_schema": LIMITED},
    }
    rows, validity = [], None
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(name, Path(place), shape_dtype(name, device), device)
        release()
        with hybridgen.Engine.load(place, mode=arguments.mode, **options) as engine:
            for batch in batches:
                prompts = random_prompts(batch, 16, 4000)
                warm(engine, prompts, kinds)
                found = [
                    {kind: decode_rate(engine, prompts, fields, new) for kind, fields in kinds.items()}
                    for _ in range(repeats)
                ]
                rates = {kind: statistics.median(row[kind] for row in found) for kind in kinds}
                shares = {kind: statistics.median(row[kind] / row["plain"] for row in found) for kind in kinds}
                parts = {kind: host_parts(engine, prompts, kinds[kind], new) for kind in kinds if kind != "plain"}
                row = {"batch": batch, "tokens_per_s": rates, "of_plain": shares, "host_us": parts}
                rows.append({**row, "ran": how_it_ran(engine)})
                for kind in kinds:
                    print(f"batch {batch:<4} {kind:<16} {rates[kind]:>10,.0f} tokens/s {shares[kind]:.3f}", flush=True)
                for kind, found_parts in parts.items():
                    told = "; ".join(
                        f"{part} {row['median']:.0f} ({row['mean']:.0f}, {row['p99']:.0f})"
                        for part, row in found_parts.items()
                    )
                    print(f"batch {batch:<4} {kind:<16} host us, median (mean, p99): {told}", flush=True)
            if importlib.util.find_spec("jsonschema") is not None:
                validity = checked(engine, random_prompts(max(batches), 16, 4000))
                print(f"checked: {validity}")
    report(
        {
            "benchmark": "structured",
            "model": name,
            "mode": arguments.mode,
            "new": new,
            "cores": os.cpu_count(),
            "rows": rows,
            "checked": validity,
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
