"""GRPO with rollouts on an engine that shares the trainer's weights: pip install "hybridgen[trl]".

python docs/examples/grpo.py [MODEL] [STEPS]
"""

import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from hybridgen.demo import model_path
from hybridgen.integrations.trl import rollout

path = sys.argv[1] if len(sys.argv) > 1 else str(model_path())
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 2
prompts = ["def add(a, b):\n", "import os\n", "class A:\n", "for i in range(3):\n"]


def reward(completions: list[str], **_: object) -> list[float]:
    """More different characters are better."""
    return [float(len(set(text))) for text in completions]


tokenizer = AutoTokenizer.from_pretrained(path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
generate = rollout(max_batch=8, max_context=256, kv_memory="64MiB")
with tempfile.TemporaryDirectory() as directory:
    trainer = GRPOTrainer(
        model=path,
        reward_funcs=reward,
        rollout_func=generate,
        args=GRPOConfig(
            output_dir=directory,
            max_steps=steps,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=16,
            report_to=[],
            save_strategy="no",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.train()
print(f"{steps} steps, {generate.engine.stats().tokens['generated']} tokens generated on the trainer's weights")
generate.close()
