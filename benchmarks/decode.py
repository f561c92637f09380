"""How long does a decode step take, in each mode and in Hugging Face `generate`?

(time of a call for N new tokens, less the same call for one) / (N - 1), over whole calls, wall time, medians. The
prompts are random ids; greedy; the same weights in every row of a model. One engine per mode runs all batches: its
graphs are made for these batches, and none for prefill, which the difference leaves out.

| mode | what decodes |
|---|---|
| huggingface | `generate` with its default, dynamic cache |
| eager, jit, graph, hybrid | the mode of that name; graphs captured by hand |
| trees | hybrid with `graphs="trees"`: the whole step compiled, replayed by Inductor's cudagraph trees |
| both | hybrid with `graphs="both"`: every other batch by hand at warm-up, those between in trees while idle |

    python benchmarks/decode.py --models llama-3.2-1b [--modes jit hybrid] [--output results.json]
    python benchmarks/decode.py --smoke          # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    how_it_ran,
    random_model,
    random_prompts,
    release,
    report,
    seconds,
    shape_dtype,
    this_device,
)
from transformers import PreTrainedModel

import hybridgen

HUGGINGFACE = "huggingface"
MODES: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "jit": {"mode": "jit"},
    "graph": {"mode": "graph"},
    "hybrid": {"mode": "hybrid"},
    "trees": {"mode": "hybrid", "graphs": "trees"},
    "both": {"mode": "hybrid", "graphs": "both"},
}


class Shape(NamedTuple):
    """What is generated."""

    batches: list[int]
    prompt: int
    new: int
    repeats: int


def step_seconds(generate: Any, new: int, device: str, repeats: int) -> float:
    """Seconds per decode step of `generate(new_tokens)`."""
    long = seconds(lambda: generate(new), device, repeats)
    return (long - seconds(lambda: generate(1), device, repeats)) / (new - 1)


def row_of(model: str, mode: str, batch: int, shape: Shape, step: float) -> dict[str, Any]:
    row = {"model": model, "mode": mode, "batch": batch, "prompt": shape.prompt, "new": shape.new}
    row |= {"step_us": step * 1e6, "tokens_per_s": batch / step}
    print(f"{model:<14} {mode:<12} {batch:5} {row['step_us']:10.1f} {row['tokens_per_s']:10.0f}", flush=True)
    return row


def huggingface(model: PreTrainedModel, prompts: list[list[int]], shape: Shape, device: str) -> float:
    """Hugging Face `generate` with its default, dynamic cache."""
    ids = torch.tensor(prompts, device=device)
    mask = torch.ones_like(ids)

    def generate(count: int) -> Any:
        return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count)

    return step_seconds(generate, shape.new, device, shape.repeats)


def ours(
    model: PreTrainedModel, name: str, mode: str, shape: Shape, device: str, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of all batches, and how the engine ran them."""
    most = shape.batches[-1]
    options = {**MODES[mode], "max_batch": most, "max_context": shape.prompt + shape.new, **options}
    options["token_budget"] = most * shape.prompt  # all prompts in one call, so that all requests decode in step
    if mode in ("graph", "hybrid", "trees", "both"):
        buckets = shape.batches if mode != "both" else sorted({*shape.batches[::2], most})
        options |= {"decode_buckets": buckets, "prefill_buckets": []}
    rows = []
    with hybridgen.Engine.load(model, **options) as engine:
        for batch in shape.batches:
            prompts = random_prompts(batch, shape.prompt, model.config.vocab_size, batch)

            def generate(count: int, prompts: list[list[int]] = prompts) -> Any:
                return engine.generate(prompts, max_new_tokens=count, ignore_eos=True, temperature=0)

            if mode == "both":  # graphs of batches between the buckets come at the end of a call
                generate(shape.new)
            rows.append(row_of(name, mode, batch, shape, step_seconds(generate, shape.new, device, shape.repeats)))
        ran = how_it_ran(engine)
    release()
    return rows, ran


def measure(
    name: str, modes: list[str], batches_of_hf: list[int], shape: Shape, device: str, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    model = random_model(name, shape_dtype(name, device), device)
    rows: list[dict[str, Any]] = []
    engines: dict[str, Any] = {}
    for batch in batches_of_hf:
        prompts = random_prompts(batch, shape.prompt, model.config.vocab_size, batch)
        rows.append(row_of(name, HUGGINGFACE, batch, shape, huggingface(model, prompts, shape, device)))
    for mode in modes:
        try:
            of_mode, engines[mode] = ours(model, name, mode, shape, device, options)
        except hybridgen.HybridgenError as error:  # the other modes are still worth having
            print(f"{name:<14} {mode:<12} failed: {error}", flush=True)
            engines[mode] = {"error": f"{type(error).__name__}: {error}"}
            release()
            continue
        rows += of_mode
        print(f"{'':<14} {'':<12} {describe(engines[mode])}", flush=True)
    return rows, engines


def describe(ran: dict[str, Any]) -> str:
    """How an engine's decode steps ran, on one line."""
    decodes = ", ".join(f"{s['count']} {s['kind']} ({s['reason']})" for s in ran["steps"] if s["phase"] == "decode")
    parts = ", ".join(f"{part} {took:.1f} s" for part, took in ran["startup"].items())
    return f"decode: {decodes}; start: {parts}; fallbacks: {ran['fallbacks'] or 'none'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "qwen3-0.6b"])
    parser.add_argument("--modes", nargs="*", choices=list(MODES), default=list(MODES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--huggingface-batches", nargs="*", type=int, default=[1, 32], help="none: leave it out")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    device = this_device()
    models, modes, of_hf = arguments.models, arguments.modes, arguments.huggingface_batches
    shape = Shape(sorted(arguments.batches), arguments.prompt, arguments.new, arguments.repeats)
    options: dict[str, Any] = {}
    if arguments.smoke:
        models, of_hf, shape, options = ["tiny"], [1], Shape([1, 2], 16, 8, 1), {"compile_backend": "eager"}
        if device == "cpu":
            modes = [mode for mode in modes if mode not in ("trees", "both")]
    print(f"{'model':<14} {'mode':<12} {'batch':>5} {'us / step':>10} {'tokens / s':>10}", flush=True)
    rows: list[dict[str, Any]] = []
    engines: dict[str, Any] = {}
    for name in models:
        of_model, engines[name] = measure(name, modes, of_hf, shape, device, options)
        rows += of_model
    report({"benchmark": "decode", "rows": rows, "engines": engines}, arguments.output)


if __name__ == "__main__":
    main()
