"""How near is decode to the limit that reading memory sets, in whole calls of `generate()`?

A decode step is (time of a call for N new tokens after a prompt of 512, less the same call for one) / (N - 1): wall
time of whole calls, synchronised, medians. Its floor is the bytes of the weights over the read ceiling of the device,
measured in the same run (`kernels.read_ceiling`); the share also counts keys and values. For the first batch size
also: the same sampled (temperature 0.8, top-p 0.95), streamed, and without fused kernels; and, with `--peers`, Hugging
Face `generate` with its dynamic and its static cache.

CPU and GPU utilisation are of whole calls: CPU time of all threads over wall time (100 % is one busy
core), and the profiler's record of the device over the time that the same call took before. The profiler slows launches
down, so that all models are loaded again for it, after everything else is measured (`--no-utilisation`: not at all).

    python benchmarks/memory_limit.py --models llama-3.2-1b llama-3.1-8b [--peers dynamic static] [--output FILE]
    python benchmarks/memory_limit.py --format int4 --only-decode --backend eager     # weights in int4, the head in fp8
    python benchmarks/memory_limit.py --smoke          # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    how_it_ran,
    random_model,
    random_prompts,
    release,
    report,
    seconds,
    shape_dtype,
    synchronize,
    this_device,
)
from transformers import PreTrainedModel

import hybridgen
from hybridgen.comparison.measuring.utilisation import Probe, cpu_of, cuda_probe, device_busy, device_share
from hybridgen.kernels.read_ceiling import read_ceiling

UTILISATION_TOKENS = 32
"""New tokens of a call whose utilisation is measured: the profiler's record of a long one takes long to read."""
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 1}


def step_us(call: Callable[[int], Any], new: int, device: str, repeats: int) -> tuple[float, float]:
    """Microseconds of a decode step, and milliseconds of a call for one token."""
    one = seconds(lambda: call(1), device, repeats)
    return (seconds(lambda: call(new), device, repeats) - one) / (new - 1) * 1e6, one * 1e3


Add = Callable[[str, int, hybridgen.Engine, Callable[[int], Any]], None]
"""Told of a case: what it is, its batch, the engine, and a call for so many tokens."""


def made(name: str, arguments: argparse.Namespace, device: str) -> PreTrainedModel:
    """The model of a shape, in the format that was asked for; quantised ones have their head in fp8."""
    dtype = shape_dtype(name, device)
    if arguments.format == "none":
        return random_model(name, dtype, device)
    return random_model(name, dtype, device, quantised=arguments.format, quantised_head="fp8")


