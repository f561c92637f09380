"""How good is the demo model: its loss in each format that is read or made, and how often does its Python parse?

python benchmarks/demo_model.py --output benchmarks/results/demo-model-cpu.json

Both on files of the standard library that it was not trained on. The loss is the mean over all tokens but the first of
each window. For parsing, a prompt is a class or a function of such a file, up to and with the head of a function. What
is generated is kept up to the first line that no longer belongs to that function, or to the last whole line, and
`ast.parse` judges prompt and answer together. Prompts that do not parse with `pass` as the answer are left out.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import math
import random
import re
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import demo_formats
import torch
from common import held_out_files, report
from transformers import AutoModelForCausalLM

import hybridgen
from hybridgen.config import EngineConfig
from hybridgen.demo import model_path
from hybridgen.loading.export import FORMATS, write_quantised

ENGINE: dict[str, Any] = {"mode": "eager", "device": "cpu", "max_batch": 32, "kv_memory": "512MiB"}
HEAD = re.compile(r"^( *)def \w+\([^()\n]*\):\n", re.MULTILINE)
LEAST = 20
"""Tokens of a prompt at least."""


def windows(tokenizer: Any, texts: list[str], length: int) -> list[list[int]]:
    """All files as rows of so many tokens; what is left of a file is left out."""
    rows = []
    for text in texts:
        ids = tokenizer.backend_tokenizer.encode(text).ids
        rows += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return rows


def further_files(count: int) -> list[str]:
    """Texts of other files than those, for scales of the cache."""
    names = set(json.loads((model_path() / "training.json").read_text())["corpus"]["held_out_files"])
    library = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text() for path in sorted(library.glob("*.py")) if path.name not in names][:count]


@torch.inference_mode()
def kv_scales(rows: list[list[int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By attention module the scales of keys and values, one for each head: the largest of these windows is 448."""
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    cache = model(torch.tensor(rows), use_cache=True).past_key_values
    return {
        f"model.layers.{number}.self_attn": (
            layer.keys.abs().amax((0, 2, 3)) / 448,
            layer.values.abs().amax((0, 2, 3)) / 448,
        )
        for number, layer in enumerate(cache.layers)
    }


def loss(model: Any, rows: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """Nats a token of a model, loaded with these options."""
    with hybridgen.Engine.load(model, **{**ENGINE, "dtype": "float32", **options}) as engine:
        scores = engine.score(rows)
        formats = {name: row._asdict() for name, row in engine.stats().weights.items()}
    tokens = sum(len(score.logprobs) for score in scores)
    nats = -sum(score.sum for score in scores) / tokens
    return {"nats_per_token": nats, "perplexity": math.exp(nats), "tokens": tokens, "formats": formats}


def cases(
    place: Path, scaling: list[list[int]], smoke: bool
) -> Iterator[tuple[str, Any, dict[str, Any], float | None]]:
    """Name, model, options and the bits of a stored weight, if its format is one of `demo_formats.py`.

    Args:
        place: for checkpoints.
        scaling: windows that scales of keys and values are made of.
    """
    yield "float32", None, {}, None
    yield "bfloat16", None, {"dtype": "bfloat16"}, None
    for kind in ("fp8", "int8", "int4")[: 1 if smoke else None]:
        yield f"quantization={kind}", None, {"quantization": kind}, None
    yield "quantization=fp8, fp8_activations", None, {"quantization": "fp8", "fp8_activations": True}, None
    for number, name in enumerate(list(demo_formats.FORMATS)[: 2 if smoke else None]):
        bits = demo_formats.write(name, place / str(number))
        yield name, str(place / str(number)), {}, bits
    for name in FORMATS[: 1 if smoke else None]:
        write_quantised(str(model_path()), place / name, name, EngineConfig(device="cpu"), lambda line: None)
        yield f"hybridgen quantize --format {name}", str(place / name), {}, None
    yield "kv_dtype=fp8, scales of 1", None, {"kv_dtype": "fp8"}, None
    demo_formats.write_kv_scales(place / "kv", kv_scales(scaling))
    yield "kv_dtype=fp8, a scale for each head", str(place / "kv"), {"kv_dtype": "fp8"}, None


def losses(rows: list[list[int]], scaling: list[list[int]], smoke: bool, jobs: int) -> dict[str, Any]:
    """By format: quantised while loading, read from checkpoints, and with keys and values in 8 bits."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        every = list(cases(Path(place), scaling, smoke))
        calls = [(model, rows, options) for _, model, options, _ in every]
        run: Any = map
        if jobs > 1:
            run = stack.enter_context(ProcessPoolExecutor(jobs, get_context("spawn"))).map
        for (name, *_, bits), row in zip(every, run(loss, *zip(*calls, strict=True)), strict=True):
            found[name] = row
            row["over_float32"] = row["nats_per_token"] / found["float32"]["nats_per_token"]
            if bits is not None:
                row["stored_bits"] = bits
            print(
                f"{name:52} {row['nats_per_token']:.4f} nats a token, {row['over_float32']:.4f} of float32's",
                flush=True,
            )
    return found


def heads(tokenizer: Any, texts: list[str], count: int, most: int) -> list[tuple[str, int]]:
    """Prompts that end with a function's head, and the indentation of its `def`; drawn with a fixed seed."""
    found = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        starts = list(itertools.accumulate((len(line) for line in lines), initial=0))
        for node in ast.parse(text).body:
            begin = starts[min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1]
            for match in HEAD.finditer(text, begin, starts[node.end_lineno or node.lineno]):
                prompt = text[begin : match.end()]
                tokens = len(tokenizer.backend_tokenizer.encode(prompt).ids)
                if parses(f"{prompt}{match[1]}    pass\n") and LEAST <= tokens <= most:
                    found.append((prompt, len(match[1])))
    random.Random(0).shuffle(found)
    return found[:count]


def body(text: str, indent: int, *, ended: bool) -> str:
    """The lines of an answer that belong to the function: whole ones, unless the model ended by itself."""
    lines = text.splitlines(keepends=True)
    if not ended:
        lines = lines[:-1]
    kept = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip(" ")) <= indent:
            break
        kept.append(line)
    return "".join(kept)


