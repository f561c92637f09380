"""How many tokens per second come out of a batch of requests that are all known in advance?

256 requests from seed 0, with prompts and outputs of 100 to 1024 tokens each, as small engines quote it: 133,966
generated tokens. Prompts are ids, end-of-sequence is ignored, weights are random. Generated tokens over the wall time
of the whole call, synchronised; the median of the runs. Before them comes a whole call, whose time is kept but does not
count, and then the engine records what graphs that call lacked, as a server's does while it is idle (a script's records
one at the end of each call). Huggingface has a warm-up call of a few requests.

- eager, jit, graph, hybrid: one `generate()` call of an engine in that mode, all 256 requests in one batch.
- huggingface: Hugging Face's continuous batching (`generate_batch`'s manager), with a limit per request. With SDPA,
  the attention that torch brings, it is a weak peer: it is made for flash attention.
- with `--rates`: our engines get the same requests one by one, at times of a Poisson process of so many a second (or
  `--arrivals even`: at equal distances), and report the time to the first token, from the moment a request came, and
  that between tokens: median and 99th percentile.
- with `--mixed`: one engine with `mixed_steps=True`, whose calls are made with prompts beside decode and without, in
  turns; where requests come one by one, all prompts are fed so, or none.

    python benchmarks/throughput.py --models qwen3-0.6b llama-3.2-1b [--temperatures 0 0.6] [--output results.json]
    python benchmarks/throughput.py --models llama-3.1-8b --engines hybrid --rates 8 16 [--output results.json]
    python benchmarks/throughput.py --models llama-3.1-8b --engines hybrid --mixed [--output results.json]
    python benchmarks/throughput.py --smoke          # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import (
    how_it_ran,
    random_model,
    release,
    report,
    shape_dtype,
    synchronize,
    this_device,
)
from transformers import GenerationConfig, PreTrainedModel

import hybridgen
from hybridgen.comparison.measuring.baselines import batching_config, paged_attention
from hybridgen.engine.mixing import Mixing, always_worth

HUGGINGFACE = "huggingface"
ENGINES = ("eager", "jit", "graph", "hybrid", HUGGINGFACE)
WARM_UP = 8
"""Requests of the call that is not measured."""


class Work(NamedTuple):
    """The requests."""

    prompts: list[list[int]]
    new: list[int]

    @property
    def tokens(self) -> int:
        """All that is generated."""
        return sum(self.new)

    def head(self, count: int) -> Work:
        """The first few of them, with short outputs."""
        return Work(self.prompts[:count], [min(16, new) for new in self.new[:count]])


class Arrivals(NamedTuple):
    """How requests come one by one."""

    rates: list[float]
    """A second."""
    even: bool
    """At equal distances; else a Poisson process."""


def requests(count: int, least: int, most: int, vocab: int) -> Work:
    """Prompts first, then output lengths, from one generator: the order decides what seed 0 gives."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, vocab) for _ in range(draw.randint(least, most))] for _ in range(count)]
    return Work(prompts, [draw.randint(least, most) for _ in range(count)])


def timed(
    call: Callable[[Work], int], work: Work, device: str, runs: int, *, warm_up: bool = True
) -> tuple[list[float], int]:
    """Seconds of each run, after one of a few requests; and the tokens that came out."""
    if warm_up:
        call(work.head(WARM_UP))
    seconds, tokens = [], 0
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        tokens = call(work)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds, tokens


def ours(
    model: PreTrainedModel,
    mode: str,
    work: Work,
    temperatures: list[float],
    device: str,
    runs: int,
    options: dict[str, Any],
    arrivals: Arrivals,
    mixed: bool,
) -> Iterator[tuple[list[float], int, dict[str, Any]]]:
    """For each temperature, in one engine: seconds of the runs, generated tokens, and how the engine ran them, and what
    requests took that came one by one."""
    longest = max(len(prompt) + new for prompt, new in zip(*work, strict=True))
    sizes = {"max_batch": len(work.prompts), "max_context": longest, "mixed_steps": mixed}
    with hybridgen.Engine.load(model, **{"mode": mode, **sizes, **options}) as engine:

        def generate(part: Work, temperature: float) -> int:
            sampling = [
                hybridgen.SamplingParams(max_new_tokens=new, temperature=temperature, ignore_eos=True, seed=index)
                for index, new in enumerate(part.new)
            ]
            completions = engine.generate(part.prompts, sampling)
            failed = [completion.error for completion in completions if completion.error is not None]
            if failed:
                raise failed[0]
            return sum(len(completion.token_ids) for completion in completions)

        for temperature in temperatures:
            call, name = partial(generate, temperature=temperature), f"{mode} {temperature}"
            [first], _ = timed(call, work, device, 1, warm_up=False)
            while engine.idle():
                pass
            found = in_turns(engine, call, work, device, runs) if mixed else timed(call, work, device, runs)
            scheduler: Any = engine._loop.scheduler
            came = []
            for rate, beside in itertools.product(arrivals.rates, (False, True) if mixed else (False,)):
                scheduler.mixing = mixing(engine, everyone=True) if beside else None
                how = f"{name}, prompts beside" if beside else name
                row = arriving(engine, work, temperature, rate, arrivals.even, how)
                came.append(row | ({"prompts_beside": beside} if mixed else {}))
            ran = how_it_ran(engine) | {"first_call_seconds": first}
            yield *found[:2], ran | ({"arrivals": came} if came else {}) | dict(*found[2:])


