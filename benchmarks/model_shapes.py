"""How fast do models of many kinds decode and prefill, in each mode and in Hugging Face `generate`?

Random weights of published shapes: hybrids of attention with recurrent or convolution layers, latent attention and
experts. Greedy, random prompts of one length, whole calls, wall time, medians.

- step: (time of a call for N new tokens, less the same call for one) / (N - 1). N is as many as `--budget-s` (of modes
  jit, graph and eager `--budget-others-s`) allows for, up to `--new`; in hybrid at least as many as leave 100 gaps.
- prefill: the call for one token.
- share: bytes that a step must read over its time, of the read ceiling that is measured in the same run. Of experts,
  those that tokens choose: k for one row, and as many as are expected of even choices for several.
- p99 over p50: of the gaps between tokens in the long calls.
- repeats: with `--repeats`, how many of so many replays of one recorded decode step, with its attention to latents, its
  recurrences and its experts, gave other bits than the first in its logits, tokens or states.
- agreement: how many tokens are Hugging Face's before the first other one, of all. Random weights in 16 bits leave
  tokens close to each other, so that it says little below 1.

One engine a mode runs all batches. A cell that fails is reported with its reason, and the others go on. Results are
written behind each cell, so that a run that is cut leaves those before. With `--limit-s` a model's cells that would
begin later are left out, and said so.

Most of a run is compilation. Modes jit and hybrid compile the same layers, so that the second takes what Inductor kept
of the first. With `--time-lock FILE` several processes that are given one file get ready beside each other (weights,
start of an engine), and each measures while none of the others does anything; their models are on the device together.

    python benchmarks/model_shapes.py [--models lfm2-2.6b] [--modes hybrid] [--layers 8] [--output results.json]
    python benchmarks/model_shapes.py --budget-s 2 --budget-others-s 1          # all shapes
    for m in qwen3.5-4b lfm2-2.6b; do
      python benchmarks/model_shapes.py --models $m --time-lock /tmp/lock --output $m.json &
    done; wait                                          # beside each other
    python benchmarks/model_shapes.py --smoke          # tiny models, anywhere
"""

from __future__ import annotations

import argparse
import fcntl
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import (
    how_it_ran,
    provenance,
    quantiles,
    random_model,
    random_prompts,
    release,
    report,
    shape_config,
    shape_dtype,
    synchronize,
    this_device,
    write,
)
from replay import differing_repeats
from shapes import shorten
from transformers import AutoModelForCausalLM

import hybridgen
from hybridgen.kernels.read_ceiling import read_ceiling

MODELS = ["qwen3.5-4b", "lfm2-2.6b", "deepseek-v2-lite", "gpt-oss-20b", "qwen3-30b-a3b"]
HUGGINGFACE = "huggingface"
MODES = [HUGGINGFACE, "hybrid", "jit", "graph", "eager"]
"""In the order in which they are measured: a run that is cut has what matters most. Hugging Face's calls run when the
first engine is ready."""
REPEATS = 3
FEW = 5
"""New tokens of the call by which N is chosen."""
GAPS = 100
"""Between tokens of mode hybrid, at least, so that the 99th percentile is one of them."""


class Weights:
    """Bytes of a shape's weights that a decode step reads."""

    def __init__(self, name: str, layers: int | None, dtype: torch.dtype) -> None:
        config = shape_config(name)
        if layers is not None:
            shorten(config, layers)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        embedding = model.get_input_embeddings()
        tied = model.get_output_embeddings().weight is embedding.weight
        self.experts = 0
        self.count = self.chosen = 1
        self.others = 0
        for module_name, module in model.named_modules():
            size = sum(each.numel() * each.element_size() for each in module.parameters(recurse=False))
            if module is embedding and not tied:
                continue
            if module_name.endswith(".experts"):
                self.experts += size
            elif module is not model.get_output_embeddings() or not tied:
                self.others += size
        if self.experts:
            named = "num_local_experts", "num_experts", "n_routed_experts"
            self.count = next(getattr(config, each) for each in named if getattr(config, each, None))
            self.chosen = config.num_experts_per_tok

    def step(self, rows: int) -> float:
        """Of a step of so many rows."""
        read = 1 - (1 - self.chosen / self.count) ** rows
        return self.others + self.experts * read


