"""A twin shares the weights and nothing else."""

from __future__ import annotations

import families
import pytest
import torch

import hybridgen
from hybridgen.models import check_free
from hybridgen.models.projections import fuse_projections
from hybridgen.models.sharing import twin


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi3"])
def test_parameters_are_shared_and_modules_are_not(family: str) -> None:
    model = families.build(family)
    other = twin(model)
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}
    assert other.config is not model.config


def test_joined_weights_are_shared_too() -> None:
    model = twin(families.build("llama"))
    fuse_projections(model)
    other = twin(model)
    ours, theirs = model.model.layers[0].self_attn.q_proj, other.model.layers[0].self_attn.q_proj
    assert ours.fused_weight is theirs.fused_weight
    assert ours.fused_slots[0] is not theirs.fused_slots[0]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_engines_of_several_modes_run_beside_each_other_on_one_copy_of_the_weights() -> None:
    model = families.build("llama")
    prompts = families.prompts_of((3, 9))
    expected = [families.reference(model, prompt, 6)[0] for prompt in prompts]
    template = twin(model)
    fuse_projections(template)
    engines = {
        mode: hybridgen.Engine.load(twin(template), mode=mode, max_batch=2, max_context=32, compile_backend="eager")
        for mode in ("eager", "jit", "graph", "hybrid")
    }
    try:
        for _ in range(2):
            for mode, engine in engines.items():
                found = engine.generate(prompts, max_new_tokens=6, temperature=0, ignore_eos=True)
                assert [list(completion.token_ids) for completion in found] == expected, mode
        # The first tree is free all the while, and still Hugging Face's.
        check_free(model)
        assert families.reference(model, prompts[0], 6)[0] == expected[0]
    finally:
        for engine in engines.values():
            engine.close()


def test_closing_one_engine_leaves_the_other_as_it_was() -> None:
    template = twin(families.build("llama"))
    fuse_projections(template)
    first, second = (hybridgen.Engine.load(twin(template), mode="eager", max_context=32) for _ in range(2))
    before = second.generate([5, 6, 7], max_new_tokens=4, temperature=0, ignore_eos=True)
    first.close()
    after = second.generate([5, 6, 7], max_new_tokens=4, temperature=0, ignore_eos=True)
    second.close()
    assert before.token_ids == after.token_ids
