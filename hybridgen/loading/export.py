"""Writes a checkpoint with quantised projections, in the format of compressed-tensors, which other engines read too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from hybridgen.config import EngineConfig
from hybridgen.errors import CheckpointError, ConfigError, first_line, shown
from hybridgen.kernels.linear.layout import IN_ORDER, pack_int4, unpack_int4
from hybridgen.loading.checkpoint import Checkpoint
from hybridgen.loading.checks import few, read_json
from hybridgen.loading.expectation import skeleton
from hybridgen.loading.places import Places
from hybridgen.loading.quantised import quantisable
from hybridgen.loading.stored import TensorFiles, check_files
from hybridgen.models.rounding import quantise

FORMATS = ("ct-w4a16", "ct-fp8")
"""Four bits with a scale for each group of inputs; FP8 with a scale for each output."""
GROUPS = (128, 64, 32)
SHARD_BYTES = 4 * 10**9
_NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")


class Written(NamedTuple):
    """What `write_quantised` wrote."""

    projections: int
    """Quantised ones."""
    bytes: int
    """Of all tensors."""
    files: int
    """Of tensors."""
    experts: int
    """Weights of experts, which stay as they are."""


def write_quantised(
    model: str,
    output: Path,
    form: str,
    config: EngineConfig | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Written:
    """Quantise a checkpoint by rounding to the nearest, tensor by tensor, and write it.

    Routers, experts that transformers joins, the head and everything that is no projection stay as they are.

    Args:
        model: a directory or hub id of a checkpoint that is not quantised.
        output: a directory that is not there, or empty.
        form: one of `FORMATS`.
        config: device (where it is rounded) and how files are read.
        progress: gets the name of each file once it is written.

    Raises:
        ConfigError: the format is unknown, the output is not empty or cannot be written, or the model is quantised
            already.
        CheckpointError: a tensor cannot be quantised: its inputs go into no group, or it holds no numbers.
        LoadError: the model cannot be read; see `Checkpoint.open`.
    """
    if form not in FORMATS:
        raise ConfigError(f"format={shown(form)} is unknown; choose one of: {', '.join(FORMATS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already; name a directory that is not, or an empty one")
    checkpoint = Checkpoint.open(model, config)
    if checkpoint.source is None or checkpoint.layout is not None:
        raise ConfigError(f"{model} is quantised already; give the checkpoint that it was made of")
    if checkpoint.whole_config is not None:
        raise ConfigError(
            f"{model} is a multimodal checkpoint, of which only the text part is read here; save its text model with "
            "save_pretrained() and give that"
        )
    files = checkpoint.fetch()
    check_files(files, "quantised while they are read")
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        return _write(checkpoint, files, output, form, progress)
    except BaseException as error:
        _remove(output, made)
        if isinstance(error, (OSError, SafetensorError)):
            raise ConfigError(
                f"{output} cannot be written: {first_line(error)}; name another directory, on a disk with room for it"
            ) from error
        raise


def _remove(output: Path, made: list[Path]) -> None:
    """Leave nothing half-written, so that it can be tried again."""
    with suppress(OSError):
        for file in output.iterdir():
            file.unlink()
        for path in made:
            path.rmdir()


def _write(
    checkpoint: Checkpoint, files: list[Path], output: Path, form: str, progress: Callable[[str], None]
) -> Written:
    assert checkpoint.source is not None
    with TensorFiles(files) as tensors:
        shape = skeleton(checkpoint.source, tensors.entries, checkpoint.hf_config, checkpoint.model_class())
        linears = quantisable(shape)
        known = Places(shape)
        places = {name: known.of(name) for name in tensors.entries}
        chosen = {name for name, place in places.items() if place and place.removesuffix(".weight") in linears}
        group = _group(form, {tensors.entries[name].shape[1] for name in chosen})
        output.mkdir(parents=True, exist_ok=True)
        shards = _Shards(output, progress)
        for name in sorted(tensors.entries):
            if name not in chosen:
                shards.add({name: tensors.lazy(name)[...]})
                continue
            values = tensors.lazy(name)[...].to(checkpoint.device)
            try:
                parts = _parts(values, form, group)
            except ValueError as error:
                raise CheckpointError(f"{tensors.places[name]}: {name!r} cannot be quantised: {error}") from None
            owner = name.removesuffix(".weight")
            shards.add({f"{owner}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()})
        names = {name.removesuffix(".weight") for name in chosen}
        others = {name: len(entry.shape) for name, entry in tensors.entries.items() if name not in chosen}
        experts = sum(dims > 1 and ".experts." in name for name, dims in others.items())
        written = shards.finish()
    source = checkpoint.source.find("config.json")
    assert source is not None
    values = read_json(source)
    values["quantization_config"] = _config(form, group, _ignored(shape, names, known.prefix))
    (output / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for file in sorted(source.parent.iterdir()):
        wanted = file.is_file() and file.suffix in _COPIED and not file.name.endswith(".index.json")
        if wanted and file.name not in _NOT_COPIED:
            shutil.copyfile(file, output / file.name)
    return Written(len(chosen), *written, experts)


def _group(form: str, inputs: set[int]) -> int | None:
    """The largest group that goes into the inputs of all projections; None where a scale is an output's."""
    if not inputs:
        raise CheckpointError("the checkpoint has no projection that can be quantised")
    if form == "ct-fp8":
        return None
    found = next((group for group in GROUPS if not any(size % group for size in inputs)), None)
    if found is None:
        odd = sorted(str(size) for size in inputs if size % GROUPS[-1])
        raise CheckpointError(f"projections have {few(odd)} inputs, which are no multiple of {GROUPS[-1]}; use ct-fp8")
    return found


