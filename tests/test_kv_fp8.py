"""`kv_dtype="fp8"`: the tokens of Hugging Face's model whose attention rounds its keys and values by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import families
import pytest
import quantised_formats
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import hybridgen
from hybridgen.cache import PagedKV, SharedKV
from hybridgen.errors import CheckpointError, ConfigError, UnsupportedModelError

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
sys.path.insert(0, str(Path(__file__).parent / "speculation"))
import mtp_heads
from attention_cases import by_hand

NEW = 14
LENGTHS = (7, 70, 1, 33)
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_batch": 4,
    "page_size": 16,
    "token_budget": 48,
    "kv_memory": "16MiB",
    "max_context": 128,
    "compile_backend": "eager",
}
GRAPHS: dict[str, Any] = {"decode_buckets": (2, 4), "prefill_buckets": (16, 48), "max_padding_ratio": 64}
SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "num_kv_shared_layers": 2,
}


def _rounded(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """The family's own attention, with keys and values as a cache of 8 bits has them."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    scales = getattr(module, "kv_scales", (torch.ones(1), torch.ones(1)))
    kept = [
        by_hand(each / scale.view(-1, 1, 1)).float() * scale.view(-1, 1, 1)
        for each, scale in zip((key, value), scales, strict=True)
    ]
    return eager(module, query, *kept, mask, **kwargs)