def in_turns(
    engine: hybridgen.Engine, call: Callable[[Work], int], work: Work, device: str, runs: int
) -> tuple[list[float], int, dict[str, Any]]:
    """Calls with prompts beside decode and without, in turns: seconds of the first ones, tokens, and those of the
    others: without, and with longer prompts held back."""
    scheduler: Any = engine._loop.scheduler
    if scheduler.mixing is None:
        raise RuntimeError(f"nothing is mixed: {engine.stats().fallbacks}")
    call(work.head(WARM_UP))
    ways = {"mixed": mixing(engine), "in turns": None, "mixed, prompts up to 1024": mixing(engine, longest=1024)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    tokens = 0
    for way in [*ways] * runs:
        scheduler.mixing = ways[way]
        found, tokens = timed(call, work, device, 1, warm_up=False)
        seconds[way] += found
        print(f"{way}: {found[0]:.3f} s, {tokens / found[0]:,.0f} tokens/s", flush=True)
    return seconds.pop("mixed"), tokens, {"other_seconds": seconds}


def mixing(engine: hybridgen.Engine, **options: Any) -> Mixing:
    """As an engine has it with `mixed_steps=True`, with other options."""
    loop: Any = engine._loop
    runner = loop._runner
    worth = runner.feeds_faster_beside if runner.device.type == "cuda" else always_worth
    return Mixing(loop.scheduler.pages, runner.max_batch, worth=worth, **options)


def arriving(
    engine: hybridgen.Engine, work: Work, temperature: float, rate: float, even: bool, name: str
) -> dict[str, Any]:
    """Requests that come at random times, `rate` a second on average, or at equal distances: what they wait for their
    tokens."""
    draw = random.Random(0)
    times = list(itertools.accumulate(1 / rate if even else draw.expovariate(rate) for _ in work.prompts))
    loop: Any = engine._loop
    waiting: list[Any] = []
    came: list[tuple[Any, float]] = []
    start = time.perf_counter()
    while len(came) < len(times) or waiting:
        while len(came) < len(times) and start + times[len(came)] <= time.perf_counter():
            index = len(came)
            sampling = hybridgen.SamplingParams(
                max_new_tokens=work.new[index], temperature=temperature, ignore_eos=True, seed=index
            )
            [request] = engine.make_requests([work.prompts[index]], sampling, {})
            came.append((request, time.perf_counter() - start - times[index]))
            waiting.append(request)
            loop.submit([request])
        if waiting:
            loop.step()
            waiting = [request for request in waiting if request.completion is None]
        else:
            time.sleep(max(0.0, start + times[len(came)] - time.perf_counter()))
    took = time.perf_counter() - start
    failed = [request.completion.error for request, _ in came if request.completion.error is not None]
    if failed:
        raise failed[0]
    firsts = sorted(request.completion.timing.ttft + late for request, late in came)
    gaps = sorted(
        after - before
        for request, _ in came
        for before, after in itertools.pairwise(request.completion.timing.token_times)
    )
    row = {"requests_per_s": rate, "even": even, "seconds": took, "tokens_per_s": sum(work.new) / took}
    for what, values in (("ttft", firsts), ("tpot", gaps)):
        row |= {f"{what}_p{part}_ms": values[(len(values) - 1) * part // 100] * 1e3 for part in (50, 99)}
    print(
        f"{name}, {rate:g} requests/s: {row['tokens_per_s']:,.0f} tokens/s, first token {row['ttft_p50_ms']:.1f} ms, "
        f"p99 {row['ttft_p99_ms']:.1f}; between tokens {row['tpot_p50_ms']:.2f}, p99 {row['tpot_p99_ms']:.2f}",
        flush=True,
    )
    return row


def huggingface(
    model: PreTrainedModel, work: Work, temperature: float, device: str, runs: int
) -> tuple[list[float], int, dict[str, Any]]:
    """The same with `generate_batch`'s manager, which takes a limit per request."""
    before = model.config._attn_implementation
    model.set_attn_implementation(paged_attention())
    config = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        max_new_tokens=max(work.new),
        eos_token_id=-1,
        pad_token_id=0,
    )
    attends = model.config._attn_implementation
    try:
        with model.continuous_batching_context_manager(  # type: ignore[operator]
            generation_config=config, continuous_batching_config=batching_config(), block=True, timeout=30
        ) as manager:

            def generate(part: Work) -> int:
                for prompt, new in zip(*part, strict=True):
                    manager.add_request(prompt, max_new_tokens=new)
                done = tokens = 0
                while done < len(part.prompts):
                    result = manager.get_result(timeout=1)
                    if result is None and not manager.is_running():
                        raise RuntimeError("the generation thread of generate_batch ended")
                    if result is not None and result.is_finished():
                        if result.error is not None:
                            raise RuntimeError(f"a request of generate_batch failed: {result.error}")
                        done += 1
                        tokens += len(result.generated_tokens)
                return tokens

            seconds, tokens = timed(generate, work, device, runs)
    finally:
        model.set_attn_implementation(before)
    return seconds, tokens, {"attention": attends}


def measure(
    name: str,
    engines: list[str],
    work: Work,
    temperatures: list[float],
    device: str,
    runs: int,
    options: dict[str, Any],
    arrivals: Arrivals,
    mixed: bool = False,
) -> list[dict[str, Any]]:
    model = random_model(name, shape_dtype(name, device), device)
    rows: list[dict[str, Any]] = []
    for engine in engines:
        facts: dict[str, Any] = {"model": name, "engine": engine, "requests": len(work.prompts)}
        facts |= {"prompt_tokens": sum(map(len, work.prompts))}
        rates: list[float] = []
        try:
            if engine == HUGGINGFACE:
                found = (huggingface(model, work, temperature, device, runs) for temperature in temperatures)
            else:
                found = ours(model, engine, work, temperatures, device, runs, options, arrivals, mixed)
            for temperature, (seconds, tokens, ran) in zip(temperatures, found, strict=True):
                took = statistics.median(seconds)
                rates.append(tokens / took)
                row = facts | {"temperature": temperature, "generated_tokens": tokens, "seconds": seconds}
                rows.append(row | {"tokens_per_s": rates[-1], "over_the_first": rates[-1] / rates[0], "ran": ran})
                print(
                    f"{name:<14} {engine:<12} {temperature:>4} {tokens:>9,} {took:>9.2f} {rates[-1]:>12,.0f}",
                    flush=True,
                )
        except Exception as error:  # whatever an engine raises: the others are still worth having
            first = str(error).splitlines()[0] if str(error) else ""
            rows.append(facts | {"error": f"{type(error).__name__}: {first}"})
            print(f"{name:<14} {engine:<12} {rows[-1]['error']}", flush=True)
        release()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen3-0.6b", "llama-3.2-1b"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["hybrid", HUGGINGFACE])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0], help="small engines quote 0.6")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="requests a second that come one by one")
    parser.add_argument("--arrivals", choices=("poisson", "even"), default="poisson", help="how they come")
    parser.add_argument("--mixed", action="store_true", help="with prompts beside decode and without, in turns")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    device = this_device()
    models, engines, runs = arguments.models, arguments.engines, arguments.runs
    work, options = requests(arguments.requests, 100, 1024, 10000), {}
    rates, even = arguments.rates, arguments.arrivals == "even"
    if arguments.smoke:
        rates = [50.0]
        models, runs, work, options = ["tiny"], 1, requests(6, 4, 12, 500), {"compile_backend": "eager"}
    print(f"{'model':<14} {'engine':<12} {'T':>4} {'tokens':>9} {'seconds':>9} {'tokens / s':>12}", flush=True)
    rows = []
    arrivals = Arrivals(rates, even)
    for name in models:
        rows += measure(name, engines, work, arguments.temperatures, device, runs, options, arrivals, arguments.mixed)
    report({"benchmark": "throughput", "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
