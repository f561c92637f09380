"""The head for multi-token prediction (MTP) that some checkpoints carry: one more decoder layer, trained to predict the
token behind the next one (DeepSeek-V3, arXiv:2412.19437, section 2.2). transformers leaves its tensors out.

It runs where the files have it as a layer behind the last one, which is a layer of the model's own kind with these
beside it:

| tensor, behind `model.layers.<layers>.` | shape | what it is |
|---|---|---|
| enorm.weight, hnorm.weight | [H] | RMS norms of the embedding, of the hidden state |
| eh_proj.weight | [H, 2 * H] | makes the layer's input of both, side by side |
| shared_head.norm.weight | [H] | RMS norm of the layer's output |
| embed_tokens.weight, shared_head.head.weight | | the model's own, which are used |

Every tensor is used, or refused by its name, before any weight is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hybridgen.errors import CheckpointError, ConfigError, UnsupportedModelError
from hybridgen.loading.checkpoint import Checkpoint
from hybridgen.loading.checks import TensorEntry, few, read_header
from hybridgen.loading.kv_scales import is_scale
from hybridgen.loading.source import load_errors
from hybridgen.loading.weights import check_loading_info

_SHARED = ("embed_tokens.weight", "shared_head.head.weight")
_BESIDE = {"enorm": 1, "hnorm": 1, "eh_proj": 2, "shared_head.norm": 1}
"""With how many dimensions."""
_ELSEWHERE = re.compile(r"^(model\.)?mtp[._]")


class MtpFiles(NamedTuple):
    """A head whose tensors were checked."""

    prefix: str
    """Of its tensors' names."""
    config: PreTrainedConfig
    """The model's, with that one layer."""
    files: Mapping[str, Path]
    """By the names of its tensors, without the prefix."""


class MtpWeights(NamedTuple):
    """A head's weights, on the device."""

    model: PreTrainedModel
    """A model of the same class with the head's layer, whose norm is the head's; embedding and head are the other
    model's values."""
    token_norm: Tensor
    hidden_norm: Tensor
    join: Tensor


def find_mtp(model: Checkpoint) -> MtpFiles:
    """The head that a checkpoint carries.

    Raises:
        ConfigError: it is none whose files are there, or it carries no head.
        UnsupportedModelError: it carries one in another form, several, or is quantised.
        CheckpointError: tensors are missing or have other shapes.
    """
    if model.source is None or model.module is not None:
        raise ConfigError(f'drafter="mtp": {model.name!r} is a live module, and such a head is read from files')
    if model.layout is not None or model.whole_config is not None:
        what = "quantised" if model.layout is not None else "multimodal"
        raise UnsupportedModelError(f'drafter="mtp": {model.name!r} is {what}; heads of such checkpoints do not run')
    entries = {name: (entry, file) for file in _safetensors(model) for name, entry in read_header(file).items()}
    count = int(getattr(model.hf_config, "num_hidden_layers", 0))
    behind = {match[1] for name in entries if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    layers = sorted(int(number) for number in behind if int(number) >= count)
    if not layers:
        elsewhere = sorted(name for name in entries if _ELSEWHERE.match(name))
        if elsewhere:
            raise UnsupportedModelError(
                f'drafter="mtp": {model.name!r} has its head as {few(elsewhere)}; hybridgen runs heads that are a '
                "layer behind the last one"
            )
        raise ConfigError(f'drafter="mtp": {model.name!r} carries no head for multi-token prediction; give another')
    if layers != [count]:
        raise UnsupportedModelError(
            f'drafter="mtp": {model.name!r} has the layers {layers} behind its {count}; heads of one layer run'
        )
    prefix = f"model.layers.{count}."
    own = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
    _check_shapes(model, prefix, {name: entry for name, (entry, _) in own.items()})
    return MtpFiles(prefix, _one_layer(model.hf_config, count), {name: file for name, (_, file) in own.items()})


def read_mtp(head: MtpFiles, checkpoint: Checkpoint, model: PreTrainedModel) -> MtpWeights:
    """Its weights.

    Args:
        model: the checkpoint's, on the device.

    Raises:
        CheckpointError: they cannot be read, or the layer's do not fit the model's kind of layer.
    """
    if checkpoint.source is None:
        raise RuntimeError("a head is read from files")
    device, dtype = checkpoint.device, checkpoint.dtype
    with load_errors(checkpoint.source, f"the MTP head of {checkpoint.name!r} cannot be read"):
        stored = _stored(head)
        beside = {name: stored.pop(f"{name}.weight").to(device, dtype) for name in ("enorm", "hnorm", "eh_proj")}
        state = {f"model.layers.0.{name}": value for name, value in stored.items() if name not in _SHARED}
        state["model.norm.weight"] = state.pop("model.layers.0.shared_head.norm.weight")
        state["model.embed_tokens.weight"] = _weight(model.get_input_embeddings())
        state["lm_head.weight"] = _weight(model.get_output_embeddings())
        loader: Any = type(model).from_pretrained
        one, info = loader(
            None,
            config=head.config,
            state_dict=state,
            dtype=dtype,
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if info["unexpected_keys"]:
        names = few(sorted(name.replace("model.layers.0.", head.prefix) for name in info["unexpected_keys"]))
        raise UnsupportedModelError(f"the MTP head of {checkpoint.name!r} has tensors that its layer does not: {names}")
    check_loading_info(checkpoint.source, info)
    return MtpWeights(one.eval().requires_grad_(False), beside["enorm"], beside["hnorm"], beside["eh_proj"])


def _safetensors(model: Checkpoint) -> list[Path]:
    files = model.fetch()
    if any(file.suffix != ".safetensors" for file in files):
        raise UnsupportedModelError(
            f'drafter="mtp": {model.name!r} has pickled weights; heads are read from safetensors'
        )
    return files


def _check_shapes(model: Checkpoint, prefix: str, own: Mapping[str, TensorEntry]) -> None:
    hidden = int(model.hf_config.hidden_size)
    expected = {1: (hidden,), 2: (hidden, 2 * hidden)}
    for name, dims in _BESIDE.items():
        entry = own.get(f"{name}.weight")
        if entry is None:
            raise UnsupportedModelError(
                f'drafter="mtp": the layer {prefix[:-1]} of {model.name!r} has no {name}.weight; hybridgen runs heads '
                "with enorm, hnorm, eh_proj and shared_head.norm"
            )
        if entry.shape != expected[dims]:
            raise CheckpointError(
                f"{prefix}{name}.weight of {model.name!r} is {list(entry.shape)}, its config says "
                f"{list(expected[dims])}"
            )


def _one_layer(config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    """A config whose only layer is as one behind the last would be."""
    one: Any = copy.deepcopy(config)
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if kinds:
            setattr(one, name, [list(kinds)[-1]])
    if isinstance(getattr(config, "first_k_dense_replace", None), int):
        one.first_k_dense_replace = max(0, config.first_k_dense_replace - index)
    one.num_hidden_layers = 1
    one.tie_word_embeddings = False
    return one  # type: ignore[no-any-return]


def _weight(module: Any) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise UnsupportedModelError(f"a {type(module).__name__} has no weight that an MTP head can share")
    return weight.detach()


def _stored(head: MtpFiles) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(set(head.files.values())):
        with safe_open(file, "pt") as opened:
            for name in (name for name, there in head.files.items() if there == file and name not in _SHARED):
                if not is_scale(name):  # a draft need not be exact, and its keys do without
                    found[name] = opened.get_tensor(head.prefix + name)
    return found
