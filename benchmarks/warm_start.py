"""How long from the start of a process to its first token: Hugging Face, mode eager, mode hybrid cold and warm?

Every case is a fresh process that reads a checkpoint of random weights (sharded safetensors, in the page cache).
`cold` has an empty compile cache, `warm` the one that `cold` left; `hybridgen-eager` has a warm one too, of its own.
`depth` is a cold start with half of the layers, and with all unless `cold` is measured; `import` is what `hybridgen`
adds to torch and the model class of transformers.

    python benchmarks/warm_start.py --shapes llama-3.2-1b --cases hf,eager,cold,warm
    python benchmarks/warm_start.py --shapes llama-3.1-8b --cases depth
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = ("hf", "eager", "cold", "warm", "depth", "import")
PROMPT, NEW_TOKENS = 64, 16


def child(case: str, path: str, began: float) -> dict[str, Any]:
    """In a fresh process: load, generate, and say when the first token was there."""
    if case == "import":
        return _import_seconds()
    ids = list(range(5, 5 + PROMPT))
    if case == "hf":
        return _hugging_face(path, ids, began)
    import hybridgen

    mode = "eager" if case == "eager" else "hybrid"
    with hybridgen.Engine.load(path, mode=mode, max_context=1024) as engine:
        ready = time.time() - began
        events = engine.stream(ids, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        tokens = [next(events).token_id]
        first = time.time() - began
        tokens += [event.token_id for event in events]
        stats = engine.stats().as_dict()
    kept = {name: stats[name] for name in ("startup", "artifacts", "compiled", "late_compiles", "fallbacks")}
    return {
        "first_token_s": first,
        "ready_s": ready,
        "tokens": tokens,
        "graphs": len(stats["graphs"]["graphs"]),
        **kept,
    }


def _hugging_face(path: str, ids: list[int], began: float) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map={"": device}).eval()
    ready = time.time() - began
    prompt = torch.tensor([ids], device=device)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
    return {"first_token_s": time.time() - began, "ready_s": ready, "tokens": out[0, PROMPT:].tolist()}


def _import_seconds() -> dict[str, Any]:
    start = time.perf_counter()
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    theirs = time.perf_counter()
    from hybridgen import Engine  # noqa: F401

    return {"libraries_s": theirs - start, "hybridgen_s": time.perf_counter() - theirs}


def run(case: str, path: Path, store: Path) -> dict[str, Any]:
    """One case in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_DIR")}
    environment |= {"HYBRIDGEN_CACHE_DIR": str(store), "HYBRIDGEN_COMPILE_CACHE": "1"}
    command = [sys.executable, __file__, "--child", case, "--path", str(path), "--began", repr(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def write(shape: str, layers: int | None, directory: Path) -> Path:
    """A checkpoint of that shape with random weights; being written, it is in the page cache."""
    import torch
    from common import random_model, shape_config, shape_dtype, this_device

    device = this_device()
    path = directory / f"{shape}-{layers or 'all'}"
    if path.exists():
        return path
    if layers is None:
        model = random_model(shape, shape_dtype(shape, device), device)
    else:
        from transformers import AutoModelForCausalLM

        config = shape_config(shape)
        config.num_hidden_layers, config.eos_token_id = layers, None
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=shape_dtype(shape, device)).eval()
    model.save_pretrained(path, max_shard_size="2GB")
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return path


def measure(shape: str, cases: list[str], directory: Path, repeats: int, rows: list[dict[str, Any]]) -> None:
    """All cases of a shape, each added to the rows when it is done."""
    from common import shape_config

    def add(case: str, results: list[dict[str, Any]], **more: Any) -> None:
        last = results[-1]
        name = "first_token_s" if "first_token_s" in last else "hybridgen_s"
        times = [result[name] for result in results]
        row = {
            "shape": shape,
            "case": case,
            "median_s": statistics.median(times),
            "times_s": times,
            **more,
            "last": last,
        }
        rows.append(row)
        print(f"{shape:14} {case:16} {row['median_s']:8.2f} s   {_parts(last)}", flush=True)

    store, own = directory / f"store-{shape}", directory / f"eager-{shape}"
    layers = shape_config(shape).num_hidden_layers
    if set(cases) & {"hf", "eager", "cold", "warm"}:
        path = write(shape, None, directory)
        if "hf" in cases:
            add("hf", [run("hf", path, own) for _ in range(repeats)])
        if "eager" in cases:
            run("eager", path, own)
            add("eager", [run("eager", path, own) for _ in range(repeats)])
        if "cold" in cases or "warm" in cases:
            add("cold", [run("cold", path, store)])
        if "warm" in cases:
            add("warm", [run("warm", path, store) for _ in range(repeats)])
    if "depth" in cases:
        # A cold start with all layers is what `cold` is.
        for count in (max(1, layers // 2), *(() if {"cold", "warm"} & set(cases) else (layers,))):
            path = write(shape, count, directory)
            add(f"cold, {count} layers", [run("cold", path, directory / f"depth-{count}")], layers=count)
            shutil.rmtree(path)
    if "import" in cases:
        add("import", [run("import", directory, store) for _ in range(repeats + 1)])


def _parts(result: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result.get("startup", {}).items())
    cache = result.get("artifacts", {}).get("state", "")
    return f"{parts}  {cache} {result.get('graphs', '')}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-3.2-1b,llama-3.1-8b")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where checkpoints and stores go (default: temporary)")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, hybrid cold and warm")
    parser.add_argument("--output", type=Path)
    for name in ("--child", "--path"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.path, arguments.began)))
        return
    from common import report

    shapes = ["tiny"] if arguments.smoke else arguments.shapes.split(",")
    cases = ["cold", "warm"] if arguments.smoke else arguments.cases.split(",")
    unknown = set(cases) - set(CASES)
    if unknown:
        raise SystemExit(f"unknown case {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}")
    repeats = 1 if arguments.smoke else arguments.repeats
    directory = Path(tempfile.mkdtemp(prefix="warm-start-", dir=arguments.directory))
    rows: list[dict[str, Any]] = []
    try:
        for shape in shapes:
            measure(shape, cases, directory, repeats, rows)
    finally:  # also what was measured before an interrupt
        report({"benchmark": "warm_start", "prompt": PROMPT, "repeats": repeats, "rows": rows}, arguments.output)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
