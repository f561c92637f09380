"""How fast are texts scored: at prefill's rate, and what does the prefix cache bring where questions share examples?

`score` rows: prompts with completions of random ids through `Engine.score`, beside the same tokens through
`generate(max_new_tokens=1)`, which is prefill alone; both without the prefix cache, calls in turn, medians.

`choices` rows: questions with four answers of one token behind examples that all questions of a subject share, with the
prefix cache, without, and in Hugging Face's forward as lm-evaluation-harness runs it: sorted by length, padded on the
right, one row for the four answers of a question, log-softmax of the logits; its best batch of those tried.

    python benchmarks/scoring.py [--model llama-3.1-8b] [--output results.json]
    python benchmarks/scoring.py --smoke       # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import random_model, random_prompts, release, report, seconds, shape_dtype, this_device

import hybridgen


def questions(subjects: int, each: int, examples: int, length: int, vocab: int) -> tuple[list[list[int]], list[int]]:
    """Contexts with the examples of their subject in front, and four ids as answers."""
    fronts = random_prompts(subjects, examples, vocab, seed=1)
    own = random_prompts(subjects * each, length, vocab, seed=2)
    return [fronts[index // each] + ids for index, ids in enumerate(own)], [5, 6, 7, 8]


@torch.inference_mode()
def by_hugging_face(model: Any, contexts: list[list[int]], answers: list[int], batch: int) -> list[list[float]]:
    """Log-probabilities of the answers behind each context."""
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    found: list[list[float]] = [[] for _ in contexts]
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        width = max(len(contexts[i]) for i in part)
        ids = torch.tensor([contexts[i] + [0] * (width - len(contexts[i])) for i in part], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits.log_softmax(-1, dtype=torch.float32)
        for row, index in enumerate(part):
            found[index] = logits[row, len(contexts[index]) - 1, answers].tolist()
    return found


def best_batch(model: Any, contexts: list[list[int]], answers: list[int], batches: list[int], device: str) -> Any:
    """The fastest of some batch sizes: its size, seconds, and what it found; sizes that do not fit are left out."""
    best: tuple[int, float, Any] | None = None
    for batch in batches:
        try:
            by_hugging_face(model, contexts[:batch], answers, batch)
            start = time.perf_counter()
            found = by_hugging_face(model, contexts, answers, batch)
            took = time.perf_counter() - start
        except torch.OutOfMemoryError:
            break
        finally:
            if device != "cpu":
                torch.cuda.empty_cache()
        if best is None or took < best[1]:
            best = batch, took, found
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape of common.shape_config")
    parser.add_argument("--mode", default="hybrid")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    name, device = arguments.model, this_device()
    rows, prompt, completion = arguments.rows, arguments.prompt, arguments.completion
    subjects, each, examples, length, batches = 10, 20, 600, 100, [4, 8, 16, 32]
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
        plain = seconds(lambda: engine.score(prompts, ends), device, 1)
        expected = [score.sum for score in engine.score(prompts, ends)]
        fallbacks = dict(engine.stats().fallbacks)
    release()
    with hybridgen.Engine.load(model, **options) as engine:
        cached = seconds(lambda: engine.score(prompts, ends), device, arguments.repeats)
        scores = engine.score(prompts, ends)
    release()
    batch, theirs, found = best_batch(model, contexts, answers, batches, device)
    reference = [value for values in found for value in values]
    for what, took in (("choices, no prefix cache", plain), ("choices", cached), ("choices, hugging face", theirs)):
        result.append({"what": what, "questions": len(contexts), "seconds": took, "per_s": len(contexts) / took})
    result[-2] |= {
        "over_no_cache": plain / cached,
        "over_hugging_face": theirs / cached,
        "cached_share": sum(score.cached_tokens for score in scores) / sum(map(len, prompts)),
        "largest_difference": max(abs(score.sum - value) for score, value in zip(scores, reference, strict=True)),
        "largest_difference_to_no_cache": max(
            abs(score.sum - value) for score, value in zip(scores, expected, strict=True)
        ),
    }
    result[-1] |= {"batch": batch}
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