class Cell:
    """Times of one subject at one batch."""

    def __init__(self, call: Callable[[int], Any], device: str, *, budget: float, most: int, gaps: int = 0) -> None:
        """
        Args:
            call: generates so many tokens for each row.
            budget: seconds, about.
            most: tokens of a long call, if `gaps` does not take more.
            gaps: between tokens, at least, over all long calls.
        """

        def timed(new: int) -> float:
            synchronize(device)
            start = time.perf_counter()
            self.last = call(new)
            synchronize(device)
            return time.perf_counter() - start

        timed(FEW)  # what it missed is recorded at its end
        one = timed(1)
        few = timed(FEW)
        long, self.results = [few], [self.last]
        step = max((few - one) / (FEW - 1), 1e-6)
        repeats = max(1, min(REPEATS, int(budget / 3 / one)))
        self.new = max(FEW, min(most, int((budget / (2 * repeats) - one) / step)), -(-gaps // repeats) + 1)
        # Where there is time for one of each, those above are it.
        firsts = [one] if repeats == 1 else [timed(1) for _ in range(repeats)]
        if repeats > 1 or self.new > FEW:
            long, self.results = [], []
            for _ in range(repeats):
                long.append(timed(self.new))
                self.results.append(self.last)
        self.prefill = statistics.median(firsts)
        self.step = (statistics.median(long) - self.prefill) / (self.new - 1)


def agreement(found: list[list[int]], wanted: list[list[int]]) -> float:
    """Share of tokens before a row's first other one; of as many as both have."""
    same = total = 0
    for ours, theirs in zip(found, wanted, strict=True):
        compared = min(len(ours), len(theirs))
        total += compared
        same += next((i for i in range(compared) if ours[i] != theirs[i]), compared)
    return same / total


def row_of(cell: Cell, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"step_us": cell.step * 1e6, "tokens_per_s": batch / cell.step, "new": cell.new}
    row |= {"prefill_ms": cell.prefill * 1e3, "prefill_tokens_per_s": batch * arguments.prompt / cell.prefill}
    return row


class Results:
    """What was measured so far, in a file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.ceiling: float | None = None
        self.rows: list[dict[str, Any]] = []
        self.engines: dict[str, dict[str, Any]] = {}
        """By model and mode."""
        self.head = {"provenance": provenance(), "benchmark": "model_shapes"}

    def measure_ceiling(self, device: str) -> None:
        """The first time."""
        if "read_ceiling_gb_per_s" not in self.head:
            self.ceiling = read_ceiling(torch.device(device, 0) if device == "cuda" else torch.device(device))
            self.head["read_ceiling_gb_per_s"] = None if self.ceiling is None else self.ceiling / 1e9

    def all(self) -> dict[str, Any]:
        return {**self.head, "rows": self.rows, "engines": self.engines}

    def write(self) -> None:
        write(self.all(), self.arguments.output)


class Turns:
    """Whether this process gets ready or measures, among others that have the same file."""

    def __init__(self, path: Path | None) -> None:
        self.file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("w")

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        if self.file is None:
            yield
            return
        start = time.perf_counter()
        while True:
            try:
                fcntl.flock(self.file, kind)
                break
            except BlockingIOError:  # asked again and again, so that who waits to measure comes first
                time.sleep(0.3)
        if time.perf_counter() - start > 1:
            print(f"waited {time.perf_counter() - start:.1f} s for others", flush=True)
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def together(self) -> AbstractContextManager[None]:
        """While this process gets ready, as others may."""
        return self._lock(fcntl.LOCK_SH | fcntl.LOCK_NB)

    def alone(self) -> AbstractContextManager[None]:
        """While this process measures, and others wait."""
        return self._lock(fcntl.LOCK_EX)


class Model:
    """A shape's rows."""

    def __init__(self, name: str, results: Results, device: str) -> None:
        self.name, self.results, self.device = name, results, device
        self.arguments = arguments = results.arguments
        dtype = shape_dtype(name, device)
        self.weights = Weights(name, arguments.layers, dtype)
        start = time.perf_counter()
        self.spent = 0.0
        """Seconds of the cells so far."""
        self.model = random_model(name, dtype, device, layers=arguments.layers)
        synchronize(device)
        print(f"{name}: weights made in {time.perf_counter() - start:.1f} s", flush=True)
        self.engines = results.engines.setdefault(name, {})
        self.tokens: dict[int, list[list[int]]] = {}
        """Hugging Face's, by batch."""
        self.steps: dict[int, float] = {}

    def prompts(self, batch: int) -> list[list[int]]:
        return random_prompts(batch, self.arguments.prompt, self.model.config.vocab_size, batch)

    def late(self) -> bool:
        return self.spent > self.arguments.limit_s

    def add(self, mode: str, batch: int, measured: Callable[[], dict[str, Any]]) -> None:
        """A row, or why there is none."""
        row: dict[str, Any] = {"model": self.name, "layers": self.model.config.num_hidden_layers, "mode": mode}
        row |= {"batch": batch, "prompt": self.arguments.prompt}
        start = time.perf_counter()
        try:
            if self.late():
                raise TimeoutError(f"left out, behind {self.arguments.limit_s:g} s of the model's cells")
            row |= measured()
        except (hybridgen.HybridgenError, OSError, RuntimeError, ValueError, TypeError) as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"{self.name:<17} {mode:<12} {batch:4} failed: {row['error']}", flush=True)
            self.results.rows.append(row)
            self.results.write()
            return
        row["cell_s"] = time.perf_counter() - start
        self.spent += row["cell_s"]
        if mode == HUGGINGFACE:
            self.steps[batch] = row["step_us"]
        row["times_huggingface"] = self.steps[batch] / row["step_us"] if batch in self.steps else None
        self.results.rows.append(row)
        self.results.write()
        shown = [row["step_us"], row["prefill_ms"]]
        named = ("share_of_ceiling", "p99_over_p50", "times_huggingface", "agreement")
        rest = " ".join("       -" if row.get(each) is None else f"{row[each]:8.3f}" for each in named)
        print(f"{self.name:<17} {mode:<12} {batch:4} {shown[0]:10.1f} {shown[1]:10.1f} {rest}", flush=True)

    def _generate(self, ids: torch.Tensor, new: int) -> torch.Tensor:
        asked = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **asked)

    @torch.inference_mode()
    def warm_huggingface(self) -> None:
        """Have it compile what kernels it finds."""
        self._generate(torch.tensor(self.prompts(1), device=self.device), 2)

    def huggingface(self) -> None:
        arguments = self.arguments
        for batch in arguments.batches:
            ids = torch.tensor(self.prompts(batch), device=self.device)

            def generate(new: int, ids: torch.Tensor = ids) -> torch.Tensor:
                return self._generate(ids, new)

            def measured(batch: int = batch, generate: Callable[[int], torch.Tensor] = generate) -> dict[str, Any]:
                cell = Cell(generate, self.device, budget=arguments.budget_s, most=arguments.new)
                self.tokens[batch] = cell.results[-1][:, arguments.prompt :].tolist()
                return row_of(cell, batch, arguments)

            with torch.inference_mode():
                self.add(HUGGINGFACE, batch, measured)
        release()

    def ours(self, mode: str, options: dict[str, Any], turns: Turns, first: bool) -> None:
        """Rows of one mode; of the `first` one with Hugging Face's before them, if those are wanted."""
        arguments = self.arguments
        if self.late():
            print(f"{self.name:<17} {mode:<12} left out, behind {arguments.limit_s:g} s of cells", flush=True)
            self.engines[mode] = {"error": f"left out, behind {arguments.limit_s:g} s of the model's cells"}
            return
        start = time.perf_counter()
        try:
            with ExitStack() as stack:
                with turns.together():
                    engine = stack.enter_context(
                        hybridgen.Engine.load(self.model, **engine_options(arguments, mode, options))
                    )
                    if first and HUGGINGFACE in arguments.modes:
                        self.warm_huggingface()
                    print(f"{self.name:<17} {mode:<12} ready in {time.perf_counter() - start:.1f} s", flush=True)
                with turns.alone():
                    self.results.measure_ceiling(self.device)
                    if first and HUGGINGFACE in arguments.modes:
                        self.huggingface()
                    for batch in arguments.batches:
                        self.add(mode, batch, lambda batch=batch: self._engine_cell(engine, batch))
                self.engines[mode] = how_it_ran(engine)
        except (hybridgen.HybridgenError, RuntimeError) as error:
            self.engines[mode] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{self.name:<17} {mode:<12} failed: {error}", flush=True)
        release()

    def _engine_cell(self, engine: hybridgen.Engine, batch: int) -> dict[str, Any]:
        arguments, prompts, ceiling = self.arguments, self.prompts(batch), self.results.ceiling

        def generate(new: int) -> Any:
            outs = engine.generate(prompts, max_new_tokens=new, ignore_eos=True, temperature=0)
            if new > 1:
                while engine.idle():  # graphs that were missing
                    pass
            return outs

        is_hybrid = engine.mode == "hybrid"
        budget, gaps = (arguments.budget_s, arguments.gaps) if is_hybrid else (arguments.budget_others_s, 0)
        cell = Cell(generate, self.device, budget=budget, most=arguments.new, gaps=gaps)
        traffic = engine.traffic
        context = traffic.step_bytes(batch, arguments.prompt + cell.new / 2) - traffic.weights
        row = row_of(cell, batch, arguments)
        rate = (self.weights.step(batch) + context) / cell.step
        row |= {"gb_per_s": rate / 1e9, "share_of_ceiling": None if ceiling is None else rate / ceiling}
        between = [after - before for outs in cell.results for before, after in pairwise(outs[0].timing.token_times)]
        times = quantiles(between)
        row |= {"p50_us": times["p50_us"], "p99_us": times["p99_us"], "gaps": len(between)}
        row["p99_over_p50"] = times["p99_us"] / times["p50_us"]
        if arguments.repeats and is_hybrid:
            row |= differing_repeats(engine, prompts, arguments.repeats)
        if batch in self.tokens:
            row["agreement"] = agreement([list(out.token_ids) for out in cell.results[-1]], self.tokens[batch])
        return row


