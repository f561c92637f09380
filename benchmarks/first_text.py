"""How long until the first text, from the start of a process? The README's command, and a cold `hybrid` on a CPU.

Two pairs of processes, run in turns in a new order every round; each process writes one token's text and exits:

- `command`: `hybridgen generate PROMPT` on the demo model, beside a script that imports torch and transformers, loads
  the same model with `from_pretrained` and calls `generate`;
- `cold`: `hybridgen.generate()` in mode `hybrid` with an empty compile cache, beside the same in mode `eager`, with a
  Llama of 102 million random parameters on the CPU.

Wall time is from the start of the process to the first byte that it writes; CPU time is the whole process's, with its
children's. Ratios are medians of the rounds' own; `quartiles` say how far these lie apart.

    python benchmarks/first_text.py [--rounds 7] [--only cold] [--output benchmarks/results/first-text-cpu.json]
    python benchmarks/first_text.py --smoke          # one round, a tiny model
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import report, shape_config
from cpu import save_random, small_llama

from hybridgen.demo import model_path

PROMPT = "def fibonacci(n):"
HUGGING_FACE = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
path, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
print(tokenizer.decode(model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=1)[0]), flush=True)
"""
OURS = """
import sys, hybridgen
path, mode = sys.argv[1:]
print(hybridgen.generate(path, [[5] * 32], mode=mode, max_new_tokens=1)[0].token_ids, flush=True)
"""


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds from the start of the process to its first byte, and of CPU until its end."""
    before = os.times()
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        if process.stdout is None or not process.stdout.read(1):
            raise RuntimeError(f"wrote nothing: {command}")
        first = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {command}")
    after = os.times()
    return first, after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("command", "cold"), help="one of the two pairs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one round, a tiny model")
    arguments = parser.parse_args()
    rounds = 1 if arguments.smoke else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_random(model, shape_config("tiny") if arguments.smoke else small_llama())
        demo = str(model_path())
        pairs = {
            "command": {
                "ours": [sys.executable, "-m", "hybridgen", "generate", PROMPT, "--max-new-tokens", "1"],
                "hugging face": [sys.executable, "-c", HUGGING_FACE, demo, PROMPT],
            },
            "cold": {mode: [sys.executable, "-c", OURS, str(model), mode] for mode in ("hybrid", "eager")},
        }
        pairs = {pair: commands for pair, commands in pairs.items() if arguments.only in (None, pair)}
        seconds: dict[str, dict[str, list[tuple[float, float]]]] = {
            pair: {what: [] for what in commands} for pair, commands in pairs.items()
        }
        for number in range(rounds):
            runs = [(pair, what) for pair, commands in pairs.items() for what in commands]
            random.Random(number).shuffle(runs)
            for pair, what in runs:
                environment = {**os.environ, "HYBRIDGEN_CACHE_DIR": f"{folder}/cache-{number}-{pair}-{what}"}
                environment.pop("HYBRIDGEN_COMPILE_CACHE", None)
                seconds[pair][what].append(timed(pairs[pair][what], environment))
    rows = []
    for pair, found in seconds.items():
        names = list(found)
        row: dict[str, object] = {"what": pair, "over": names[1]}
        for index, kind in enumerate(("wall", "cpu")):
            for name in names:
                row[f"{name} {kind}_s"] = round(statistics.median(times[index] for times in found[name]), 3)
            ratios = [a[index] / b[index] for a, b in zip(found[names[0]], found[names[1]], strict=True)]
            row[f"ratio_{kind}"] = round(statistics.median(ratios), 3)
            if len(ratios) > 1:
                quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
                row[f"quartiles_{kind}"] = [round(quartiles[0], 3), round(quartiles[2], 3)]
        rows.append(row)
    report({"threads": torch.get_num_threads(), "rounds": rounds, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
