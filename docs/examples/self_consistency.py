"""Self-consistency: draw many answers, and take the one that comes most often (arXiv:2203.11171).

python docs/examples/self_consistency.py [MODEL]
"""

import sys
from collections import Counter

import hybridgen

QUESTIONS = ["import os\nimport ", "for i in range("]

model = sys.argv[1] if len(sys.argv) > 1 else None
with hybridgen.Engine.load(model) as engine:
    outs = engine.generate(QUESTIONS, n=16, temperature=0.7, max_new_tokens=6, stop="\n", seed=0)

for question, out in zip(QUESTIONS, outs):
    votes = Counter(choice.text.strip() for choice in out.choices)
    answer, count = votes.most_common(1)[0]
    print(f"{question!r}: {answer!r} with {count} of {len(out.choices)} votes")