AttentionInterface.register("rounded", _rounded)
AttentionMaskInterface.register("rounded", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def wanted(model: PreTrainedModel) -> list[list[int]]:
    model.set_attn_implementation("rounded")
    return [tokens for tokens, _ in families.references(model, families.prompts_of(LENGTHS), NEW)]


def generated(engine: hybridgen.Engine) -> list[list[int]]:
    return [list(out.token_ids) for out in engine.generate(families.prompts_of(LENGTHS), max_new_tokens=NEW)]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return families.write("llama", tmp_path)


@pytest.mark.parametrize("mode", ["eager", "graph", "jit", "hybrid"])
def test_every_mode_generates_the_tokens_of_a_rounded_cache(mode: str, llama: Path) -> None:
    fields = SETTINGS | (GRAPHS if mode in ("graph", "hybrid") else {}) | {"mode": mode, "kv_dtype": "fp8"}
    model = families.build("llama")
    expected = wanted(model)
    model.set_attn_implementation("eager")
    plain = [tokens for tokens, _ in families.references(model, families.prompts_of(LENGTHS), NEW)]
    assert expected != plain  # else nothing is shown
    with hybridgen.Engine.load(llama, **fields) as engine:
        assert generated(engine) == expected
        stats = engine.stats()
        assert stats.kv_dtype == "fp8, scales of 1"
        assert "fp8, scales of 1" in str(stats)
        assert not stats.fallbacks


FAMILIES = {
    "gemma2": {},  # soft caps and windows
    "gpt_oss": {},  # sinks
    "lfm2": {},  # states by slot beside keys and values
    "gemma3n_text": SHARED,  # layers that read an earlier one's
    "llama4_text": {},  # chunks
}


@pytest.mark.parametrize("name", [*[*FAMILIES][:4], pytest.param("llama4_text", marks=pytest.mark.slow)])
def test_families(name: str, tmp_path: Path) -> None:
    changes = FAMILIES[name]
    path = families.write(name, tmp_path, **changes)
    with hybridgen.Engine.load(path, mode="graph", kv_dtype="fp8", **SETTINGS, **GRAPHS) as engine:
        assert generated(engine) == wanted(families.build(name, **changes))
        kinds = {type(state) for state in engine._runner.states}
        assert (SharedKV in kinds) == (name == "gemma3n_text")
        assert all(s.dtype == torch.float8_e4m3fn for s in engine._runner.states if isinstance(s, PagedKV))


def test_the_pool_holds_more_tokens(llama: Path) -> None:
    found = []
    for kv_dtype in (None, "fp8"):
        fields = SETTINGS | {"kv_memory": 2**17, "dtype": "bfloat16", "max_batch": 64}
        with hybridgen.Engine.load(llama, mode="eager", kv_dtype=kv_dtype, **fields) as engine:
            stats = engine.stats()
            assert stats.cache_bytes <= 2**17
            found.append(engine.traffic.step_bytes(1, 100) - engine.traffic.weights)
            found.append(stats.pages + 1)
    assert found[2] * 2 == found[0]  # what attention reads
    assert found[3] == found[1] * 2


def test_shared_prefixes_and_drafts_change_no_token(llama: Path) -> None:
    prompt = families.prompts_of((50,))[0]
    prompts = [prompt, [*prompt[:40], 5, 6], prompt, prompt[:20]]
    fields = SETTINGS | {"mode": "eager", "kv_dtype": "fp8"}
    with hybridgen.Engine.load(llama, prefix_cache=False, **fields) as engine:
        expected = [engine.generate(each, max_new_tokens=NEW).token_ids for each in prompts]
    with hybridgen.Engine.load(llama, speculation="ngram", **fields) as engine:
        assert [engine.generate(each, max_new_tokens=NEW).token_ids for each in prompts] == expected
        assert engine.stats().prefix.cached_tokens > 0


@pytest.fixture
def scaled(llama: Path) -> tuple[Path, PreTrainedModel]:
    """A checkpoint with a scale for each head of layer 0 and one for all of layer 1; and its model."""
    file = llama / "model.safetensors"
    tensors, model = load_file(file), families.build("llama")
    for layer, module in enumerate(model.model.layers):
        heads = module.self_attn.config.num_key_value_heads
        scales = [torch.rand(heads if layer == 0 else 1) * 0.02 + 0.001 for _ in range(2)]
        module.self_attn.kv_scales = tuple(scales)
        owner = f"model.layers.{layer}.self_attn."
        names = ("k_scale", "v_scale") if layer == 0 else ("k_proj.k_scale", "v_proj.v_scale")
        tensors |= {owner + name: scale for name, scale in zip(names, scales, strict=True)}
    save_file(tensors, file, metadata={"format": "pt"})
    return llama, model


@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_scales_of_the_checkpoint(mode: str, scaled: tuple[Path, PreTrainedModel]) -> None:
    path, model = scaled
    expected = wanted(model)
    for layer in model.model.layers:
        vars(layer.self_attn).pop("kv_scales")
    assert wanted(model) != expected  # else nothing is shown
    with hybridgen.Engine.load(path, mode=mode, kv_dtype="fp8", **SETTINGS) as engine:
        assert generated(engine) == expected
        assert engine.stats().kv_dtype == f"fp8, scales of {len(model.model.layers)} layers from the checkpoint"


def test_scales_beside_quantised_weights(tmp_path: Path) -> None:
    """They are used, and no note says that they are not."""
    path = tmp_path / "model"
    quantised_formats.write_family(path, "llama", "fp8 block")
    file = path / "model.safetensors"
    scale = torch.tensor([0.01])
    owner = "model.layers.0.self_attn."
    save_file(load_file(file) | {owner + "k_scale": scale, owner + "v_scale": scale.clone()}, file)
    for kv_dtype in (None, "fp8"):
        with hybridgen.Engine.load(path, mode="eager", kv_dtype=kv_dtype, **SETTINGS) as engine:
            notes = [note for note in engine.stats().fallbacks if "KV cache" in note]
            assert bool(notes) == (kv_dtype is None)
            assert len(engine._parts.kv_scales) == (kv_dtype is not None)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("model.layers.0.self_attn.k_scale", [1.0], "no v_scale"),
        ("model.layers.0.self_attn.kv_scale", [0.0], "not finite and above 0"),
        ("model.layers.0.self_attn.kv_scale", [float("nan")], "not finite and above 0"),
        ("model.layers.9.self_attn.kv_scale", [1.0], "no attention modules of that name"),
        ("model.layers.0.self_attn.kv_scale", [1.0] * 3, "3 scales"),
    ],
)
def test_damaged_scales_are_named(name: str, values: list[float], message: str, llama: Path) -> None:
    file = llama / "model.safetensors"
    save_file(load_file(file) | {name: torch.tensor(values)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        hybridgen.Engine.load(llama, mode="eager", kv_dtype="fp8", **SETTINGS)


def test_scales_of_a_head_that_drafts_are_not_the_models(tmp_path: Path) -> None:
    path = mtp_heads.write(tmp_path, "glm4_moe")
    fields: dict[str, Any] = SETTINGS | {"mode": "eager", "kv_dtype": "fp8"}
    file, scale = path / "model.safetensors", torch.tensor([0.02])
    tensors = load_file(file)

    def write(*owners: str) -> None:
        scales = {f"{owner}.self_attn.{part}": scale.clone() for owner in owners for part in ("k_scale", "v_scale")}
        save_file(tensors | scales, file, metadata={"format": "pt"})

    write("model.layers.0", "model.layers.2", "mtp.layers.1")
    prompt = families.prompts_of((20,))[0]
    texts = []
    for drafter in (None, "mtp"):
        with hybridgen.Engine.load(path, drafter=drafter, **fields) as engine:
            assert sorted(engine._parts.kv_scales) == ["model.layers.0.self_attn"]
            texts.append(engine.generate(prompt, max_new_tokens=NEW).token_ids)
    assert texts[0] == texts[1]
    write("model.layers.0", "encoder.layers.0")
    with pytest.raises(CheckpointError, match=r"'encoder.layers.0.* and 'model.layers.0.* are both the k_scale"):
        hybridgen.Engine.load(path, **fields)


def test_latents_are_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = families.write("minicpm3", tmp_path)
    monkeypatch.setattr(hybridgen.loading.Checkpoint, "load", lambda self: pytest.fail("weights are read"))
    with pytest.raises(UnsupportedModelError, match="caches latents instead of keys and values"):
        hybridgen.Engine.load(path, kv_dtype="fp8", **SETTINGS)
    with pytest.raises(UnsupportedModelError, match="caches latents"):
        hybridgen.Engine.load(families.build("minicpm3"), kv_dtype="fp8", **SETTINGS)


def test_what_cannot_be_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="kv_dtype"):
        hybridgen.Engine.load(llama, **SETTINGS, kv_dtype="int8")


def test_a_live_module(llama: Path) -> None:
    model = families.build("llama")
    with hybridgen.Engine.load(model, mode="eager", kv_dtype="fp8", **SETTINGS) as engine:
        found = generated(engine)
    assert found == wanted(model)


def test_it_is_part_of_the_compile_caches_key() -> None:
    assert "kv_dtype" in hybridgen.EngineConfig.key_fields()
