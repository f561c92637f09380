"""What a model's own mask preparation is found to do, and which models are refused for it."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import families
import multimodal
import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

from hybridgen import Engine, EngineConfig
from hybridgen.errors import UnsupportedModelError
from hybridgen.loading import Checkpoint
from hybridgen.models import bind, probe
from hybridgen.models.probe import probe_config, probe_model, read_options
from hybridgen.models.text_part import text_part

PROMPT = list(range(3, 40))


def seen(name: str, **changes: object) -> list[str]:
    """What the layers of a model of this config see, from the config and from the model alike."""
    model = families.build(name, **changes)
    calls = probe_model(model, 512)
    assert probe_config(model.config, 512) == calls
    return [str(call.sees) for call in calls]


def test_each_layer_has_its_own_mask() -> None:
    assert seen("llama") == ["causal"] * 4
    assert seen("mistral") == ["window 8"] * 4
    assert seen("gemma3_text") == ["window 8", "causal"] * 2
    assert seen("llama4_text") == ["chunk 24", "causal"]
    # The window reaches attention through the mask alone, or is off although there is a number for it.
    assert seen("qwen2_moe") == ["window 8", "causal"] * 2
    assert seen("qwen2", use_sliding_window=False) == ["causal"] * 4


def test_nothing_below_the_context_shows_a_longer_window() -> None:
    model = families.build("mistral", sliding_window=64)
    assert {str(call.sees) for call in probe_model(model, 64)} == {"causal"}
    assert {str(call.sees) for call in probe_model(model, 65)} == {"window 64"}


# ------------------------------------------------------------------ refused


def config_not_causal(model: PreTrainedModel) -> None:
    model.config.is_causal = False


def modules_not_causal(model: PreTrainedModel) -> None:
    model.model.layers[2].self_attn.is_causal = False


def layer_twice(model: PreTrainedModel) -> None:
    model.model.layers[3] = model.model.layers[1]


def attention_twice(model: PreTrainedModel) -> None:
    model.model.layers[3].self_attn = model.model.layers[0].self_attn


def one_layer_everywhere(model: PreTrainedModel) -> None:
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 4)


def attention_hands_down_a_bias(model: PreTrainedModel) -> None:
    original = modeling_llama.LlamaAttention.forward

    class Biased(modeling_llama.LlamaAttention):
        def forward(self, *args: object, **kwargs: object) -> object:
            return original(self, *args, position_bias=torch.zeros(1), **kwargs)

    model.model.layers[1].self_attn.__class__ = Biased


def heads_that_do_not_divide(model: PreTrainedModel) -> None:
    attention = model.model.layers[0].self_attn
    attention.k_proj, attention.v_proj = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (config_not_causal, "layers.0.self_attn .*not causal"),
        (modules_not_causal, r"layers.2.self_attn: its attention is not causal \(is_causal=False\)"),
        (layer_twice, "uses model.layers.1.self_attn 2 times in one forward pass"),
        (attention_twice, "uses model.layers.0.self_attn 2 times in one forward pass"),
        (one_layer_everywhere, "uses model.layers.0.self_attn 4 times in one forward pass"),
        (attention_hands_down_a_bias, "hands its attention function position_bias"),
        (heads_that_do_not_divide, "4 attention heads over 3 key/value heads"),
    ],
)
def test_a_changed_module_is_refused(change: Callable[[PreTrainedModel], None], words: str) -> None:
    model = families.build("llama")
    bind(model).release()
    change(model)
    with pytest.raises(UnsupportedModelError, match=words):
        bind(model)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "not causal"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "not causal"),
    ],
)
def test_an_option_of_a_config_is_refused(name: str, changes: dict, words: str) -> None:
    if families.is_absent(name):
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(UnsupportedModelError, match=words):
        bind(families.build(name, **changes))


class Counting(modeling_llama.LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.arange(x.shape[1], device=x.device)[None, :, None]


def test_a_module_that_numbers_the_tokens_of_a_call_is_refused() -> None:
    model = families.build("llama")
    model.model.layers[1].mlp.__class__ = Counting
    with pytest.raises(UnsupportedModelError, match="numbers the tokens of a call itself"):
        bind(model)


def test_a_mask_with_one_value_for_all_tokens_is_read_at_any_length() -> None:
    model = multimodal.build("gemma4_unified", use_bidirectional_attention="vision")
    assert [str(call.sees) for call in probe_model(text_part(model), 400)] == ["window 8", "causal"]


def test_mask_functions_of_a_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("llama")
    original = modeling_llama.create_causal_mask
    prefix = functools.partial(original, or_mask_function=lambda b, h, q, kv: kv < 4)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", prefix)
    with pytest.raises(UnsupportedModelError, match="position 0 sees the later position 1"):
        bind(model)
    windowed = functools.partial(original, and_mask_function=lambda b, h, q, kv: kv > q - 6)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", windowed)
    assert seen("llama") == ["window 6"] * 4
    for rule in (
        lambda b, h, q, kv: kv % 2 == 0,
        lambda b, h, q, kv: (kv > q - 6) | (kv < 2),  # a window, and the first tokens
        lambda b, h, q, kv: (kv < q) | (q < 20),  # itself, at the first positions alone
    ):
        monkeypatch.setattr(modeling_llama, "create_causal_mask", functools.partial(original, and_mask_function=rule))
        with pytest.raises(UnsupportedModelError, match="position"):
            bind(model)
    for made in (None, torch.zeros(1, 1, 29, 29)):
        monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *_, made=made, **__: made)
        with pytest.raises(UnsupportedModelError, match="without a mask, or with one that transformers'"):
            bind(model)


def test_attention_functions_of_a_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(*args: object, **kwargs: object) -> object:
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return out * 0.5, weights

    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", dict(AttentionMaskInterface._global_mapping))
    AttentionInterface.register("halved", halved)
    AttentionInterface.register("no_mask", sdpa_attention_forward)
    AttentionInterface.register("other_mask", sdpa_attention_forward)
    AttentionMaskInterface.register("other_mask", lambda **kwargs: sdpa_mask(**kwargs).logical_not())
    AttentionInterface.register("a_copy", sdpa_attention_forward)
    AttentionMaskInterface.register("a_copy", sdpa_mask)
    model = families.build("llama")
    for name, words in (
        ("halved", "'halved' is not one of transformers' own but .*halved"),
        ("no_mask", "mask function of its attention 'no_mask' is missing"),
        ("other_mask", "mask function of its attention 'other_mask' is .*lambda"),
    ):
        model.set_attn_implementation(name)
        with pytest.raises(UnsupportedModelError, match=words):
            bind(model)
        assert model.config._attn_implementation == name
    for name in ("a_copy", "sdpa", "eager"):
        model.set_attn_implementation(name)
        bind(model).release()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", halved)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match="'sdpa' is not one of transformers' own"):
        bind(model)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", halved)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="'eager' is not one of transformers' own"):
        bind(model)


def test_the_eager_attention_of_another_family_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_qwen2.eager_attention_forward
    monkeypatch.setattr(
        modeling_qwen2,
        "eager_attention_forward",
        lambda module, query, *args, **kwargs: original(module, query * 2, *args, **kwargs),
    )
    model = families.build("qwen2")
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="'eager' is not one of transformers' own"):
        bind(model)
    bind(families.build("llama")).release()


def test_one_layer_of_several_kinds_is_not_causal() -> None:
    model = families.build("gemma3_text")
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn.*not causal"):
        bind(model)


def test_a_mask_from_a_replaced_forward_is_refused() -> None:
    model = families.build("llama")
    attention = model.model.layers[1].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, **kwargs | {"attention_mask": torch.ones(1, 1, 2, 2)})
    with pytest.raises(UnsupportedModelError, match=r"layers.1.self_attn is given a mask"):
        bind(model)


def test_a_config_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path)
    Checkpoint.open(path, EngineConfig(device="cpu"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(UnsupportedModelError, match="not causal"):
        Checkpoint.open(path, EngineConfig(device="cpu"))
    (path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4, "num_key_value_heads": 3}))
    with pytest.raises(UnsupportedModelError, match="num_attention_heads=4 is no multiple of num_key_value_heads=3"):
        Checkpoint.open(path, EngineConfig(device="cpu"))


def test_a_soft_cap_below_zero_is_the_one_above_and_zero_is_none() -> None:
    """transformers divides by it, and multiplies tanh of that, which is odd."""
    query = torch.zeros(1, 4, 3, 16)
    assert read_options("it", query, query, {"softcap": -5.0}) == read_options("it", query, query, {"softcap": 5.0})
    assert read_options("it", query, query, {"softcap": None}).softcap == 0
    with pytest.raises(UnsupportedModelError, match=r"caps its scores at 0\.0"):
        read_options("it", query, query, {"softcap": 0.0})


# ------------------------------------------------------------------ what a probe leaves alone


def test_the_module_is_neither_run_nor_changed() -> None:
    model = families.build("gemma2").train()
    calls: list[object] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    before = {name: (dict(vars(module)), module.training) for name, module in model.named_modules()}
    values = {name: (parameter.clone(), parameter._version) for name, parameter in model.named_parameters()}
    probe_model(model, 512)
    assert not calls
    assert model.config._attn_implementation == "eager"
    assert {n: (dict(vars(m)), m.training) for n, m in model.named_modules()} == before
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name][0])
        assert parameter._version == values[name][1]
        assert parameter.requires_grad


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "qwen3"])
def test_in_inference_mode_a_model_too_large_for_zeros_is_probed_as_well(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There `to` is not taken apart before the probe sees it, and names its device without a keyword."""
    monkeypatch.setattr(probe, "_LARGEST_ZEROS", 0)
    model = families.build(name)
    expected = probe_model(model, 512)
    with torch.inference_mode():
        assert probe_model(model, 512) == expected


def test_weights_of_any_size_take_no_memory() -> None:
    config = copy.deepcopy(families.build("llama").config)
    config.hidden_size, config.intermediate_size, config.vocab_size = 2**18, 2**20, 2**22
    config.head_dim = 128
    assert {str(call.sees) for call in probe_config(config, 512)} == {"causal"}  # 13 TB as float32


# ------------------------------------------------------------------ right


def deepcopied(model: PreTrainedModel) -> PreTrainedModel:
    """Layers 1 and 2 once more, on top, as self-merges do it; the copies have configs of their own."""
    layers = list(model.model.layers)
    layers += [copy.deepcopy(layer) for layer in layers[1:3]]
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [*model.config.layer_types, *model.config.layer_types[1:3]]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    return model


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_copied_layers_run(name: str) -> None:
    expected, _ = families.reference(deepcopied(families.build(name)), PROMPT, 8)
    model = deepcopied(families.build(name))
    with Engine.load(model, page_size=16, kv_memory="4MiB") as engine:
        assert list(engine.generate(PROMPT, max_new_tokens=8).token_ids) == expected
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