def _parts(values: Tensor, form: str, group: int | None) -> dict[str, Tensor]:
    """The tensors of a projection, by what follows its name."""
    dtype = values.dtype
    if form == "ct-fp8":
        weight = quantise(values, "fp8", dtype)
        return {"weight": weight.data, "weight_scale": weight.scales}
    assert group is not None
    weight = quantise(values, "int4", dtype, group, symmetric=True)
    return {
        "weight_packed": pack_int4(unpack_int4(weight.data, weight.inputs), IN_ORDER),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(values.shape, dtype=torch.int64),
    }


def _ignored(model: nn.Module, quantised: set[str], prefix: str) -> list[str]:
    """Projections that stay as they are, by name, and experts by a pattern."""
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    known = quantised | {prefix + name for name in quantised}
    found = [name for name in plain if name not in known]
    return found + [r"re:.*\.experts\..*"] * any(hasattr(module, "experts") for module in model.modules())


def _config(form: str, group: int | None, ignored: list[str]) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors."""
    weights: dict[str, Any] = {"dynamic": False, "symmetric": True, "observer": "minmax"}
    activations = None
    if form == "ct-fp8":
        weights |= {"num_bits": 8, "type": "float", "strategy": "channel"}
        # Other engines quantise activations as they come; here they stay as they are.
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    else:
        weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    layout = "float-quantized" if form == "ct-fp8" else "pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ignored,
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
            }
        },
    }


class _Shards:
    """Writes tensors to files of a few gigabytes, and an index where there are several."""

    def __init__(self, output: Path, progress: Callable[[str], None]) -> None:
        self._output, self._progress = output, progress
        self._tensors: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._files: list[list[str]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take some tensors of one projection; they stay in one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._tensors and self._size + size > SHARD_BYTES:
            self._flush()
        self._tensors |= tensors
        self._size += size
        self._total += size

    def _flush(self) -> None:
        name = f"part-{len(self._files)}.safetensors"
        save_file(self._tensors, self._output / name, metadata={"format": "pt"})
        self._files.append(sorted(self._tensors))
        self._tensors, self._size = {}, 0
        self._progress(name)

    def finish(self) -> tuple[int, int]:
        """Name the files as transformers does; returns the bytes of all tensors, and the number of files."""
        if self._tensors:
            self._flush()
        count = len(self._files)
        places: dict[str, str] = {}
        for number, names in enumerate(self._files):
            last = "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
            (self._output / f"part-{number}.safetensors").rename(self._output / last)
            places |= dict.fromkeys(names, last)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": places}
            (self._output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return self._total, count
