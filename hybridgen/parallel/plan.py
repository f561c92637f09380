"""Which part of each weight a rank has: transformers' own plan of the model, read as data.

`config.base_model_tp_plan` names modules and parameters with a style each. Nothing of transformers' machinery for it is
used: it would replace parameters by distributed tensors and the forwards of modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hybridgen.errors import UnsupportedModelError
from hybridgen.models.text_part import is_multimodal, parts_of

COMPARED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "mixtral", "qwen3_moe"})
"""Model types whose tokens were compared with one process's. A plan says how weights are cut, but not whether the
model's code computes with its parts what it computes with the whole."""
COMPARED_WHOLES = frozenset({"gemma3", "llava", "mistral3"})
"""The same of multimodal models, whose text part runs through their own forward."""

_WHOLE = frozenset({"replicated_with_grad_allreduce", "replicate"})
_KEYS_AND_VALUES = ("k_proj", "v_proj")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Cut:
    """What one rank has of a parameter."""

    dim: int
    """From the end: -2 are outputs, -1 inputs."""
    start: int
    stop: int
    full: int
    """Size of the whole along `dim`; of each of the `packed` ones."""
    packed: int = 1
    """How many lie one behind the other along `dim`, each of which is cut."""

    @property
    def size(self) -> int:
        """What the rank has along `dim`."""
        return self.packed * (self.stop - self.start)


@dataclass(frozen=True)
class Sharding:
    """How a model is spread over the ranks of a group, as one of them sees it."""

    rank: int
    size: int
    cuts: Mapping[str, Cut]
    """By the model's names of its parameters; the others are whole on each rank."""
    summed: tuple[str, ...]
    """Modules whose outputs are added up over the ranks."""
    head: str
    """The output projection: each rank has rows of it, and all get all logits."""
    vocab_size: int


def shard(model: PreTrainedModel, config: PreTrainedConfig, rank: int, size: int) -> Sharding:
    """How a model is spread.

    Args:
        model: whole, of any device; a meta one will do. A multimodal one may lack its encoders.
        config: its language model's.

    Raises:
        UnsupportedModelError: it cannot be spread over so many ranks, with the reason.
    """
    kind = str(config.model_type)
    plan: Any = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise UnsupportedModelError(
            f"tensor_parallel={size}: transformers has no tensor-parallel plan for {kind}; leave tensor_parallel out"
        )
    if kind not in COMPARED:
        raise UnsupportedModelError(
            f"tensor_parallel={size}: {kind} was not compared with one process yet, and a plan alone does not show "
            f"that its code computes the same with parts of its weights; it runs for {', '.join(sorted(COMPARED))}"
        )
    wholes = str(model.config.model_type)
    if is_multimodal(model.config) and wholes not in COMPARED_WHOLES:
        raise UnsupportedModelError(
            f"tensor_parallel={size}: the text part of {wholes} was not compared with one process yet; of multimodal "
            f"models it runs for {', '.join(sorted(COMPARED_WHOLES))}"
        )
    decoder, head_module = _decoder_and_head(model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder), "")
    modules = dict(model.named_modules())
    cuts: dict[str, Cut] = {}
    summed: list[str] = []
    for name, module in modules.items():
        style = plan.get(_pattern(name.removeprefix(prefix)))
        if style == "moe_tp_experts":
            summed.append(name)
        elif style is not None and style not in _WHOLE:
            weight, bias = _linear(name, module, style, size)
            dim = {"colwise": -2, "rowwise": -1}[style]
            cut = _cut(f"{name}.weight", weight, dim, config, rank, size)
            cuts[f"{name}.weight"] = cut
            if style == "rowwise":
                summed.append(name)
            elif bias is not None:
                cuts[f"{name}.bias"] = Cut(-1, cut.start, cut.stop, cut.full)
    for name, parameter in model.named_parameters():
        style = plan.get(_pattern(name.removeprefix(prefix)))
        if style is None:
            continue
        if style not in ("packed_colwise", "colwise", "rowwise") or parameter.dim() != 3:
            raise _unknown(name, style, size)
        dim = -1 if style == "rowwise" else -2
        cuts[name] = _even(name, parameter.shape[dim], dim, rank, size, packed=1 + (style == "packed_colwise"))
    head = next((name for name, module in modules.items() if module is head_module), "")
    if type(head_module) is not nn.Linear or not cuts:
        raise UnsupportedModelError(f"tensor_parallel={size}: {kind} has no plain output projection; leave it out")
    rows = head_module.out_features
    part = -(-rows // size)
    start = min(rank * part, rows)
    cuts[f"{head}.weight"] = Cut(-2, start, min(start + part, rows), rows)
    if head_module.bias is not None:
        cuts[f"{head}.bias"] = Cut(-1, start, min(start + part, rows), rows)
    return Sharding(rank, size, cuts, tuple(summed), head, rows)


def _decoder_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module | None]:
    if is_multimodal(model.config):
        return parts_of(model)
    return model.base_model, model.get_output_embeddings()


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name)


def _unknown(name: str, style: Any, size: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"tensor_parallel={size}: transformers' plan has {name} as {style!r}, which is not done here; leave it out"
    )


def _linear(name: str, module: nn.Module, style: Any, size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if type(module) is not nn.Linear or style not in ("colwise", "rowwise"):
        raise _unknown(name, style, size)
    return module.weight, module.bias


def _cut(name: str, weight: torch.Tensor, dim: int, config: PreTrainedConfig, rank: int, size: int) -> Cut:
    """The cut of a projection: whole heads of attention, even parts of everything else."""
    full = weight.shape[dim]
    if ".self_attn." not in name:
        return _even(name, full, dim, rank, size)
    values: Any = config
    heads = int(values.num_attention_heads)
    pairs = int(getattr(values, "num_key_value_heads", None) or heads)
    if heads % size:
        raise UnsupportedModelError(
            f"tensor_parallel={size} does not divide the {heads} attention heads of {config.model_type}; give a "
            f"divisor of {heads}"
        )
    if pairs % size and size % pairs:
        raise UnsupportedModelError(
            f"tensor_parallel={size} neither divides the {pairs} key and value heads of {config.model_type} nor is a "
            f"multiple of them; give a divisor of {pairs}"
        )
    if name.rpartition(".")[0].rpartition(".")[2] not in _KEYS_AND_VALUES or pairs % size == 0:
        return _even(name, full, dim, rank, size)
    width = full // pairs  # each head is on several ranks
    head = rank * pairs // size
    return Cut(dim, head * width, (head + 1) * width, full)


def _even(name: str, full: int, dim: int, rank: int, size: int, packed: int = 1) -> Cut:
    full //= packed
    if full % size:
        raise UnsupportedModelError(
            f"tensor_parallel={size} does not divide the size {full} of {name}; give a divisor of {full}"
        )
    part = full // size
    return Cut(dim, rank * part, (rank + 1) * part, full, packed)
