"""Steering: the direction between two kinds of prompts, found in hidden states, is added by a hook while it generates.

python docs/examples/steering.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import hybridgen
from hybridgen.demo import model_path

WITH = ["class A:\n    def f(self):\n", "class B(A):\n    def g(self):\n"]
WITHOUT = ["import os\nimport sys\n", "x = 1\ny = 2\n"]
STRENGTH = 4.0

path = sys.argv[1] if len(sys.argv) > 1 else model_path()
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
with hybridgen.Engine.load(model, tokenizer=AutoTokenizer.from_pretrained(path)) as engine:
    layer = model.config.num_hidden_layers // 2
    mean = [sum(engine.hidden_states(texts, layer, pool="mean")) / len(texts) for texts in (WITH, WITHOUT)]
    direction = (mean[0] - mean[1])[0]
    direction = direction / direction.norm()

    def project() -> float:
        """How far the states behind the hook lie in the direction."""
        return float(engine.hidden_states("def main():\n", layer + 1, pool="mean")[0] @ direction)

    before = project()
    shift = (STRENGTH * direction).to(model.device, model.dtype)
    hook = model.model.layers[layer].register_forward_pre_hook(lambda module, args: (args[0] + shift, *args[1:]))
    after = project()
    out = engine.generate("def main():\n", max_new_tokens=24)
    hook.remove()
print(f"projection without {before:.2f}, with the hook {after:.2f}\n{out.text}")
