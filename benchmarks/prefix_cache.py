"""What does the prefix cache bring: many questions over one long context, and the last turn of a chat?

- questions: prompts that share a context and end in a question of their own, a few tokens for each, in one call; wall
  time of the call with the prefix cache (empty before it), over the same call without.
- chat: turns one after another, each prompt is all that was said before and a new message; time to the first token of
  the last turn with the cache, over without. Conversations of other ids, median.

Mode `hybrid`, random weights, greedy, end-of-sequence ignored. The engine reads a checkpoint of its own: one on a live
module forgets prefixes from call to call, because the module's weights can have changed.

    python benchmarks/prefix_cache.py [--model llama-3.1-8b] [--output results.json]
    python benchmarks/prefix_cache.py --smoke          # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import random_model, random_prompts, release, report, shape_dtype, synchronize, this_device

from hybridgen import Engine


def questions(engine: Engine, case: dict[str, int], vocab: int, device: str, seed: int) -> tuple[float, float]:
    """Seconds of the call, and the share of the prompts' tokens that were found."""
    context = random_prompts(1, case["context"], vocab, seed=seed)[0]
    prompts = [context + ids for ids in random_prompts(case["questions"], case["question"], vocab, seed=seed + 1)]
    synchronize(device)
    start = time.perf_counter()
    found = engine.generate(prompts, max_new_tokens=case["answer"], temperature=0, ignore_eos=True)
    synchronize(device)
    took = time.perf_counter() - start
    return took, sum(out.cached_tokens for out in found) / sum(map(len, prompts))


def chat(engine: Engine, case: dict[str, int], vocab: int, seed: int) -> tuple[float, float]:
    """Seconds to the first token of the last turn, and the share of its prompt that was found."""
    said: list[int] = []
    took = share = 0.0
    for message in random_prompts(case["turns"], case["message"], vocab, seed=seed):
        said += message
        out = engine.generate(said, max_new_tokens=case["reply"], temperature=0, ignore_eos=True)
        took, share = out.timing.ttft, out.cached_tokens / len(said)
        said += out.token_ids
    return took, share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape of common.shape_config")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    name, device, repeats = arguments.model, this_device(), arguments.repeats
    case = {"context": 4000, "questions": 200, "question": 32, "answer": 16}
    case |= {"turns": 8, "message": 300, "reply": 100}
    options: dict[str, Any] = {"mode": "hybrid", "max_batch": 64, "max_context": 4608, "progress": False}
    if arguments.smoke:
        name, repeats = "tiny", 1
        case = {"context": 150, "questions": 4, "question": 8, "answer": 3, "turns": 3, "message": 40, "reply": 8}
        options |= {"compile_backend": "eager", "max_batch": 4, "max_context": 256, "kv_memory": "16MiB"}
        options |= {"decode_buckets": [1, 4], "prefill_buckets": [32]}
    model = random_model(name, shape_dtype(name, device), device, join=False)
    vocab = model.config.vocab_size
    directory = tempfile.TemporaryDirectory()
    model.save_pretrained(directory.name)
    del model
    release()
    found: dict[str, dict[bool, tuple[float, float]]] = {"questions": {}, "chat": {}}
    for cache in (False, True):
        with Engine.load(directory.name, prefix_cache=cache, **options) as engine:
            small = case | {"questions": 2}
            questions(engine, small, vocab, device, 900)  # what it missed is recorded
            chat(engine, case, vocab, 901)
            while engine.idle():
                pass
            # A call without the cache takes long, and many of them say the same.
            timed = [questions(engine, case, vocab, device, 10 * i) for i in range(repeats if cache else 1)]
            turns = [chat(engine, case, vocab, 500 + i) for i in range(repeats)]
            for what, measured in (("questions", timed), ("chat", turns)):
                found[what][cache] = (
                    statistics.median(took for took, _ in measured),
                    statistics.median(share for _, share in measured),
                )
        release()
    directory.cleanup()
    rows = []
    for what, by_cache in found.items():
        row = {
            "what": what,
            "seconds_without": by_cache[False][0],
            "seconds": by_cache[True][0],
            "over_without": by_cache[True][0] / by_cache[False][0],
            "cached_share": by_cache[True][1],
        }
        rows.append(row)
        print(" ".join(f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in row.items()))
    report({"benchmark": "prefix_cache", "model": name, "case": case, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
