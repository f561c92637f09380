"""What the probe finds, and that it leaves no trace."""

from __future__ import annotations

import families
import pytest
import torch
from torch import nn

import hybridgen
from hybridgen.cache import LayerShape
from hybridgen.errors import EngineError, UnsupportedModelError
from hybridgen.models import bind
from hybridgen.models.decoder import Unfit, describe
from hybridgen.models.layer_list import decoder_layers


def test_finds_every_layer_and_its_shape() -> None:
    model = families.build("llama")
    bound = bind(model)
    assert bound.layers == tuple(model.model.layers)
    assert [site.shape for site in bound.sites] == [LayerShape(2, 16, 16)] * 4
    # Keys and values of 2 heads of 16 in float32, 8 positions a page.
    assert [state.bytes_per_page for state in bound.layer_states(8, torch.float32)] == [8 * 2 * 2 * 16 * 4] * 4
    assert bound.reprefill_length is None
    bound.release()


def test_a_window_that_the_model_leaves_to_the_mask() -> None:
    changes = {
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    for name in ("qwen2_moe", "qwen2"):  # Qwen2 hands its own down, too
        bound = bind(families.build(name, **changes))
        assert [str(site.sees) for site in bound.sites] == ["window 8", "causal"] * 2
        bound.release()


def test_releasing_leaves_no_trace() -> None:
    model = families.build("gemma2")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    bind(model).release()
    assert model.config._attn_implementation == attention
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {
        name: set(attributes) for name, attributes in before.items()
    }


def test_a_model_has_one_engine_at_a_time() -> None:
    model = families.build("llama")
    bound = bind(model)
    with pytest.raises(EngineError, match="in use by another engine"):
        bind(model)
    bound.release()
    bind(model).release()


def test_attention_outside_a_layer_list_is_refused() -> None:
    model = families.build("llama")
    with pytest.raises(UnsupportedModelError, match="one attention per layer"):
        decoder_layers(model, [nn.Linear(1, 1)])
    with pytest.raises(UnsupportedModelError):
        decoder_layers(model, [])


def test_a_failed_probe_restores_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("llama")

    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    model.model.norm.register_forward_hook(refuse)
    with pytest.raises(RuntimeError, match="no"):
        bind(model)
    assert model.config._attn_implementation == "eager"
    assert not any("_hybridgen_note" in vars(module) for module in model.modules())


def test_logits_to_keep_selects_tokens() -> None:
    """The portable form that `forward` relies on."""
    model = families.build("llama")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        everything = model(input_ids=ids, use_cache=False).logits
        kept = model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor([1, 3])).logits
    assert torch.allclose(kept, everything[:, [1, 3]], atol=1e-5)


def test_a_head_that_cannot_give_all_ids() -> None:
    """Prompts have all of them; those that the head lacks are never chosen, and have no probability."""
    model = families.build("llama")
    given = 193
    head = torch.nn.Linear(64, given, bias=False)
    head.weight = nn.Parameter(model.lm_head.weight.detach()[:given].clone())
    model.lm_head = head
    prompts = families.prompts_of((7, 33))
    expected = [families.reference(model, prompt, 12)[0] for prompt in prompts]
    with hybridgen.Engine.load(model, mode="eager", kv_memory="16MiB", max_batch=4) as engine:
        outs = engine.generate(prompts, max_new_tokens=12)
        assert [list(out.token_ids) for out in outs] == expected
        drawn = engine.generate(
            prompts * 2, max_new_tokens=12, temperature=5.0, top_p=0.99, repetition_penalty=1.2, logprobs=2
        )
        assert not [out.error for out in drawn if out.error]
        assert max(token for out in drawn for token in out.token_ids) < given
        scores = engine.score(prompts[0]).logprobs
        assert [value == -torch.inf for value in scores] == [token >= given for token in prompts[0][1:]]
    bound = bind(model)
    with pytest.raises(Unfit, match="cannot give all ids"):
        describe(model, bound.sites, bound.weights, 64)
    bound.release()