def engine_rows(
    model: PreTrainedModel, name: str, arguments: argparse.Namespace, device: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of all cases, and how the engine ran them."""
    rows: list[dict[str, Any]] = []
    prompt, new = arguments.prompt, arguments.new

    def add(what: str, batch: int, engine: hybridgen.Engine, call: Callable[[int], Any]) -> None:
        step, first = step_us(call, new, device, arguments.repeats)
        traffic = engine.traffic
        rate = traffic.bandwidth(batch, prompt + new / 2, step / 1e6)
        row = {"model": name, "format": arguments.format, "what": what, "batch": batch}
        row |= {"step_us": step, "first_token_ms": first}
        row |= {"floor_us": traffic.weights / traffic.ceiling * 1e6 if traffic.ceiling else None}
        row |= {"gb_per_s": None if rate is None else rate / 1e9}
        row |= {"mbu": traffic.mbu(rate) if traffic.ceiling and rate is not None else None}
        row["cpu_utilisation"] = cpu_of(lambda: call(new), arguments.repeats, lambda: synchronize(device))
        row["short_call_s"] = seconds(lambda: call(min(UTILISATION_TOKENS, new)), device, arguments.repeats)
        row["gpu_utilisation"] = None
        rows.append(row)
        share = "" if row["mbu"] is None else f"{row['mbu']:.1%}"
        cpu = f"{row['cpu_utilisation'] or 0:.0%}"
        print(f"{name:<14} {what:<22} {batch:5} {step:10.1f} {first:8.2f} {share:>7} {cpu:>6}", flush=True)

    return rows, engine_cases(model, arguments, add)


def profile_cases(
    model: PreTrainedModel, rows: list[dict[str, Any]], arguments: argparse.Namespace, probe: Probe
) -> None:
    """Add to a model's rows how busy the GPU is in short calls; nothing may be timed in this process afterwards."""
    by_case = {(row["what"], row["batch"]): row for row in rows}

    def add(what: str, batch: int, engine: hybridgen.Engine, call: Callable[[int], Any]) -> None:
        row, tokens = by_case[what, batch], min(UTILISATION_TOKENS, arguments.new)
        call(tokens)
        row["gpu_utilisation"] = device_share(device_busy(lambda: call(tokens), probe), row["short_call_s"])
        shown = "unknown: more work than the call takes" if row["gpu_utilisation"] is None else ""
        print(
            f"{row['model']:<14} {what:<22} {batch:5} GPU {shown or format(row['gpu_utilisation'], '.1%')}", flush=True
        )

    engine_cases(model, arguments, add)


def engine_cases(model: PreTrainedModel, arguments: argparse.Namespace, add: Add) -> dict[str, Any]:
    """All batches, greedy; the first batch also sampled, streamed, and not fused. Returns how the engine ran them."""
    batches, prompt, new = arguments.batches, arguments.prompt, arguments.new
    options = {
        "mode": "hybrid", "max_batch": batches[-1], "max_context": prompt + new, "decode_buckets": batches,
        "prefill_buckets": [prompt], "token_budget": batches[-1] * prompt, "compile_backend": arguments.backend,
    }  # fmt: skip

    with hybridgen.Engine.load(model, **options) as engine:
        for batch in batches:
            prompts = random_prompts(batch, prompt, model.config.vocab_size, batch)

            def greedy(count: int, prompts: list[list[int]] = prompts) -> Any:
                return engine.generate(prompts, max_new_tokens=count, ignore_eos=True, temperature=0)

            add("hybrid", batch, engine, greedy)
        first = random_prompts(batches[0], prompt, model.config.vocab_size, batches[0])

        def sampled(count: int) -> Any:
            return engine.generate(first, max_new_tokens=count, ignore_eos=True, **SAMPLED)

        def streamed(count: int) -> None:
            for _ in engine.stream(first, max_new_tokens=count, ignore_eos=True, temperature=0):
                pass

        if not arguments.only_decode:
            for _ in range(3):  # graphs of the sampler come at the end of a call
                sampled(8)
            add("hybrid, sampled", batches[0], engine, sampled)
            add("hybrid, streamed", batches[0], engine, streamed)
        ran = how_it_ran(engine) | {"fused": dict(engine.stats().fused)}
    release()
    if not arguments.only_decode:
        with hybridgen.Engine.load(model, **options, fused_decode=False) as engine:
            for batch in batches:
                prompts = random_prompts(batch, prompt, model.config.vocab_size, batch)

                def generic(count: int, prompts: list[list[int]] = prompts) -> Any:
                    return engine.generate(prompts, max_new_tokens=count, ignore_eos=True, temperature=0)

                add("hybrid, not fused", batch, engine, generic)
        release()
    return ran


def peer_rows(model: PreTrainedModel, name: str, arguments: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Hugging Face `generate` at the first batch size."""
    rows = []
    batch, prompt, new = arguments.batches[0], arguments.prompt, arguments.new
    ids = torch.tensor(random_prompts(batch, prompt, model.config.vocab_size, batch), device=device)
    for cache in arguments.peers:
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
        if cache == "static":
            options["cache_implementation"] = "static"

        def generate(count: int, options: dict[str, Any] = options) -> Any:
            return model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step, first = step_us(generate, new, device, 2)
        rows.append(
            {"model": name, "what": f"huggingface, {cache}", "batch": batch, "step_us": step, "first_token_ms": first}
        )
        print(f"{name:<14} {'huggingface, ' + cache:<22} {batch:5} {step:10.1f} {first:8.2f}", flush=True)
        release()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b", "llama-2-7b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only-decode", action="store_true", help="greedy alone")
    parser.add_argument("--backend", default="inductor", help="eager: decode alone matters, and all of it is fused")
    parser.add_argument("--peers", nargs="*", default=(), choices=("dynamic", "static"), help="caches of Hugging Face")
    parser.add_argument("--format", default="none", choices=("none", "fp8", "int8", "int4"), help="head fp8")
    parser.add_argument("--no-utilisation", action="store_true", help="do not load the models again for the profiler")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    arguments.batches.sort()
    device = this_device()
    if arguments.smoke:
        arguments.models, arguments.batches, arguments.backend = ["tiny"], [1, 2], "eager"
        arguments.prompt, arguments.new, arguments.repeats = 16, 8, 1
    ceiling = read_ceiling(torch.device(device))
    print(f"read ceiling: {'unknown' if ceiling is None else f'{ceiling / 1e9:,.0f} GB/s'}")
    print(f"{'model':<14} {'':<22} {'batch':>5} {'us / step':>10} {'first ms':>8} {'MBU':>7} {'CPU':>6}", flush=True)
    rows: list[dict[str, Any]] = []
    engines: dict[str, Any] = {}
    for name in arguments.models:
        model = made(name, arguments, device)
        if arguments.peers:
            rows += peer_rows(model, name, arguments, device)
        of_model, engines[name] = engine_rows(model, name, arguments, device)
        rows += of_model
        del model
        release()
    if device == "cuda" and not arguments.no_utilisation:
        for name in arguments.models:
            model = made(name, arguments, device)
            own = [row for row in rows if row["model"] == name and "short_call_s" in row]
            profile_cases(model, own, arguments, cuda_probe(torch.device(device)))
            del model
            release()
    results = {"benchmark": "memory_limit", "read_ceiling_gb_per_s": None if ceiling is None else ceiling / 1e9}
    report({**results, "rows": rows, "engines": engines}, arguments.output)


if __name__ == "__main__":
    main()