def engine_options(arguments: argparse.Namespace, mode: str, options: dict[str, Any]) -> dict[str, Any]:
    most = max(arguments.batches)
    longest = max(arguments.new, arguments.gaps + 1, 96)  # the last for `differing_repeats`
    options = {"max_batch": most, "max_context": arguments.prompt + longest, **options}
    options |= {"mode": mode, "token_budget": most * arguments.prompt, "prefix_cache": False, "progress": False}
    if mode in ("graph", "hybrid"):
        options |= {"decode_buckets": arguments.batches, "prefill_buckets": [arguments.prompt]}
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--layers", type=int, help="only so many of each model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128, help="tokens of a long call at most")
    parser.add_argument("--budget-s", type=float, default=6.0, help="seconds of a cell, about")
    parser.add_argument("--budget-others-s", type=float, help="the same of modes jit, graph and eager")
    parser.add_argument("--time-lock", type=Path, help="a file: get ready beside others that have it, measure alone")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="seconds of a model, about")
    parser.add_argument("--repeats", type=int, default=0, help="replays of one decode step in mode hybrid")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny models, anywhere")
    arguments = parser.parse_args()
    arguments.gaps = GAPS
    options: dict[str, Any] = {}
    if arguments.smoke:
        arguments.models, arguments.batches, arguments.budget_s = ["tiny", "tiny-latent"], [1, 2], 0.2
        arguments.prompt, arguments.new, arguments.repeats, arguments.gaps = 16, 8, 5, 10
        arguments.modes = [HUGGINGFACE, "eager", "hybrid"]
        options = {"compile_backend": "eager", "kv_memory": "16MiB"}
    if arguments.budget_others_s is None:
        arguments.budget_others_s = arguments.budget_s
    device = this_device()
    head = ("us / step", "prefill ms", "share", "p99/p50", "times HF", "agrees")
    print(f"{'model':<17} {'mode':<12} {'rows':>4} {head[0]:>10} {head[1]:>10} {' '.join(f'{h:>8}' for h in head[2:])}")
    results, turns = Results(arguments), Turns(arguments.time_lock)
    own = [mode for mode in arguments.modes if mode != HUGGINGFACE]
    try:
        for name in arguments.models:
            with turns.together():
                model = Model(name, results, device)
            if not own:
                with turns.alone():
                    results.measure_ceiling(device)
                    model.huggingface()
            for mode in own:
                model.ours(mode, options, turns, first=mode == own[0])
                results.write()
            del model
            release()
    finally:  # what was measured by then is worth keeping
        report(results.all(), arguments.output)


if __name__ == "__main__":
    main()
