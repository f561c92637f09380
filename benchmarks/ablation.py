"""What does each part of mode `hybrid` bring? All of it, and then each part switched off alone.

- decode: time of a step at batch 1, 8 and 64, (time of a call for N new tokens, less the same call for one) / (N - 1),
  and which executor ran it.
- TTFT: of a prompt of 64 tokens at batch 1, median.
- mixed: 64 requests of random prompt and output lengths, half of them greedy and half sampled, which arrive while the
  others run: after so many steps, drawn at random, so that every variant has the same work. Generated tokens per
  second of the whole run, from the first request to the last token; median of runs after one that is not counted and
  after what it missed was captured.

Every variant is an engine of its own on the same weights. `without compilation` is mode `graph`, `without graphs` is
mode `jit`. The fused kernels for one row and the chain read projections whether they are joined or not, the kernel for
several columns joined ones; what joining brings by itself is the difference of the two rows with `fused_decode=False`,
and `fused` in the JSON says what served a row. Every switch of `EngineConfig` is in VARIANTS, or in NOT_OF_STEPS with
why not.

    python benchmarks/ablation.py --budget 220 --output benchmarks/results/ablation-h200.json
    python benchmarks/ablation.py --variants all "run_ahead=0"
    python benchmarks/ablation.py --smoke          # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

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
from hybridgen.models.projections import fuse_projections, unfuse_projections

VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "fused_decode=False": {"fused_decode": False},
    "fuse_projections=False": {"fuse_projections": False},
    "fused_decode=False, fuse_projections=False": {"fused_decode": False, "fuse_projections": False},
    "without compilation": {"mode": "graph"},
    "without graphs": {"mode": "jit"},
    "metadata_copy=False": {"metadata_copy": False},
    "double_buffer=False": {"double_buffer": False},
    "run_ahead=0": {"run_ahead": 0},
    "sample_in_graph=False": {"sample_in_graph": False},
    "without prefill graphs": {"prefill_buckets": []},
    "without decode graphs": {"decode_buckets": []},
    "max_padding_ratio=0": {"max_padding_ratio": 0},
    "lazy_capture=False": {"lazy_capture": False},
    "capture_at_start=False": {"capture_at_start": False},
    "validate=True": {"validate": True},
    "check_addresses=True": {"check_addresses": True},
    "speculation=ngram": {"speculation": "ngram"},
}
"""In the order in which they run: what is left out when the budget ends comes last."""

SMOKE = ["all", "fused_decode=False, fuse_projections=False", "run_ahead=0", "without graphs"]

NOT_OF_STEPS = {
    "trust_remote_code": "decides which checkpoints load",
    "allow_pickle": "decides which checkpoints load",
    "local_files_only": "decides where files come from",
    "offline_compile": "refuses what would compile; a step that runs is the same",
    "compile_cache": "decides how long a start takes: warm_start.py measures that",
    "graphs": "who records: trees.py measures that",
    "progress": "shows bars while loading",
    "merge_adapters": "there is no adapter here",
    "equal_bits": "refused at 64 rows; which kernels it leaves out is measured by memory_limit.py",
    "prefix_cache": "nothing is shared here: prompts of a call differ, and a live module starts over at each call",
    "fp8_activations": "the weights are in 16 bits here: quantised.py measures the kind fp8-w8a8",
    "mixed_steps": "a call has outputs of one length here: throughput.py --mixed measures it",
    "longest_first": "a call has outputs of one length here, and arrivals come one by one",
}
"""Switches that have no row, and why."""

BATCHES = (1, 8, 64)


class Sizes(NamedTuple):
    """How much is run."""

    prompt: int = 128
    """Of the decode steps."""
    new: int = 64
    repeats: int = 3
    first_tokens: int = 20
    """Calls of which the time to the first token is the median."""
    requests: int = 64
    most_prompt: int = 512
    most_new: int = 128
    runs: int = 2
    batches: tuple[int, ...] = BATCHES


class Arrival(NamedTuple):
    """A request of the mixed run."""

    step: int
    """How many steps run before it comes."""
    prompt: list[int]
    sampling: hybridgen.SamplingParams


def arrivals(sizes: Sizes, vocab: int) -> list[Arrival]:
    """The requests of the mixed run, in order."""
    draw = random.Random(0)
    step, listed = 0, []
    for index in range(sizes.requests):
        prompt = [draw.randrange(3, vocab) for _ in range(draw.randint(10, sizes.most_prompt))]
        sampling = hybridgen.SamplingParams(
            max_new_tokens=draw.randint(4, sizes.most_new),
            temperature=0.8 if index % 2 else 0,
            seed=index,
            ignore_eos=True,
        )
        listed.append(Arrival(step, prompt, sampling))
        step += draw.randint(0, 6)
    return listed


def mixed_run(engine: hybridgen.Engine, listed: list[Arrival], device: str) -> float:
    """Seconds from the first request to the last token."""
    loop: Any = engine._loop
    requests = [engine.make_requests([arrival.prompt], arrival.sampling, {})[0] for arrival in listed]
    synchronize(device)
    start = time.perf_counter()
    step = coming = 0
    while coming < len(listed) or any(request.completion is None for request in requests):
        while coming < len(listed) and listed[coming].step <= step:
            loop.submit([requests[coming]])
            coming += 1
        loop.step()
        step += 1
    took = time.perf_counter() - start
    failed = [request.completion.error for request in requests if request.completion.error is not None]
    if failed:
        raise SystemExit(f"a request of the mixed run failed: {failed[0]}")
    return took


def measure(model: PreTrainedModel, name: str, options: dict[str, Any], sizes: Sizes, device: str) -> dict[str, Any]:
    vocab = model.config.vocab_size
    row: dict[str, Any] = {"variant": name}
    begun = time.perf_counter()
    (fuse_projections if options.get("fuse_projections", True) else unfuse_projections)(model)
    with hybridgen.Engine.load(model, **{"mode": "hybrid", "max_batch": sizes.batches[-1], **options}) as engine:
        row["start_s"] = time.perf_counter() - begun
        for batch in sizes.batches:
            prompts = random_prompts(batch, sizes.prompt, vocab, batch)

            def generate(count: int, prompts: list[list[int]] = prompts) -> Any:
                return engine.generate(prompts, max_new_tokens=count, ignore_eos=True, temperature=0)

            long, short = (seconds(lambda n=n: generate(n), device, sizes.repeats) for n in (sizes.new, 1))
            row[f"decode_{batch}_us"] = (long - short) / (sizes.new - 1) * 1e6
            ran = generate(sizes.new)[0].steps
            row[f"decode_{batch}_by"] = " / ".join(dict.fromkeys(s.kind for s in ran if s.phase == "decode"))
        [prompt] = random_prompts(1, 64, vocab)
        firsts = []
        for _ in range(sizes.first_tokens + 3):
            synchronize(device)
            firsts.append(engine.generate(prompt, max_new_tokens=1, ignore_eos=True, temperature=0).timing.ttft)
        row["ttft_us"] = statistics.median(firsts[3:]) * 1e6
        listed = arrivals(sizes, vocab)
        tokens = sum(arrival.sampling.max_new_tokens or 0 for arrival in listed)
        row["mixed_first_s"] = mixed_run(engine, listed, device)
        start = time.perf_counter()
        while engine.idle():
            pass
        row["idle_s"] = time.perf_counter() - start
        row["mixed_s"] = statistics.median(mixed_run(engine, listed, device) for _ in range(sizes.runs))
        row["mixed_tokens_per_s"] = tokens / row["mixed_s"]
        row["fused"] = dict(engine.stats().fused)
        row["engine"] = how_it_ran(engine)
    release()
    return row


def show(row: dict[str, Any], sizes: Sizes) -> None:
    graphs = row["engine"]["graphs"]
    steps = " ".join(f"{row[f'decode_{batch}_us']:10.1f}" for batch in sizes.batches)
    executors = ", ".join(row[f"decode_{batch}_by"] for batch in sizes.batches)
    print(
        f"{row['variant']:<42} {steps} {row['ttft_us']:9.1f} {row['mixed_tokens_per_s']:16.0f} "
        f"{len(graphs['graphs']):7} {row['start_s']:8.1f}  {executors}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of common.shape_config")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--budget", type=float, help="seconds after which no other variant is begun")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    device = this_device()
    name, sizes, options = arguments.model, Sizes(), {"max_context": 1024}
    if arguments.smoke:
        name, sizes = "tiny", Sizes(8, 4, 1, 1, 6, 20, 6, 1, (1, 2, 4))
        options = {"max_context": 128, "compile_backend": "eager", "max_batch": 8, "capture_after": 1}
        if arguments.variants == list(VARIANTS):
            arguments.variants = SMOKE
    model = random_model(name, shape_dtype(name, device), device)
    steps = " ".join(f"{f'batch {batch}, us':>12}"[-10:] for batch in sizes.batches)
    print(
        f"{'':<42} {steps} {'TTFT, us':>9} {'mixed, tokens/s':>16} {'graphs':>7} {'start, s':>8}  decoded by",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    for variant in arguments.variants:
        if arguments.budget is not None and rows and time.perf_counter() - begun > arguments.budget:
            break
        rows.append(measure(model, variant, {**options, **VARIANTS[variant]}, sizes, device))
        show(rows[-1], sizes)
    left = arguments.variants[len(rows) :]
    if left:
        print(f"not run, the budget of {arguments.budget:g} s is over: {', '.join(left)}", flush=True)
    results = {"benchmark": "ablation", "model": name, "sizes": sizes._asdict(), "rows": rows, "not_run": left}
    report(results, arguments.output)


if __name__ == "__main__":
    main()
