"""Live modules with quantised weights: read as they are, over the same storage, and what their owner does to them."""

from __future__ import annotations

import inspect
from typing import Any

import families
import pytest
import quantised_formats
import torch
from torch import Tensor, nn
from transformers import FineGrainedFP8Config, PreTrainedModel

import hybridgen
from hybridgen.errors import ConfigError, HybridgenError, UnsupportedModelError
from hybridgen.models.quantised import QuantisedLinear, quantised_modules

FP8Linear = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Linear
BLOCK = (32, 32)
NEW = 10
SETTINGS: dict[str, Any] = quantised_formats.SETTINGS | {"compile_backend": "eager"}


def tokens_of(model: PreTrainedModel) -> list[list[int]]:
    return [families.reference(model, prompt, NEW)[0] for prompt in families.prompts_of((7, 33))]


def generated(engine: hybridgen.Engine) -> list[list[int]]:
    return [list(out.token_ids) for out in engine.generate(families.prompts_of((7, 33)), max_new_tokens=NEW)]


def spread(scales: Tensor, shape: torch.Size) -> Tensor:
    rows, columns = (torch.arange(size) // each for size, each in zip(shape, BLOCK, strict=True))
    return scales[rows][:, columns]


def with_fp8(model: PreTrainedModel) -> PreTrainedModel:
    """Its projections become transformers' FP8 layers, with random codes."""
    g = torch.Generator().manual_seed(0)
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or not name.endswith("_proj"):
            continue
        bias = "has_bias" if "has_bias" in inspect.signature(FP8Linear.__init__).parameters else "bias"
        sizes = linear.in_features, linear.out_features
        place = FP8Linear(*sizes, block_size=BLOCK, **{bias: linear.bias is not None})
        with torch.no_grad():
            place.weight.copy_(torch.randn(linear.weight.shape, generator=g).to(torch.float8_e4m3fn))
            place.weight_scale_inv.copy_(torch.rand(place.weight_scale_inv.shape, generator=g) * 0.05 + 0.05)
        if linear.bias is not None:
            place.bias = linear.bias
        model.set_submodule(name, place)
    model.config.quantization_config = FineGrainedFP8Config(weight_block_size=BLOCK)
    return model.requires_grad_(False)


def by_values(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """A dense model with the values of the other one's FP8 layers."""
    dense = families.build(family)
    for name, module in model.named_modules():
        if isinstance(module, FP8Linear):
            values = module.weight.float() * spread(module.weight_scale_inv, module.weight.shape)
            dense.get_submodule(name).weight.data.copy_(values)
    return dense


@pytest.mark.parametrize(("family", "mode"), [("llama", "eager"), ("llama", "jit"), ("qwen2", "graph")])
def test_fp8_layers_run_as_they_are(family: str, mode: str) -> None:
    model = with_fp8(families.build(family))
    expected = tokens_of(by_values(model, family))
    with hybridgen.Engine.load(model, mode=mode, **SETTINGS) as engine:
        assert generated(engine) == expected
        found = dict(quantised_modules(engine._runner.bound.model))
        assert len(found) == sum(isinstance(module, FP8Linear) for module in model.modules()) > 0
        for name, module in found.items():
            assert module.data.data_ptr() == model.get_submodule(name).weight.data_ptr()
            assert module.scales.data_ptr() == model.get_submodule(name).weight_scale_inv.data_ptr()
        assert any(name.startswith("fp8") for name in engine.stats().weights)
        assert [note for note in engine.stats().fallbacks if "activations are not quantised" in note]
    assert not any(isinstance(module, QuantisedLinear) for module in model.modules())  # it stays its owner's


def test_what_the_owner_changes_is_seen() -> None:
    model = with_fp8(families.build("llama"))
    with hybridgen.Engine.load(model, mode="graph", **SETTINGS) as engine:
        before = generated(engine)
        layer: Any = model.model.layers[0].mlp.down_proj
        with torch.no_grad():  # in place
            layer.weight_scale_inv.mul_(-3.0)
        changed = tokens_of(by_values(model, "llama"))
        assert changed != before
        assert generated(engine) == changed
        layer.weight_scale_inv.data = layer.weight_scale_inv.data * -2.0  # elsewhere
        layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
        moved = tokens_of(by_values(model, "llama"))
        assert moved != changed
        assert generated(engine) == moved
        hook = layer.register_forward_hook(lambda module, inputs, output: output)
        with pytest.raises(HybridgenError, match=r"down_proj is a quantised layer with forward hooks"):
            generated(engine)
        hook.remove()
        assert generated(engine) == moved


def test_what_is_not_known_is_refused() -> None:
    model = with_fp8(families.build("llama"))
    model.model.layers[1].mlp.odd = nn.Module()
    model.model.layers[1].mlp.odd.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.odd\.weight .* is quantised in a way that is not read"):
        hybridgen.Engine.load(model, **SETTINGS)
    model = with_fp8(families.build("llama"))
    with pytest.raises(ConfigError, match="in memory already"):
        hybridgen.Engine.load(model, quantization="fp8", **SETTINGS)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UnsupportedModelError, match="gptq"):
        hybridgen.Engine.load(model, **SETTINGS)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_torchaos_tensors(kind: str, tmp_path: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config = quantization.Int8WeightOnlyConfig() if kind == "int8" else quantization.Float8WeightOnlyConfig()
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=TorchAoConfig(config), dtype=torch.float32)
    dense = families.build("llama", num_hidden_layers=2)
    for name, module in dense.named_modules():
        if name.endswith("_proj"):
            module.weight.data.copy_(model.get_submodule(name).weight.dequantize())
    with hybridgen.Engine.load(model, mode="graph", **SETTINGS) as engine:
        assert generated(engine) == tokens_of(dense)
        assert len(quantised_modules(engine._runner.bound.model)) == 14


@pytest.mark.parametrize("stored", ["ct w4 group", "ct fp8 channel"])
def test_compressed_tensors_before_their_first_forward(stored: str, tmp_path: Any) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    dense = quantised_formats.write_family(tmp_path, "llama", stored, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).requires_grad_(False)
    with hybridgen.Engine.load(model, mode="graph", **SETTINGS) as engine:
        before = generated(engine)
        assert before == tokens_of(dense)
        assert len(quantised_modules(engine._runner.bound.model)) == 14
        with torch.no_grad():
            layer, other = model.model.layers[0].mlp.down_proj, dense.model.layers[0].mlp.down_proj
            layer.weight_scale.mul_(-2)
            other.weight.mul_(-2)
            if stored == "ct w4 group":  # of which the codes lie in another order here
                layer.weight_packed[3].copy_(layer.weight_packed[5])
                layer.weight_scale[3].copy_(layer.weight_scale[5])
                other.weight[3].copy_(other.weight[5])
        assert tokens_of(dense) != before
        assert generated(engine) == tokens_of(dense)
    model(torch.tensor([[1, 2, 3]]))  # which decompresses
    with pytest.raises(UnsupportedModelError, match="have not been decompressed"):
        hybridgen.Engine.load(model, **SETTINGS)


@pytest.mark.parametrize("kind", ["8 bits", "nf4", "nested nf4"])
def test_layers_of_bitsandbytes(kind: str) -> None:
    """Codes of 8 bits run as they are, before and behind a forward, which moves scales; others are dequantised."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = families.build("qwen2", num_hidden_layers=2)
    dense = families.build("qwen2", num_hidden_layers=2)
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or not name.endswith("_proj"):
            continue
        sizes, biased = (linear.in_features, linear.out_features), linear.bias is not None
        values = linear.weight.detach()
        if kind == "8 bits":
            place = bitsandbytes.nn.Linear8bitLt(*sizes, bias=biased, has_fp16_weights=False)
            place.weight = bitsandbytes.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False).to("cpu")
            values = place.weight.data.float() * (place.weight.SCB / 127)[:, None]
        else:
            place = bitsandbytes.nn.Linear4bit(
                *sizes, bias=biased, compute_dtype=torch.float32, quant_type="nf4", compress_statistics="nested" in kind
            ).to("cpu")
            options = {"quant_type": "nf4", "compress_statistics": "nested" in kind, "requires_grad": False}
            place.weight = bitsandbytes.nn.Params4bit(values, **options).to("cpu")
            values = bitsandbytes.functional.dequantize_4bit(place.weight.data, place.weight.quant_state)
        place.bias = linear.bias
        model.set_submodule(name, place)
        dense.get_submodule(name).weight.data.copy_(values)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    model.requires_grad_(False)
    note = "activations are not quantised" if kind == "8 bits" else "weights of 4 bits are dequantised"
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=note):
            engine = hybridgen.Engine.load(model, mode="graph", **SETTINGS)
        with engine:
            assert generated(engine) == tokens_of(dense)
            assert len(quantised_modules(engine._runner.bound.model)) == (14 if kind == "8 bits" else 0)
            with torch.no_grad():
                layer, other = model.model.layers[0].mlp.down_proj, dense.model.layers[0].mlp.down_proj
                layer.weight.data.copy_(layer.weight.data.flip(0))
                layer.weight.add_(0)  # which its version counter sees
                if kind == "8 bits":
                    scales = other.weight.abs().amax(1, keepdim=True) / 127
                    codes = (other.weight / scales).round()
                    other.weight.copy_(codes.flip(0) * scales)
                else:
                    state = layer.weight.quant_state
                    other.weight.copy_(bitsandbytes.functional.dequantize_4bit(layer.weight.data, state))
            assert generated(engine) == tokens_of(dense)
        if kind == "8 bits":
            model(torch.tensor([[1, 2, 3]]))
