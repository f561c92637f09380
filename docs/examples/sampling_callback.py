"""A Trainer callback that prints what the model writes while it trains, from the weights as they are.

python docs/examples/sampling_callback.py [MODEL]
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import hybridgen
from hybridgen.demo import model_path


class Samples(TrainerCallback):
    """Generates after each step; the engine shares the weights that are trained."""

    def __init__(self, engine: hybridgen.Engine, prompts: list[str]) -> None:
        self.engine, self.prompts = engine, prompts

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        self.engine.weights_changed()
        for out in self.engine.generate(self.prompts, max_new_tokens=12):
            print(f"step {out.weights_version}: {out.prompt!r} -> {out.text!r}")


path = sys.argv[1] if len(sys.argv) > 1 else str(model_path())
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(path)
ids = tokenizer("def add(a, b):\n    return a + b\n")["input_ids"]
with (
    hybridgen.Engine.load(model, tokenizer=tokenizer, kv_memory="64MiB") as engine,
    tempfile.TemporaryDirectory() as out,
):
    arguments = TrainingArguments(out, max_steps=3, learning_rate=1e-3, report_to=[], save_strategy="no")
    callback = Samples(engine, ["def add(a, b):\n", "import "])
    rows = [{"input_ids": ids, "labels": ids}] * 8
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
