"""One quantised projection in a file of its own: what a format's reader makes of it, without a model around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import quantised_formats as formats
import torch
from safetensors.torch import save_file
from torch import Tensor

from hybridgen.loading.formats import read_format
from hybridgen.loading.stored import Stored, TensorFiles, find_stored
from hybridgen.models.quantised import QuantisedWeight

OUTPUTS, INPUTS = 32, 64
KEY = "model.layers.1.self_attn.k_proj"
CPU = torch.device("cpu")
Edit = Callable[[dict[str, Tensor]], None]
"""Changes tensors by their names behind the projection's name and a dot."""


def write_one(path: Path, name: str, edit: Edit | None = None, outputs: int = OUTPUTS, inputs: int = INPUTS) -> Tensor:
    """Write a projection in a format of `quantised_formats`; returns its values."""
    writer, _ = formats.FORMATS[name]
    written = writer(outputs, inputs, torch.Generator().manual_seed(outputs + inputs))
    tensors = {part.removeprefix("."): tensor.contiguous() for part, tensor in written.tensors.items()}
    if edit is not None:
        edit(tensors)
    save_file({f"{KEY}.{part}": tensor.contiguous() for part, tensor in tensors.items()}, path)
    return written.values


def find_one(files: TensorFiles, name: str, config: Mapping[str, Any] | None = None) -> Stored:
    """What is known of it when a checkpoint is opened.

    Args:
        config: its `quantization_config`; None: that of the format.
    """
    layout = read_format(formats.FORMATS[name][1] if config is None else config)
    assert layout is not None
    return find_stored(files, layout)[0][KEY]


def read_one(path: Path, name: str, config: Mapping[str, Any] | None = None) -> QuantisedWeight | Tensor:
    """Its weight, in float32."""
    with TensorFiles([path]) as files:
        weight = find_one(files, name, config).checked(files).read(files, CPU, torch.float32)
    return weight.copy() if isinstance(weight, QuantisedWeight) else weight
