"""Every subject of a comparison reads the same weights, not copies of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationMixin

import hybridgen
from hybridgen.comparison.measuring.subjects import EngineSubject
from hybridgen.execution import ModelRunner

SHARED = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight", "norm.weight")
"""What joining projections leaves where it is."""


def test_what_is_asked_of_the_weights_is_done_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    file, scale = path / "model.safetensors", torch.tensor([0.02])
    names = ("k_scale", "v_scale")
    scales = {f"model.layers.{i}.self_attn.{name}": scale.clone() for i in range(2) for name in names}
    save_file(load_file(file) | scales, file, metadata={"format": "pt"})
    seen, close = [], EngineSubject.close

    def note(subject: EngineSubject) -> None:
        seen.append(subject.stats().kv_dtype)
        close(subject)

    monkeypatch.setattr(EngineSubject, "close", note)
    fields: dict[str, Any] = {"quantization": "fp8", "kv_dtype": "fp8", "prefill_buckets": [8], "page_size": 16}
    found = hybridgen.compare(
        path, modes="eager", prompt_lengths=5, batch_sizes=1, new_tokens=2, repeats=1, warm_up=1, **fields
    )
    [cell] = found.cells
    assert cell.status == "ok", found.subjects
    assert seen == ["fp8, scales of 2 layers from the checkpoint"]


def places(model: Any) -> dict[str, int]:
    return {name: each.data_ptr() for name, each in model.named_parameters() if name.endswith(SHARED)}


def test_no_subject_has_weights_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("llama")
    found: list[dict[str, int]] = []
    make, generate = ModelRunner.__init__, GenerationMixin.generate

    def note_engine(runner: ModelRunner, bound: Any, **fields: Any) -> None:
        found.append(places(bound.model))
        make(runner, bound, **fields)

    def note_peer(peer: Any, *args: Any, **fields: Any) -> Any:
        peers.append(places(peer))
        return generate(peer, *args, **fields)

    peers: list[dict[str, int]] = []
    monkeypatch.setattr(ModelRunner, "__init__", note_engine)
    monkeypatch.setattr(GenerationMixin, "generate", note_peer)
    options: dict[str, Any] = {"prompt_lengths": (5,), "batch_sizes": (1,), "new_tokens": 2, "repeats": 1, "warm_up": 1}
    options |= {"budget": 10, "compile_backend": "eager", "decode_buckets": [1], "prefill_buckets": [8]}
    modes = ("eager", "jit", "graph", "hybrid")
    hybridgen.compare(model, modes=modes, baselines=("hf-dynamic",), progress=False, **options)
    assert len(found) == len(modes)
    assert peers
    assert len(places(model)) > 4
    for each in found + peers:
        assert each == places(model)
