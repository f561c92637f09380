"""The scales of keys and values in 8 bits that a checkpoint has beside its weights.

Names as engines write them (vLLM, SGLang, ModelOpt, compressed-tensors): `k_scale` and `v_scale` of an attention
module, or of its `k_proj` and `v_proj`, or one `kv_scale` for both. What is cached is a key divided by its scale.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hybridgen.cache import KVScales
from hybridgen.errors import CheckpointError, DeviceError, UnsupportedModelError
from hybridgen.loading.stored import TensorFiles

_NAME = re.compile(r"(?P<owner>.+?)(\.(k_proj|v_proj|qkv_proj|attn))?\.(?P<part>k_scale|v_scale|kv_scale)")
_LAYER = re.compile(r".*?\blayers\.(\d+)\.")
_MTP = re.compile(r"(model\.)?mtp[._]")
_FEWEST = (8, 9)
"""Compute capability from which Triton's kernels take numbers of 8 bits."""


def is_scale(name: str) -> bool:
    """Whether a tensor of this name is a scale of cached keys or values."""
    return _NAME.fullmatch(name) is not None


def check_kv_dtype(kv_dtype: str | None, device: torch.device, latents: Sequence[str]) -> None:
    """Raise if keys and values cannot be cached as asked for.

    Args:
        latents: names of the modules that cache latents.

    Raises:
        UnsupportedModelError: layers cache something else.
        DeviceError: the device's kernels do not read it.
    """
    if kv_dtype is None:
        return
    if latents:
        raise UnsupportedModelError(
            f"kv_dtype={kv_dtype!r}: {latents[0]} caches latents instead of keys and values, which stay in the dtype "
            "of the weights; leave kv_dtype out"
        )
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < _FEWEST:
            raise DeviceError(
                f"kv_dtype={kv_dtype!r} needs a GPU of compute capability {_FEWEST[0]}.{_FEWEST[1]} or more, and "
                f"{device} has {found[0]}.{found[1]}; leave kv_dtype out"
            )


def read_kv_scales(files: Sequence[Path], modules: Sequence[str], layers: int | None) -> dict[str, KVScales]:
    """The scales of safetensors files, by the names of the model's attention modules.

    Modules without are left out, and so are layers that the model does not have, which predict several tokens (MTP).

    Args:
        modules: the attention modules' names. A file's name may have another prefix before `layers.`.
        layers: how many the model has; None: unknown.

    Raises:
        CheckpointError: a scale is damaged, has no partner, or belongs to no attention module, or two are for the same;
            names it and its file.
    """
    found: dict[str, dict[str, Tensor]] = {}
    names: dict[tuple[str, str], str] = {}
    with TensorFiles([file for file in files if file.suffix == ".safetensors"]) as tensors:
        behind = {
            match[0]
            for name in tensors.entries
            if not is_scale(name) and (match := _LAYER.match(name)) and layers is not None and int(match[1]) >= layers
        }
        for name in tensors.entries:
            match, layer = _NAME.fullmatch(name), _LAYER.match(name)
            if match is None or _MTP.match(name) or (layer is not None and layer[0] in behind):
                continue
            owners = [module for module in modules if module == match["owner"]] or [
                module for module in modules if _tail(module) == _tail(match["owner"])
            ]
            if len(owners) != 1:
                raise CheckpointError(
                    f"{tensors.places[name]}: {name!r} is a scale of cached keys or values, and the model has "
                    f"{len(owners) or 'no'} attention modules of that name; leave kv_dtype out, or fetch the file again"
                )
            values = tensors.read(name, torch.device("cpu")).float().flatten()
            if not values.numel() or not bool((torch.isfinite(values) & (values > 0)).all()):
                raise CheckpointError(
                    f"{tensors.places[name]}: {name!r} holds scales that are not finite and above 0; fetch the file "
                    "again, or leave kv_dtype out"
                )
            parts = ("k_scale", "v_scale") if match["part"] == "kv_scale" else (match["part"],)
            for part in parts:
                other = names.setdefault((owners[0], part), name)
                if other != name:
                    raise CheckpointError(
                        f"{tensors.places[name]}: {other!r} and {name!r} are both the {part} of {owners[0]}; leave "
                        "kv_dtype out, or take one of them out of the file"
                    )
            found.setdefault(owners[0], {}).update(dict.fromkeys(parts, values))
    for owner, parts_of in found.items():
        missing = {"k_scale", "v_scale"} - set(parts_of)
        if missing:
            raise CheckpointError(
                f"{owner} has scales of cached keys or values, but no {missing.pop()}; leave kv_dtype out"
            )
    return {owner: KVScales(parts_of["k_scale"], parts_of["v_scale"]) for owner, parts_of in found.items()}


def _tail(name: str) -> str:
    """From the last `layers.` or `h.` on: what stays where a model's prefix is another."""
    return re.sub(r".*\b(layers|h|blocks)\.(?=\d)", "", name)
