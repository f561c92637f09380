"""What do steps cost in mode `hybrid` that meet sizes for which nothing was captured?

An engine starts without a graph (`capture_at_start=False`) and gets calls of random batch sizes, prompt lengths and
output lengths; it captures between calls what it missed. The same calls run where nothing is ever captured
(`decode_buckets=[]`, `prefill_buckets=[]`: the compiled steps alone). Each run has a process of its own, so that each
pays alike for what a size costs the first time; the compiled steps run in three. All run one step at a time
(`run_ahead=0`) and take no token for an end, so that step i of one is step i of the others: the same rows, lengths and
contexts. The ratio of a step is its wall time over the median of the three. Captures are between calls, apart.

    python benchmarks/unseen.py [--output results.json]
    python benchmarks/unseen.py --smoke          # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import how_it_ran, quantiles, random_model, report, shape_dtype, this_device
from transformers import PreTrainedModel

import hybridgen
from hybridgen.graphs.report import graph_stats

LIMIT = 1.2
"""The ratio that a step should stay below."""
REFERENCE_RUNS = 3
WORST = 20


class Call(NamedTuple):
    """One call: prompts, and how many tokens each gets."""

    prompts: list[list[int]]
    new: list[int]


class Step(NamedTuple):
    """One turn of the loop."""

    seconds: float
    launches: list[tuple[str, int, str, str]]
    """(phase, tokens, kind, reason) of what it launched."""


def make_calls(count: int, most: int, shortest: int, longest: int, vocab: int) -> list[Call]:
    """Half of the calls have up to 4 prompts, the others up to `most`."""
    draw = random.Random(0)
    calls = []
    for _ in range(count):
        batch = draw.randint(1, min(4, most)) if draw.random() < 0.5 else draw.randint(1, most)
        lengths = [draw.randint(shortest, longest) for _ in range(batch)]
        prompts = [[draw.randrange(3, vocab) for _ in range(length)] for length in lengths]
        calls.append(Call(prompts, [draw.randint(2, 12) for _ in range(batch)]))
    return calls


def run(engine: hybridgen.Engine, calls: list[Call]) -> tuple[list[Step], list[float]]:
    """Steps of all calls, and seconds of each time between calls in which something was captured."""
    loop: Any = engine._loop
    runner: Any = engine._runner
    launches: list[tuple[str, int, str, str]] = []
    prefill, decode = runner.prefill, runner.decode

    def noted_prefill(chunks: Any) -> Any:
        step = prefill(chunks)
        launches.append(("prefill", sum(len(chunk.tokens) for chunk in chunks), step.kind, step.reason))
        return step

    def noted_decode(slots: Any) -> Any:
        step = decode(slots)
        launches.append(("decode", len(slots), step.kind, step.reason))
        return step

    runner.prefill, runner.decode = noted_prefill, noted_decode
    steps, captures = [], []
    for call in calls:
        sampling = [hybridgen.SamplingParams(max_new_tokens=new, ignore_eos=True, temperature=0) for new in call.new]
        requests = engine.make_requests(call.prompts, sampling, {})
        loop.submit(requests)
        while any(request.completion is None for request in requests):
            launches.clear()
            start = time.perf_counter()
            loop.step()
            steps.append(Step(time.perf_counter() - start, list(launches)))
        before = graph_stats(runner.graphs).lazy_captures
        start = time.perf_counter()
        engine.idle()
        took = time.perf_counter() - start
        if graph_stats(runner.graphs).lazy_captures > before:
            captures.append(took)
    del runner.prefill, runner.decode
    return steps, captures


def kind_of(step: Step) -> str:
    """Prefill or decode or both, and how it ran."""
    phases = "+".join(phase for phase, *_ in step.launches) or "nothing"
    ways = {("padded" if reason.startswith("padded") else "graph") if kind != "layers, compiled" else "compiled"
            for _, _, kind, reason in step.launches}  # fmt: skip
    return f"{phases}, {'+'.join(sorted(ways))}"


def leg(graphs: bool, model: PreTrainedModel, calls: list[Call], options: dict[str, Any]) -> dict[str, Any]:
    """One process's run: its steps, captures, and what the engine says about them."""
    none: dict[str, Any] = {"capture_at_start": False} if graphs else {"decode_buckets": [], "prefill_buckets": []}
    with hybridgen.Engine.load(model, mode="hybrid", run_ahead=0, **none, **options) as engine:
        steps, captures = run(engine, calls)
        return {"steps": steps, "captures": captures, "engine": how_it_ran(engine)}


