"""How fast are texts scored: at prefill's rate, and what does the prefix cache bring where questions share examples?

`score` rows: prompts with completions of random ids through `Engine.score`, beside the same tokens through
`generate(max_new_tokens=1)`, which is prefill alone; both without the prefix cache, calls in turn, medians.

`choices` rows: questions with four answers of one token behind examples that all questions of a subject share, with the
prefix cache, without, and in Hugging Face's forward as lm-evaluation-harness runs it: sorted by length, padded on the
right, one row for the four answers of a question, log-softmax of the logits. Each batch size has a few seconds, so its
rate can be of fewer questions (`by_batch` says of how many); the best rate counts.

    python benchmarks/scoring.py [--model llama-3.1-8b] [--output results.json]
    python benchmarks/scoring.py --smoke       # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import random_model, random_prompts, release, report, seconds, shape_dtype, synchronize, this_device

import hybridgen


def say(what: str) -> None:
    """A line on the error output: the whole takes minutes."""
    print(f"{time.strftime('%X')} {what}", file=sys.stderr, flush=True)


def questions(subjects: int, each: int, examples: int, length: int, vocab: int) -> tuple[list[list[int]], list[int]]:
    """Contexts with the examples of their subject in front, and four ids as answers."""
    fronts = random_prompts(subjects, examples, vocab, seed=1)
    own = random_prompts(subjects * each, length, vocab, seed=2)
    return [fronts[index // each] + ids for index, ids in enumerate(own)], [5, 6, 7, 8]


@torch.inference_mode()
def by_hugging_face(
    model: Any, contexts: list[list[int]], answers: list[int], batch: int, seconds: float = math.inf
) -> dict[int, list[float]]:
    """Log-probabilities of the answers behind each context, by its number, the longest contexts first; as many batches
    as begin within the seconds, but one at least."""
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    found: dict[int, list[float]] = {}
    until = time.perf_counter() + seconds
    for start in range(0, len(order), batch):
        if start and time.perf_counter() > until:
            break
        part = order[start : start + batch]
        width = max(len(contexts[i]) for i in part)
        ids = torch.tensor([contexts[i] + [0] * (width - len(contexts[i])) for i in part], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits.log_softmax(-1, dtype=torch.float32)
        for row, index in enumerate(part):
            found[index] = logits[row, len(contexts[index]) - 1, answers].tolist()
    return found


def by_batch(
    model: Any, contexts: list[list[int]], answers: list[int], batches: list[int], seconds: float, device: str
) -> tuple[list[dict[str, Any]], dict[int, list[float]]]:
    """A row for each batch size: how many questions were asked within the seconds, and their rate; and all that was
    found. A size that does not fit ends it."""
    rows: list[dict[str, Any]] = []
    found: dict[int, list[float]] = {}
    for batch in batches:
        try:
            by_hugging_face(model, contexts[:batch], answers, batch)
            start = time.perf_counter()
            now = by_hugging_face(model, contexts, answers, batch, seconds)
            took = time.perf_counter() - start
        except torch.OutOfMemoryError:
            rows.append({"batch": batch, "error": "out of memory"})
            break
        finally:
            if device != "cpu":
                torch.cuda.empty_cache()
        rows.append({"batch": batch, "questions": len(now), "seconds": took, "per_s": len(now) / took})
        found |= now
    return rows, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape of common.shape_config")
    parser.add_argument("--mode", default="hybrid")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hf-seconds", type=float, default=8.0, help="for each batch size of Hugging Face")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    name, device = arguments.model, this_device()
    rows, prompt, completion = arguments.rows, arguments.prompt, arguments.completion
    subjects, each, examples, length, batches = 10, 20, 600, 100, [8, 16, 32]
    options: dict[str, Any] = {"mode": arguments.mode, "max_batch": 64, "max_context": 2048, "progress": False}
    # Nothing decodes and calls that score are not recorded: a start without captures is a shorter one.
    options |= {"decode_buckets": [], "prefill_buckets": [], "kv_memory": "24GiB"}
    if arguments.smoke:
        name, rows, prompt, completion = "tiny", 6, 20, 5
        subjects, each, examples, length, batches = 2, 2, 130, 10, [2]
        options |= {"compile_backend": "eager", "max_batch": 4, "max_context": 256, "kv_memory": "16MiB"}
    model = random_model(name, shape_dtype(name, device), device)
    vocab = model.config.vocab_size
    texts = random_prompts(rows, prompt + completion, vocab)
    contexts, answers = questions(subjects, each, examples, length, vocab)
    prompts = [context for context in contexts for _ in answers]
    ends = [[answer] for _ in contexts for answer in answers]
    result: list[dict[str, Any]] = []
    tokens = rows * (prompt + completion)
    with hybridgen.Engine.load(model, prefix_cache=False, **options) as engine:
        pairs = [ids[:prompt] for ids in texts], [ids[prompt:] for ids in texts]
        fields = {"max_new_tokens": 1, "temperature": 0}
        prefill = seconds(lambda: engine.generate(texts, **fields), device, arguments.repeats)
        scoring = seconds(lambda: engine.score(*pairs), device, arguments.repeats)
        for what, took in (("prefill", prefill), ("score", scoring)):
            result.append({"what": what, "tokens": tokens, "seconds": took, "tokens_per_s": tokens / took})
        result[-1]["of_prefill"] = prefill / scoring
        say(f"score {prefill / scoring:.3f} of prefill's rate ({scoring:.2f} s)")
        synchronize(device)
        start = time.perf_counter()
        without = engine.score(prompts, ends)  # what it needs is warm: these calls are the same as those above
        plain = time.perf_counter() - start
        expected = [score.sum for score in without]
        say(f"choices without the prefix cache {plain:.2f} s")
        fallbacks = dict(engine.stats().fallbacks)
    release()
    with hybridgen.Engine.load(model, **options) as engine:
        cached = seconds(lambda: engine.score(prompts, ends), device, arguments.repeats)
        scores = engine.score(prompts, ends)
        say(f"choices with the prefix cache {cached:.2f} s")
    release()
    batched, found = by_batch(model, contexts, answers, batches, arguments.hf_seconds, device)
    best = max((row for row in batched if "per_s" in row), key=lambda row: row["per_s"])
    for what, took in (("choices, no prefix cache", plain), ("choices", cached)):
        result.append({"what": what, "questions": len(contexts), "seconds": took, "per_s": len(contexts) / took})
    result.append({"what": "choices, hugging face", **best, "by_batch": batched})
    compared = [
        (scores[index * len(answers) + place].sum, value)
        for index, values in found.items()
        for place, value in enumerate(values)
    ]
    result[-2] |= {
        "over_no_cache": plain / cached,
        "over_hugging_face": result[-2]["per_s"] / best["per_s"],
        "cached_share": sum(score.cached_tokens for score in scores) / sum(map(len, prompts)),
        "largest_difference": max(abs(ours - theirs) for ours, theirs in compared),
        "largest_difference_to_no_cache": max(
            abs(score.sum - value) for score, value in zip(scores, expected, strict=True)
        ),
    }
    for row in result:
        print(" ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    report(
        {
            "benchmark": "scoring",
            "model": name,
            "mode": arguments.mode,
            "rows": result,
            "fallbacks": fallbacks,
            "case": {"rows": rows, "prompt": prompt, "completion": completion, "examples": examples, "length": length},
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
