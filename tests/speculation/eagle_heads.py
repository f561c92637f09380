"""Tiny EAGLE-3 heads in the layouts that are published, written by the tests, and what such a head computes in plain
PyTorch, over a whole sequence and without a cache: from the description in arXiv:2503.01840 alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import families
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

HIDDEN, HEADS, KV_HEADS, INSIDE, DRAFT_VOCAB, LAYERS = 64, 4, 2, 96, 120, 6
THETA = 10000.0


def target(directory: Path, family: str = "llama", **changes: Any) -> Path:
    """A model of six layers, so that the three that a head reads by default are three."""
    return families.write(family, directory, num_hidden_layers=LAYERS, **changes)


def random_head(
    seed: int = 3,
    vocab: int = families.VOCAB,
    draft_vocab: int = DRAFT_VOCAB,
    hidden: int = HIDDEN,
    inside: int = INSIDE,
) -> dict[str, Tensor]:
    """Tensors of a head, called as its authors call them."""
    make = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make) * (0.3 / shape[-1] ** 0.5 * 4)

    dim = hidden // HEADS
    ids = torch.randperm(vocab, generator=make)[:draft_vocab].sort().values
    tensors = {
        "fc.weight": values(hidden, 3 * hidden),
        "midlayer.self_attn.q_proj.weight": values(HEADS * dim, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": values(KV_HEADS * dim, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": values(KV_HEADS * dim, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": values(hidden, HEADS * dim),
        "midlayer.mlp.gate_proj.weight": values(inside, hidden),
        "midlayer.mlp.up_proj.weight": values(inside, hidden),
        "midlayer.mlp.down_proj.weight": values(hidden, inside),
        "lm_head.weight": values(draft_vocab, hidden),
        "d2t": ids - torch.arange(draft_vocab),
        "t2d": torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True),
    }
    for name in ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm"):
        tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=make)
    return tensors


def config_of(tensors: Mapping[str, Tensor], **changes: Any) -> dict[str, Any]:
    """Of a head as SpecForge writes it."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": len(tensors["norm.weight"]),
        "intermediate_size": len(tensors["midlayer.mlp.gate_proj.weight"]),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": THETA,
        "max_position_embeddings": 64,
        "vocab_size": len(tensors["t2d"]),
        "draft_vocab_size": len(tensors["lm_head.weight"]),
        "tie_word_embeddings": False,
    } | changes