def run_leg(graphs: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same in a fresh process."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "leg.json"
        command = [sys.executable, __file__, "--model", arguments.model, "--calls", str(arguments.calls)]
        command += ["--leg", "graphs" if graphs else "plain", "--output", str(path)]
        subprocess.run(command + ["--smoke"] * arguments.smoke, check=True)
        found = json.loads(path.read_text())
    found["steps"] = [Step(seconds, [tuple(launch) for launch in launches]) for seconds, launches in found["steps"]]
    return found


def compare(found: dict[str, Any], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of the steps with graphs to the median of those without, and how far those are apart themselves."""
    steps, captures = found["steps"], found["captures"]
    references = [other["steps"] for other in plain]
    ratios, noise = [], []
    groups: dict[str, list[float]] = {}
    for step, *others in zip(steps, *references, strict=True):
        sizes = [launch[:2] for launch in step.launches]
        if any([launch[:2] for launch in other.launches] != sizes for other in others):
            raise SystemExit("the runs launched other steps: nothing can be compared")
        middle = statistics.median(other.seconds for other in others)
        ratios.append(step.seconds / middle)
        noise += [other.seconds / middle for other in others]
        groups.setdefault(kind_of(step), []).append(ratios[-1])
    worst = sorted(range(len(steps)), key=lambda index: -ratios[index])[:WORST]
    return {
        "steps": len(steps),
        "limit": LIMIT,
        "above_limit": sum(ratio > LIMIT for ratio in ratios),
        "ratio": distribution(ratios),
        "ratio_of_the_reference": distribution(noise),
        "ratio_by_kind": {kind: distribution(of_kind) for kind, of_kind in sorted(groups.items())},
        "captures": {"count": len(captures), "seconds": sum(captures), "each": quantiles(captures or [0.0])},
        "worst": [
            {
                "step": index,
                "ratio": ratios[index],
                "us": steps[index].seconds * 1e6,
                "launches": [list(launch) for launch in steps[index].launches],
            }
            for index in worst
        ],
        "engine": found["engine"],
        "reference_engine": plain[0]["engine"],
    }


def distribution(ratios: list[float]) -> dict[str, float]:
    in_us = quantiles(ratios)
    return {
        "count": len(ratios),
        "p50": in_us["p50_us"] / 1e6,
        "p99": in_us["p99_us"] / 1e6,
        "max": in_us["max_us"] / 1e6,
        "above_limit": sum(ratio > LIMIT for ratio in ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of common.shape_config")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    parser.add_argument("--leg", choices=["graphs", "plain"], help="one run alone, as the script calls itself")
    arguments = parser.parse_args()
    if arguments.leg is None:
        plain = [run_leg(False, arguments) for _ in range(1 if arguments.smoke else REFERENCE_RUNS)]
        show(compare(run_leg(True, arguments), plain), arguments)
        return
    device = this_device()
    name, count, most, longest = arguments.model, arguments.calls, 32, 600
    options: dict[str, Any] = {"max_context": 640}
    if arguments.smoke:
        name, count, most, longest = "tiny", 12, 4, 40
        options = {"max_context": 64, "compile_backend": "eager", "capture_after": 1}
    model = random_model(name, shape_dtype(name, device), device)
    calls = make_calls(count, most, 10, longest, model.config.vocab_size)
    found = leg(arguments.leg == "graphs", model, calls, {"max_batch": most, **options})
    arguments.output.write_text(json.dumps(found))


def show(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    print(f"{'steps':<34} {'count':>6} {'p50':>7} {'p99':>7} {'max':>7} {'above ' + str(LIMIT):>10}")
    rows = {"all": result["ratio"], **result["ratio_by_kind"], "the reference itself": result["ratio_of_the_reference"]}
    for kind, row in rows.items():
        print(
            f"{kind:<34} {row['count']:6} {row['p50']:7.3f} {row['p99']:7.3f} {row['max']:7.3f} {row['above_limit']:10}"
        )
    for row in result["worst"][:5]:
        print(f"worst: step {row['step']}, ratio {row['ratio']:.2f}, {row['us']:.0f} us, {row['launches']}")
    report({"benchmark": "unseen", "model": arguments.model, "calls": arguments.calls, **result}, arguments.output)


if __name__ == "__main__":
    main()
