"""Tiny checkpoints that carry a head for multi-token prediction, and what such a head computes in plain PyTorch, over a
whole sequence and without a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

LAYERS = {"glm4_moe": 2, "deepseek_v3": 2, "glm4_moe_lite": 2}
"""Of the model, behind which the head is one more."""


def write(directory: Path, family: str, *, hidden: int = 64) -> Path:
    """A checkpoint whose last layer has become its head's."""
    count = LAYERS[family]
    kinds = {"mlp_layer_types": ["dense", "sparse", "sparse"]} if family == "glm4_moe_lite" else {}
    path = families.write(family, directory, num_hidden_layers=count + 1, **kinds)
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": count}
    config |= {name: value[:count] for name, value in kinds.items()}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    make = torch.Generator().manual_seed(7)
    prefix = f"model.layers.{count}."
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{prefix}{name}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=make)
    tensors[f"{prefix}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=make) * 0.1
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


class Reference:
    """What a head drafts, computed over the whole text again and again."""

    def __init__(self, path: Path, directory: Path, family: str) -> None:
        """`directory` gets a checkpoint of the model with the head's layer as its last, which is read by itself."""
        self.count = LAYERS[family]
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.layer = self._last_layer(path, directory)
        prefix = f"model.layers.{self.count}."
        tensors = load_file(path / "model.safetensors")
        names = ("enorm", "hnorm", "shared_head.norm", "eh_proj")
        self.tensors = {name: tensors[f"{prefix}{name}.weight"] for name in names}

    def _last_layer(self, path: Path, directory: Path) -> PreTrainedModel:
        directory.mkdir(parents=True)
        config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": self.count + 1}
        for name in ("layer_types", "mlp_layer_types"):
            if config.get(name):
                config[name] = [*config[name], config[name][-1]][: self.count + 1]
        (directory / "config.json").write_text(json.dumps(config))
        beside = ("enorm.", "hnorm.", "eh_proj.", "shared_head.", f"layers.{self.count}.embed_tokens.")
        tensors = {
            name: value
            for name, value in load_file(path / "model.safetensors").items()
            if not any(part in name for part in beside)
        }
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        whole: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return whole.model.layers[-1]

    @torch.inference_mode()
    def drafts(self, text: list[int], count: int) -> list[int]:
        """The most likely tokens behind a text, one after the other."""
        hidden = self.model.model(torch.tensor([text[:-1]])).last_hidden_state[0]
        tokens, found = list(text[1:]), []
        for _ in range(count):
            out = self.norm(self.block(torch.tensor(tokens), hidden), "shared_head.norm")
            found.append(int(self.model.lm_head(out[-1]).argmax()))
            tokens.append(found[-1])
            hidden = torch.cat((hidden, out[-1:]))
        return found

    def block(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        embedded = self.model.get_input_embeddings()(tokens)
        pair = torch.cat((self.norm(embedded, "enorm"), self.norm(hidden, "hnorm")), dim=-1)
        x = (pair @ self.tensors["eh_proj"].T)[None]
        places = torch.arange(len(tokens))[None]
        base: Any = self.model.model
        mask = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)[None, None]
        return self.layer(x, attention_mask=mask, position_ids=places, position_embeddings=base.rotary_emb(x, places))[
            0
        ]

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.model.config.rms_norm_eps
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.tensors[name]
