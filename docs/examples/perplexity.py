"""Perplexity of a text that is longer than the context, in windows that overlap.

Each window scores the tokens that the one before did not; what they share is context.

    python docs/examples/perplexity.py [MODEL] [FILE]
"""

import math
import sys
from pathlib import Path

import hybridgen

WINDOW, STRIDE = 512, 256

model = sys.argv[1] if len(sys.argv) > 1 else None
text = Path(sys.argv[2] if len(sys.argv) > 2 else hybridgen.errors.__file__).read_text()

with hybridgen.Engine.load(model, max_context=WINDOW) as engine:
    ids = engine.tokenizer(text)["input_ids"]
    prompts, completions = [ids[:1]], [ids[1:WINDOW]]
    for start in range(WINDOW, len(ids), STRIDE):
        end = min(start + STRIDE, len(ids))
        prompts.append(ids[end - WINDOW : start])
        completions.append(ids[start:end])
    scores = engine.score(prompts, completions)

total = math.fsum(score.sum for score in scores)
count = sum(len(score.logprobs) for score in scores)
print(f"{count} tokens in {len(scores)} windows, perplexity {math.exp(-total / count):.3f}")
