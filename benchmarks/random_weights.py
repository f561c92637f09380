"""Checkpoints of published shapes with random weights: whole files, or files that are empty but for their headers.

Of the latter the ranks of an engine make the values themselves, on their devices, so that a model of any size is
there within seconds: `install()` in each of their processes.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from common import shape_config
from transformers import AutoModelForCausalLM

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_BLOCK = 2**26
"""Random values that a file repeats, each tensor from another place on."""


def write(name: str, dtype: torch.dtype, directory: Path, *, values: bool) -> Path:
    """Write a checkpoint of a shape.

    Args:
        values: False leaves holes where values would be: nothing is stored.
    """
    config: Any = shape_config(name)
    config.eos_token_id = None
    config.dtype = dtype
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    sizes = {name: list(value.shape) for name, value in model.named_parameters()}  # a tied head is there once
    header: dict[str, Any] = {}
    place = 0
    for key, shape in sizes.items():
        end = place + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if values:
            _write_values(file, sizes, dtype)
        else:
            os.truncate(file.fileno(), 8 + len(text) + place)
    return directory


def _write_values(file: Any, sizes: dict[str, list[int]], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    most = min(_BLOCK, max(math.prod(shape) for shape in sizes.values()))
    block = torch.empty(2 * most).normal_(0, 0.02).to(dtype)
    ones = torch.ones(max(shape[0] for shape in sizes.values()), dtype=dtype)
    for key, shape in sizes.items():
        left = math.prod(shape)
        if "norm" in key:
            file.write(ones[:left].view(torch.uint8).numpy())
            continue
        first = zlib.crc32(key.encode()) % most
        while left:
            part = block[first : first + min(left, most)]
            file.write(part.view(torch.uint8).numpy())
            left -= part.numel()


class Made:
    """A tensor that is made on the current device when a part of it is asked for, the same on all ranks."""

    def __init__(self, name: str, shape: list[int], dtype: str) -> None:
        self._name, self._shape, self._dtype = name, shape, dtype
        cuda = torch.cuda.is_available()  # asked for on other threads, whose current device is another
        self._device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, place: Any) -> torch.Tensor:
        shape = list(torch.empty(self._shape, device="meta")[place].shape)
        device = self._device
        if "norm" in self._name:
            return torch.ones(shape, dtype=_DTYPES[self._dtype], device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(self._name.encode()))
        values = torch.empty(shape, dtype=_DTYPES[self._dtype], device=device)
        return values.normal_(0, 0.02, generator=generator)


def install() -> None:
    """Have ranks of this process make the values of empty files."""
    from hybridgen.loading.stored import TensorFiles
    from hybridgen.parallel import weights

    class MadeFiles(TensorFiles):
        def lazy(self, name: str) -> Made:
            entry = self.entries[name]
            return Made(name, list(entry.shape), entry.dtype)

    weights.TensorFiles = MadeFiles  # type: ignore[misc]


def install_everywhere() -> None:
    """Have this process and the other ranks that it will start make the values of empty files."""
    from hybridgen.parallel import ranks

    install()
    here = str(Path(__file__).parent)
    lines = ["import sys", f"sys.path.insert(0, {here!r})", "import random_weights", "random_weights.install()"]
    ranks.COMMAND = "\n".join([*lines, ranks.COMMAND])
