"""The text part of multimodal checkpoints, token for token against the whole model's own `generate`."""

from __future__ import annotations

import copy
import json
import resource
import struct
from pathlib import Path
from typing import Any

import families
import multimodal
import pytest
import quantised_formats
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_families import LENGTHS as WHOLE_LENGTHS
from test_families import WHOLE_TOKENS, check_whole_matrix

import hybridgen
from hybridgen.errors import CheckpointError, ConfigError, PromptError, UnsupportedModelError
from hybridgen.fused import reference
from hybridgen.loading import Checkpoint
from hybridgen.loading.export import write_quantised
from hybridgen.models.binding import bind
from hybridgen.models.decoder import describe
from hybridgen.models.projections import fuse_projections
from hybridgen.models.text_part import LeftOut, TextPart, text_part

LENGTHS = (7, 110, 1, 33)
NEW_TOKENS = 18
SETTINGS: dict[str, Any] = {
    "max_batch": 4, "page_size": 16, "token_budget": 96, "kv_memory": "16MiB", "max_context": 352,
}  # fmt: skip
GRAPHS: dict[str, Any] = {"decode_buckets": (2, 4), "prefill_buckets": (16, 96), "max_padding_ratio": 64}
EVERY_MODE = ("gemma3", "qwen2_vl")
"""In the usual run; the others in the modes that compile and record only with `-m slow`."""
ALIKE = (
    "deepseek_vl_hybrid", "emu3", "granite4_vision", "granite_speech_plus", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7",
    "nemo_speechlm", "qwen2_audio", "vibevoice_asr",
)  # fmt: skip
"""Their text part is one of another wrapper's, or of `test_families.py`: with `-m slow`."""


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Without tokens that stand for images."""
    return [[token if token < multimodal.IMAGE else 5 for token in ids] for ids in families.prompts_of(lengths)]


def expected_of(name: str, **changes: Any) -> list[list[int]]:
    model = multimodal.build(name, **changes)
    return tokens_of(model)


def tokens_of(model: Any) -> list[list[int]]:
    return [tokens for tokens, _ in families.references(model, prompts(), NEW_TOKENS)]


def check(engine: hybridgen.Engine, expected: list[list[int]], compiles: bool = True) -> None:
    outs = engine.generate(prompts(), max_new_tokens=NEW_TOKENS)
    assert [list(out.token_ids) for out in outs] == expected
    assert list(engine.generate(prompts()[1], max_new_tokens=NEW_TOKENS).token_ids) == expected[1]
    assert bool(engine.stats().fallbacks) != compiles


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in sorted(multimodal.WHOLES)],
)
def test_eager(name: str, tmp_path: Path) -> None:
    if multimodal.is_absent(name):
        pytest.skip(f"this transformers has no {name}")
    path = multimodal.write(name, tmp_path)
    with hybridgen.Engine.load(path, mode="eager", **SETTINGS) as engine:
        check(engine, expected_of(name))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in EVERY_MODE else pytest.mark.slow) for name in sorted(multimodal.WHOLES)],
)
def test_other_modes(name: str, tmp_path: Path) -> None:
    if multimodal.is_absent(name):
        pytest.skip(f"this transformers has no {name}")
    path, expected = multimodal.write(name, tmp_path), expected_of(name)
    for fields in ({"mode": "graph"} | GRAPHS, {"mode": "jit"}, {"mode": "hybrid"} | GRAPHS):
        with hybridgen.Engine.load(path, compile_backend="eager", run_ahead=1, **SETTINGS, **fields) as engine:
            check(engine, expected, name not in multimodal.UNCOMPILED or fields["mode"] == "graph")
            stats = engine.stats()
            assert stats.late_compiles == 0
            assert (stats.graphs.padded_hits > 0) == ("decode_buckets" in fields)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "graph", "jit", "hybrid"])
@pytest.mark.parametrize("name", sorted(multimodal.WHOLES))
def test_whole_matrix(name: str, mode: str, tmp_path: Path) -> None:
    """Batches, late requests, borders and log-probabilities, as for language models (`test_families`)."""
    if multimodal.is_absent(name):
        pytest.skip(f"this transformers has no {name}")
    model, asked = multimodal.build(name), prompts(WHOLE_LENGTHS)
    expected = [families.reference(model, prompt, WHOLE_TOKENS) for prompt in asked]
    path = multimodal.write(name, tmp_path)
    check_whole_matrix(path, mode, expected, name not in multimodal.UNCOMPILED, prompts=asked)


def shards(path: Path) -> tuple[Path, Path]:
    """Write a checkpoint's weights again as one file of text and one of the encoder; their paths."""
    with safe_open(path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    encoder = {name: tensor for name, tensor in tensors.items() if "language_model" not in name}
    encoder = {name: tensor for name, tensor in encoder.items() if "lm_head" not in name}
    assert encoder
    files = path / "model-00001-of-00002.safetensors", path / "model-00002-of-00002.safetensors"
    places = {}
    for file, names in zip(files, (tensors.keys() - encoder.keys(), encoder.keys()), strict=True):
        save_file({name: tensors[name] for name in names}, file, {"format": "pt"})
        places |= dict.fromkeys(names, file.name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (path / "model.safetensors").unlink()
    return files


@pytest.mark.parametrize(("name", "tower"), [("llava", "vision_tower"), ("voxtral", "audio_tower")])
def test_encoders_are_not_read(name: str, tower: str, tmp_path: Path) -> None:
    """A checkpoint with an encoder of 4 GiB, in a file with a hole in place of its values. Pages of a mapped file that
    are read count as resident, so that no quarter of it was."""
    path = multimodal.write(name, tmp_path)
    encoder = shards(path)[1]
    with safe_open(encoder, "pt") as file:
        names = sorted(file.keys())
    size = 2**32 // len(names) // 4 * 4
    header = {
        name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    with open(encoder, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + len(names) * size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with hybridgen.Engine.load(path, mode="eager", **SETTINGS) as engine:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "KiB"
        check(engine, expected_of(name))
        model = engine._runner.bound.model
        assert isinstance(model, TextPart)
        assert isinstance(getattr(model.whole.model, tower), LeftOut)
        assert all("language_model" in key or "lm_head" in key for key, _ in model.whole.named_parameters())


def test_weights_of_the_text_are_still_checked(tmp_path: Path) -> None:
    path = multimodal.write("llava", tmp_path)
    text = shards(path)[0]
    with safe_open(text, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    lacking = sorted(name for name in tensors if "layers.1" in name)[0]
    del tensors[lacking]
    save_file(tensors, text, {"format": "pt"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"][lacking]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        hybridgen.Engine.load(path, mode="eager", **SETTINGS)


def test_placeholders_are_refused(tmp_path: Path) -> None:
    path = multimodal.write("qwen2_vl", tmp_path)
    with hybridgen.Engine.load(path, mode="eager", **SETTINGS) as engine:
        assert set(engine.checkpoint.placeholders.values()) == {"image_token_id", "video_token_id"}
        with pytest.raises(PromptError, match=rf"token {multimodal.IMAGE} \(image_token_id\).*text part alone"):
            engine.generate([5, multimodal.IMAGE, 6], max_new_tokens=2)
        # Also where the vocabulary of the text does not have it.
        with pytest.raises(PromptError, match="video_token_id"):
            engine.hidden_states([[5, multimodal.IMAGE + 2]])


@pytest.mark.parametrize(("name", "mode"), [("gemma3", "graph"), ("qwen2_vl", "hybrid")])
def test_live_module(name: str, mode: str) -> None:
    """The owner's model is run as it is, its encoders left where they are. Which layers it compiles has nothing to do
    with what is around them."""
    model = multimodal.build(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = tokens_of(model)
    with hybridgen.Engine.load(model, mode=mode, compile_backend="eager", **SETTINGS, **GRAPHS) as engine:
        check(engine, expected)
        assert tokens_of(model) == expected
        with torch.no_grad():
            head = model.get_output_embeddings().weight
            head.copy_(head.roll(1, 0))
        changed = tokens_of(model)
        assert changed != expected
        check(engine, changed)
        with torch.no_grad():
            head.copy_(head.roll(-1, 0))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert copy.deepcopy(model).config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl"])
def test_quantised_while_loading(name: str, tmp_path: Path) -> None:
    """Projections of the text alone are there to be quantised; tokens are those of the text model's own weights."""
    path = multimodal.write(name, tmp_path)
    with hybridgen.Engine.load(path, mode="eager", quantization="int8", **SETTINGS) as engine:
        outs = engine.generate(prompts(), max_new_tokens=4)
        assert all(len(out.token_ids) == 4 for out in outs)
        assert "int8" in str(engine.stats().weights)
    with pytest.raises(ConfigError, match="multimodal"):
        write_quantised(str(path), tmp_path / "out", "ct-fp8", hybridgen.EngineConfig())


@pytest.mark.parametrize("stored", ["awq", "fp8 block", "ct w4 group"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_quantised_checkpoints(name: str, stored: str, tmp_path: Path) -> None:
    """Projections of the text run as they are stored; tokens are those of the values that the codes stand for."""
    writer, config = quantised_formats.FORMATS[stored]
    model = multimodal.build(name)

    def of_text(owner: str) -> Any:
        return writer if quantised_formats.projections(owner) and "vis" not in owner else None

    path = quantised_formats.write(tmp_path / name, model, of_text, config)
    if stored == "awq":  # the config of the text may say it, too
        whole = json.loads((path / "config.json").read_text())
        whole["text_config"]["quantization_config"] = whole.pop("quantization_config")
        (path / "config.json").write_text(json.dumps(whole))
    expected = tokens_of(model)
    with hybridgen.Engine.load(path, mode="eager", dtype="float32", **SETTINGS) as engine:
        outs = engine.generate(prompts(), max_new_tokens=NEW_TOKENS)
        assert [list(out.token_ids) for out in outs] == expected
        rows = engine.stats().weights
        assert sum(row.projections for kind, row in rows.items() if "dense" not in kind) == 14, rows


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
def test_llama_like_text_is_read_as_data_and_joined(name: str) -> None:
    """What fused decode on a GPU starts from, M-RoPE included."""
    model = text_part(multimodal.build(name))
    report = fuse_projections(model)
    assert not [group for group in report.skipped if group.module.startswith("model.")]  # encoders never run
    assert [group.module for group in report.groups[:2]] == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    bound = bind(model, 352)
    with bound.original_attention(), torch.inference_mode():
        reference.check(bound.model, describe(bound.model, bound.sites, bound.weights, 352))


def test_an_adapter_of_the_whole_model_is_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    path = multimodal.write("llava", tmp_path)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(multimodal.build("llava"), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([prompts()[0]])
    expected = adapted.generate(input_ids=ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
    with hybridgen.Engine.load(path, mode="eager", **SETTINGS) as engine:
        plain = engine.generate(prompts()[0], max_new_tokens=10).token_ids
        engine.set_adapter(tmp_path / "adapter")
        assert list(engine.generate(prompts()[0], max_new_tokens=10).token_ids) == expected != list(plain)
        engine.set_adapter(None)
        assert engine.generate(prompts()[0], max_new_tokens=10).token_ids == plain


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [("paligemma", {}, "PaliGemmaForConditionalGeneration.*not causal")],
)
def test_refused_before_weights(
    name: str, changes: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = multimodal.write(name, tmp_path, **changes)
    monkeypatch.setattr(hybridgen.loading.Checkpoint, "load", lambda self: pytest.fail("weights are read"))
    with pytest.raises(UnsupportedModelError, match=why):
        hybridgen.Engine.load(path, mode="eager", **SETTINGS)


def test_a_live_model_whose_language_model_has_the_head() -> None:
    """Nemotron-H Omni's own `get_output_embeddings()` gives none."""
    model = multimodal.build("nemotron_h_omni")
    assert model.get_output_embeddings() is None
    checkpoint = Checkpoint.open(model, hybridgen.EngineConfig(device="cpu"))
    assert isinstance(checkpoint.module, TextPart)
