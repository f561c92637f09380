"""Best of n: sample n completions of a prompt, and take the one that the model finds likeliest per token.

python docs/examples/best_of_n.py [MODEL]
"""

import sys

import hybridgen

model = sys.argv[1] if len(sys.argv) > 1 else None
with hybridgen.Engine.load(model) as engine:
    out = engine.generate("def add(a, b):\n", n=8, temperature=1.0, top_p=0.95, seed=1, max_new_tokens=24)
    scores = engine.score(list(out.prompt_token_ids), [list(choice.token_ids) for choice in out.choices])

best = max(range(len(scores)), key=lambda i: scores[i].sum / len(scores[i].logprobs))
for index, (choice, score) in enumerate(zip(out.choices, scores)):
    mark = "*" if index == best else " "
    print(f"{mark} {score.sum / len(score.logprobs):6.3f} {choice.text!r}")
