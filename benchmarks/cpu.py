"""Does a CPU generate as fast here as with Hugging Face? CPU time and wall time of a token, by mode.

Greedy decoding with the demo model at batch 1, and with a Llama of 100 million random parameters at batch 1 and 8, in
float32: `eager`, `jit`, `hybrid` and Hugging Face `generate` with its dynamic cache. A token's time is a call with
`--new` tokens less a call with one, by the tokens between. Every round measures all of them in a new order, and the
ratios are medians of the rounds' own ratios, so that what else the machine does meets all alike.

    python benchmarks/cpu.py [--modes eager hybrid] [--threads 1] [--output benchmarks/results/cpu.json]
    python benchmarks/cpu.py --smoke          # a tiny model
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import random_prompts, report, shape_config
from transformers import AutoModelForCausalLM, LlamaConfig

import hybridgen
from hybridgen.demo import model_path

BASELINE = "hugging face"
MODES = ("eager", "jit", "hybrid")
READY_CALLS = 3
"""Calls before the measured ones at least; what is compiled behind them is awaited."""


def small_llama() -> LlamaConfig:
    """102 million parameters."""
    return LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=11,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=1024,
    )


def save_random(folder: Path, config: LlamaConfig) -> None:
    """A checkpoint with random weights from seed 0."""
    torch.manual_seed(0)
    config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)


class HuggingFace:
    """`generate` of transformers with the dynamic cache."""

    ready = True

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def __call__(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return found[:, ids.shape[1] :].tolist()

    def close(self) -> dict[str, Any]:
        return {}


class Ours:
    """An engine."""

    def __init__(self, path: Path, mode: str, batch: int) -> None:
        start = time.perf_counter()
        self.engine = hybridgen.Engine.load(
            str(path), mode=mode, dtype="float32", device="cpu", max_batch=batch, max_context=1024, progress=False
        )
        self.load_seconds = time.perf_counter() - start

    def __call__(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        found = self.engine.generate(prompts, temperature=0.0, max_new_tokens=new, ignore_eos=True)
        return [list(completion.token_ids) for completion in found]

    @property
    def ready(self) -> bool:
        """Whether steps run as they will: of `hybrid`, compiled whole."""
        stats = self.engine.stats()
        return self.engine.mode != "hybrid" or bool(stats.graphs.graphs or stats.graphs.failures)

    def close(self) -> dict[str, Any]:
        stats = self.engine.stats().as_dict()
        self.engine.close()
        return {"load_s": round(self.load_seconds, 2), "steps": stats["steps"], "fallbacks": stats["fallbacks"]}


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def make_ready(subject: Any, prompts: list[list[int]], new: int, wait: float) -> dict[str, float]:
    """Call until everything that is compiled is there; the seconds of the first call, and until that was so."""
    begin = time.perf_counter()
    first = timed(lambda: subject(prompts, 1))[1]
    for _ in range(READY_CALLS):
        subject(prompts, new)
    while not subject.ready and time.perf_counter() - begin < wait:
        time.sleep(1)
        subject(prompts, 4)
    return {"first_call_s": round(first, 3), "ready_s": round(time.perf_counter() - begin, 2)}


def measure(path: Path, name: str, batch: int, args: argparse.Namespace, new: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one model and batch size."""
    vocab = AutoModelForCausalLM.from_pretrained(path).config.vocab_size
    prompts = random_prompts(batch, args.prompt, vocab)
    subjects: dict[str, Any] = {BASELINE: HuggingFace(path)}
    subjects |= {mode: Ours(path, mode, batch) for mode in args.modes}
    ready = {name: make_ready(subject, prompts, new, args.wait) for name, subject in subjects.items()}
    expected = subjects[BASELINE](prompts, new)
    equal = {name: subject(prompts, new) == expected for name, subject in subjects.items()}
    gc.collect()
    order = list(subjects)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in subjects}
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for one in order:
            long = timed(lambda: subjects[one](prompts, new))  # noqa: B023
            short = timed(lambda: subjects[one](prompts, 1))  # noqa: B023
            cpu, wall = ((a - b) / (new - 1) * 1e3 for a, b in zip(long, short, strict=True))
            taken[one].append((cpu, wall))
    rows = []
    for one, subject in subjects.items():
        pairs = list(zip(taken[BASELINE], taken[one], strict=True))
        rows.append(
            {
                "model": name,
                "batch": batch,
                "what": one,
                "cpu_ms": round(statistics.median(cpu for cpu, _ in taken[one]), 3),
                "wall_ms": round(statistics.median(wall for _, wall in taken[one]), 3),
                "hf_over_it_cpu": round(statistics.median(hf[0] / it[0] for hf, it in pairs), 3),
                "hf_over_it_wall": round(statistics.median(hf[1] / it[1] for hf, it in pairs), 3),
                "equal_tokens": equal[one],
                **ready[one],
                **subject.close(),
            }
        )
        print(f"{name} batch {batch} {one}: {rows[-1]['cpu_ms']} ms, {rows[-1]['hf_over_it_cpu']}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--models", nargs="+", choices=("demo", "100m"), default=["demo", "100m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of the 100 M model")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wait", type=float, default=300, help="seconds for what is compiled behind")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if args.smoke:
            save_random(path, shape_config("tiny"))
            args.modes, args.prompt, args.wait = ["eager"], 4, 1
            rows = measure(path, "tiny", 2, args, 4, 1)
        else:
            if "demo" in args.models:
                rows += measure(model_path(), "demo", 1, args, args.new, args.rounds)
            if "100m" in args.models:
                save_random(path, small_llama())
                for batch in args.batches:
                    rows += measure(path, "100m", batch, args, min(args.new, 33), args.rounds)
    report({"threads": args.threads, "prompt": args.prompt, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