def write_specforge(directory: Path, tensors: Mapping[str, Tensor], **changes: Any) -> Path:
    """With the layers named by their outputs."""
    ids = {"eagle_aux_hidden_state_layer_ids": [1, LAYERS // 2 - 1, LAYERS - 4], "use_aux_hidden_state": True}
    return write(directory, tensors, config_of(tensors, eagle_config=ids) | changes)


def write_authors(directory: Path, tensors: Mapping[str, Tensor], **changes: Any) -> Path:
    """As `yuhuili/EAGLE3-*`: a Llama by its architecture, and pickled."""
    directory.mkdir(parents=True, exist_ok=True)
    config = config_of(tensors, architectures=["LlamaForCausalLM"]) | changes
    (directory / "config.json").write_text(json.dumps(config))
    torch.save(dict(tensors), directory / "pytorch_model.bin")
    return directory


def write_speculators(directory: Path, tensors: Mapping[str, Tensor], **changes: Any) -> Path:
    """With the layer's config inside, and the layers named by their inputs."""
    flat = config_of(tensors)
    outer = {"draft_vocab_size", "architectures", "tie_word_embeddings"}
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": flat["draft_vocab_size"],
        "target_hidden_size": None,
        "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": [2, LAYERS // 2, LAYERS - 3],
        "transformer_layer_config": {name: value for name, value in flat.items() if name not in outer},
    }
    renamed = {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
    return write(directory, renamed, config | changes)


def write(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors")
    return directory


class Reference:
    """What a head drafts, computed over the whole text again and again."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], *, norm_before_residual: bool = False) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.tensors = tensors
        self.normed_residual = norm_before_residual

    @torch.inference_mode()
    def drafts(self, text: list[int], count: int) -> list[int]:
        """The most likely tokens behind a text, one after the other."""
        states = self.model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
        read = torch.cat([states[layer][0] for layer in (2, LAYERS // 2, LAYERS - 3)], dim=-1)
        hidden = read @ self.tensors["fc.weight"].T
        tokens, found = list(text[1:]), []
        for _ in range(count):
            out = self.layer(torch.tensor(tokens), hidden)
            logits = self.norm(out[-1], "norm") @ self.tensors["lm_head.weight"].T
            best = int(logits.argmax())
            found.append(best + int(self.tensors["d2t"][best]))
            tokens.append(found[-1])
            hidden = torch.cat((hidden, out[-1:]))
        return found

    def layer(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        get = {name.removeprefix("midlayer."): value for name, value in self.tensors.items()}
        embedded = self.model.get_input_embeddings()(tokens)
        normed = self.norm(hidden, "midlayer.hidden_norm")
        pair = torch.cat((self.norm(embedded, "midlayer.input_layernorm"), normed), dim=-1)
        count, dim = len(tokens), HIDDEN // HEADS
        q, k, v = (
            (pair @ get[f"self_attn.{each}_proj.weight"].T).view(count, -1, dim).transpose(0, 1) for each in "qkv"
        )
        q, k = self.rotate(q), self.rotate(k)
        k, v = (each.repeat_interleave(HEADS // KV_HEADS, dim=0) for each in (k, v))
        scores = q @ k.transpose(1, 2) / dim**0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1)
        residual = (normed if self.normed_residual else hidden) + attended @ get["self_attn.o_proj.weight"].T
        inside = self.norm(residual, "midlayer.post_attention_layernorm")
        gate, up = (inside @ get[f"mlp.{each}_proj.weight"].T for each in ("gate", "up"))
        return residual + (gate * gate.sigmoid() * up) @ get["mlp.down_proj.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.tensors[f"{name}.weight"]

    @staticmethod
    def rotate(x: Tensor) -> Tensor:
        """Pairs of values half a head apart, by an angle that grows with the position."""
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[1])[:, None] * THETA ** (-torch.arange(half) / half)
        turn = torch.polar(torch.ones_like(angles), angles)
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)


COUNT = 64
"""Ids of the model that counts, and its width: each id is a direction of its own."""


def counting_model(directory: Path) -> Path:
    """A model that says the next number. Its layers add nothing, so that all hidden states are the embedding."""
    model = families.build("llama", num_hidden_layers=LAYERS, vocab_size=COUNT, hidden_size=COUNT)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
        model.get_input_embeddings().weight.copy_(torch.eye(COUNT))
        model.get_output_embeddings().weight.copy_(_next() * 0.6)
    model.save_pretrained(directory)
    return directory


def counting_head(left_out: tuple[int, ...] = (9, 30)) -> dict[str, Tensor]:
    """A head that counts too: each pass turns the state of a number into that of the next one. It can draft all numbers
    but a few."""
    tensors = random_head(vocab=COUNT, draft_vocab=COUNT - len(left_out))
    ids = torch.tensor([i for i in range(COUNT) if i not in left_out])
    tensors |= {name: torch.ones(HIDDEN) for name in tensors if "norm" in name}
    one, root = torch.eye(COUNT), COUNT**0.5  # what the norm makes of a direction
    inside = torch.zeros(INSIDE, HIDDEN)
    inside[:COUNT] = one
    size = root / (1 + torch.exp(torch.tensor(-root))) * root
    down = torch.zeros(HIDDEN, INSIDE)
    down[:, :COUNT] = (_next() - one) / size
    return tensors | {
        "fc.weight": torch.cat((one, 0 * one, 0 * one), dim=1),
        "midlayer.self_attn.o_proj.weight": torch.zeros(HIDDEN, HIDDEN),
        "midlayer.mlp.gate_proj.weight": inside,
        "midlayer.mlp.up_proj.weight": inside.clone(),
        "midlayer.mlp.down_proj.weight": down,
        "lm_head.weight": (_next() * 0.6)[ids],
        "d2t": ids - torch.arange(len(ids)),
        "t2d": torch.zeros(COUNT, dtype=torch.bool).index_fill_(0, ids, True),
    }


def _next() -> Tensor:
    """Turns the direction of each number into that of the next."""
    return torch.eye(COUNT).roll(1, dims=0)
