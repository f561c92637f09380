"""A rejection loop over a dataset: draw for all prompts, keep what a check accepts, draw again for the rest.

python docs/examples/rejection.py [MODEL]
"""

import ast
import sys

import hybridgen

PROMPTS = [f"def {name}(a, b):\n" for name in ("add", "join", "scale", "first", "swap", "check")]
ROUNDS = 6


def is_valid(text: str) -> bool:
    """Whether it is Python."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


model = sys.argv[1] if len(sys.argv) > 1 else None
accepted: dict[int, str] = {}
drawn = 0
with hybridgen.Engine.load(model) as engine:
    for round in range(ROUNDS):
        left = [index for index in range(len(PROMPTS)) if index not in accepted]
        if not left:
            break
        outs = engine.generate([PROMPTS[i] for i in left], temperature=1.0, seed=round, max_new_tokens=40, stop="\n\n")
        drawn += len(outs)
        for index, out in zip(left, outs):
            if is_valid(PROMPTS[index] + out.text):
                accepted[index] = out.text
print(f"{len(accepted)} of {len(PROMPTS)} prompts have an answer that parses, after {drawn} draws")