def parses(text: str) -> bool:
    """Whether it is Python."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def parsing(texts: list[str], count: int, new: int) -> list[dict[str, Any]]:
    """How often prompt and answer parse: greedy and sampled, with the checkpoint's repetition penalty and without."""
    rows = []
    with hybridgen.Engine.load(None, dtype="float32", **ENGINE) as engine:
        found = heads(engine.tokenizer, texts, count, 1024 - new)
        for temperature, penalty in itertools.product((0.0, 0.8), (None, 1.0)):
            options = {} if penalty is None else {"repetition_penalty": penalty}
            outs = engine.generate(
                [p for p, _ in found], temperature=temperature, seed=0, max_new_tokens=new, **options
            )
            answers = [
                body(out.text, indent, ended=out.finish_reason.value == "stop")
                for out, (_, indent) in zip(outs, found, strict=True)
            ]
            good = sum(parses(prompt + answer) for (prompt, _), answer in zip(found, answers, strict=True))
            lines = sum(answer.count("\n") for answer in answers)
            row = {"temperature": temperature, "repetition_penalty": penalty or "the checkpoint's"}
            rows.append({**row, "prompts": len(found), "new": new, "parse": good, "lines": lines})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--no-losses", action="store_true", help="only count what parses")
    parser.add_argument("--every", type=int, default=1, help="1: all windows have a part in the losses; 2: each second")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the losses")
    parser.add_argument("--smoke", action="store_true", help="two files, few prompts")
    arguments = parser.parse_args()
    texts = held_out_files()[: 2 if arguments.smoke else None]
    length, most = (128, 2) if arguments.smoke else (512, None)
    with hybridgen.Engine.load(None, **ENGINE) as engine:
        rows = windows(engine.tokenizer, texts, length)[:: arguments.every][:most]
        scaling = windows(engine.tokenizer, further_files(8), length)[: most or 32]
    begun = time.time()
    results: dict[str, Any] = {"files": len(texts)}
    results["losses"] = {} if arguments.no_losses else losses(rows, scaling, arguments.smoke, arguments.jobs)
    results["parsing"] = parsing(texts, 4 if arguments.smoke else arguments.prompts, 16 if arguments.smoke else 160)
    for row in results["parsing"]:
        how = f"temperature {row['temperature']}, penalty {row['repetition_penalty']}"
        print(f"{how}: {row['parse']} of {row['prompts']} parse, {row['lines']} lines")
    print(f"{time.time() - begun:.0f} s")
    report(results, arguments.output)


if __name__ == "__main__":
    main()
