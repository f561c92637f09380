"""How long is the time to the first token at each prompt length, and how even are the tokens after it?

One table by prompt length, with an average of each mode: TTFT and its 99th percentile, the steps that graphs ran,
memory, CPU and GPU utilisation, and the agreement with mode eager. `tables.py` writes the same one from the JSON.

`hybridgen.compare` at batch 1 on random weights: eager, jit, graph and hybrid, and Hugging Face `generate`, with their
calls in one random order on the same weights and prompts. The default is the shape of Llama-2-7B in float16 with
prompts of 10, 50, 100, 150 ... 500 tokens. On a CPU, memory is the process's resident memory.

    python benchmarks/ttft.py [--budget 120] [--baselines hf-dynamic hf-static] [--output results.json]
    python benchmarks/ttft.py --smoke          # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from call_tables import averages
from call_tables import ttft as table_by_prompt
from common import random_model, report, shape_dtype, this_device

import hybridgen
from hybridgen.comparison.data.config import BASELINES, MODES


def row_of(cell: Any) -> dict[str, Any]:
    """A cell in milliseconds."""
    row = {"mode": cell.subject, "prompt": cell.prompt_length, "batch": cell.batch_size, "status": cell.status}
    row |= {"error": cell.error, "calls": cell.repeats, "stopped": cell.stopped}
    for name in ("ttft", "tpot"):
        times = getattr(cell, name)
        for part in ("mean", "std", "p50", "p95", "p99", "low", "high"):
            value = None if times is None else getattr(times, part)
            row[f"{name}_{part}_ms"] = None if value is None else value * 1e3
    agreement = cell.agreement
    row |= {
        "tokens_per_s": cell.tokens_per_s,
        "cpu_per_step_ms": None if cell.cpu_per_step is None else cell.cpu_per_step * 1e3,
        "cpu_utilisation": cell.cpu_utilisation,
        "gpu_utilisation": cell.gpu_utilisation,
        "memory_bytes": cell.memory,
        "mbu": cell.mbu,
        "graphs": cell.graphs,
        "equal_tokens": None if agreement is None else agreement.share,
        "first_difference": None if agreement is None else agreement.first_difference,
        "logit_error": cell.logit_error,
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-7b", help="a shape of common.shape_config")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=["hf-dynamic"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[10, *range(50, 501, 50)])
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--budget", type=float, default=120, help="seconds of measured calls")
    parser.add_argument("--min-repeats", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--shared-compile", action="store_true", help="jit and hybrid share what is compiled")
    parser.add_argument("--no-utilisation", action="store_true", help="do not profile how busy the GPU is, at the end")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    name, device = arguments.model, this_device()
    options: dict[str, Any] = {
        "prompt_lengths": arguments.prompts,
        "new_tokens": arguments.new,
        "budget": arguments.budget,
        "min_repeats": arguments.min_repeats,
        "repeats": arguments.repeats,
    }
    if arguments.smoke:
        name = "tiny"
        options = {"prompt_lengths": [5, 20], "new_tokens": 3, "budget": 60.0, "min_repeats": 2, "repeats": 2}
        options |= {"compile_backend": "eager", "decode_buckets": [1], "prefill_buckets": [8, 32]}
    comparison = hybridgen.compare(
        random_model(name, shape_dtype(name, device), device),
        modes=arguments.modes,
        baselines=arguments.baselines,
        batch_sizes=1,
        fresh_compile=not (arguments.shared_compile or arguments.smoke),
        utilisation=not arguments.no_utilisation,
        **options,
    )
    rows = [row_of(cell) for cell in comparison.cells]
    result = {
        "benchmark": "ttft",
        "model": name,
        "dtype": comparison.dtype,
        "config": comparison.config.as_dict(),
        "read_ceiling_gb_per_s": None if comparison.read_ceiling is None else comparison.read_ceiling / 1e9,
        "rows": rows,
        "averages": averages(rows),
        "startup": {subject.name: subject.startup for subject in comparison.subjects},
        "notes": comparison.notes,
        "gpu_state": {
            "before": {k: v for k, v in comparison.provenance.items() if "." in k},
            "after": comparison.provenance.get("gpu_state_at_end"),
        },
    }
    print("\n".join([*table_by_prompt([result]), *comparison.notes]), flush=True)
    report(result, arguments.output)


if __name__ == "__main__":
    main()
