"""GRPO of TRL with rollouts on an engine: three steps of training on the demo model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridgen.demo import model_path

pytestmark = pytest.mark.slow
PROMPTS = ["def add(a, b):\n", "import os\n", "class A:\n", "for i in range(3):\n"]
FIELDS: dict[str, Any] = {"mode": "eager", "device": "cpu", "kv_memory": "32MiB", "max_batch": 8, "max_context": 256}


def train(tmp_path: Any, **options: Any) -> Any:
    """Three steps; the trainer."""
    pytest.importorskip("trl", reason="needs the extra trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    arguments = GRPOConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=12, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no", bf16=False,
        disable_tqdm=True, **options.pop("arguments", {}),
    )  # fmt: skip
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        **options,
    )


@pytest.mark.filterwarnings("ignore")
def test_rollouts_by_an_engine_on_the_trainer_s_weights(tmp_path: Any) -> None:
    pytest.importorskip("trl", reason="needs the extra trl")
    from hybridgen.integrations.trl import rollout

    func = rollout(**FIELDS)
    versions: list[int] = []
    differences: list[float] = []

    def watched(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        found = func(prompts, trainer)
        versions.append(func.engine.open_loop().weights_version)
        model = trainer.accelerator.unwrap_model(trainer.model)
        shared = {p.data_ptr() for p in model.parameters()}
        assert {p.data_ptr() for p in func.engine._runner.bound.model.parameters()} <= shared
        ids = torch.tensor([found["prompt_ids"][0] + found["completion_ids"][0]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(found["prompt_ids"][0]) - 1 : -1] / trainer.args.temperature
        logprobs = logits.log_softmax(-1).gather(-1, ids[0, len(found["prompt_ids"][0]) :, None])[:, 0]
        differences.append(float((logprobs - torch.tensor(found["logprobs"][0])).abs().max()))
        return found

    trainer = train(tmp_path, rollout_func=watched)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert versions == [0, 1, 2]
    assert max(differences) < 1e-3
    assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert not func.engine.stats().fallbacks
    func.close()


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_s_own_call_of_generate_is_served(tmp_path: Any) -> None:
    import hybridgen

    trainer = train(tmp_path)
    with hybridgen.attach(trainer.model, **FIELDS) as attached:
        trainer.train()
        stats = attached.engine.stats()
    assert stats.requests["length"] + stats.requests.get("stop", 0) == 12
    assert not stats.fallbacks
