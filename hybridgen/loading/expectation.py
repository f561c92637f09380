"""Compares what a checkpoint's files hold with what its model expects, before anything of size is allocated.

The model is built from its config on torch's meta device, where a tensor has a shape and no memory, and the headers of
the files are held against it. Transformers allocates what the config asks for, and finds then that the file is another
model's; and it copies the codes of a quantised weight into a floating-point one without a word.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hybridgen.errors import CheckpointError, UnsupportedModelError
from hybridgen.loading.checks import TensorEntry, few, read_header, read_json
from hybridgen.loading.files import config_value
from hybridgen.loading.formats import Format
from hybridgen.loading.places import Places
from hybridgen.loading.source import Source, load_errors
from hybridgen.loading.stored import TensorFiles, check_files, find_stored
from hybridgen.models.text_part import text_config

QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where quantisers say what they did, when not in config.json: ModelOpt; AutoGPTQ; AutoAWQ."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_TORCH_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SCALES = re.compile(
    r"(weight|input|output|activation)_(scale|scales|scale_inv|zero_point|zeros|packed|shape|g_idx|global_scale)(_\d+)?"
    r"|scales?|scale_inv|zeros|qweight|qzeros|g_idx|SCB|absmax|quant_map|quant_state.*|weight\.(absmax|quant_.*|nested_.*)"
    r"|weight_format|(input|output)_amax|weight_quantizer\..*|input_quantizer\..*"
)
"""What quantisers keep beside a weight, after the name of its module."""
_PARTS = re.compile(r"_(blocks|scales?|scale_inv|packed|zeros|zero_points?)$")
"""What quantisers put at the end of a parameter's own name."""
_PARTS_PER_TENSOR = 16
"""A file's tensor can become several of the model's (joined projections that the model has apart), but not many."""
_MORE_PARTS = 2000


def check_quantisation_files(source: Source) -> None:
    """Refuse a checkpoint whose quantisation is described in a file of its own.

    Raises:
        UnsupportedModelError: there is one, and it does not say that the weights are as they were.
        CheckpointError: it is broken.
    """
    for name in QUANTISATION_FILES:
        file = source.find(name)
        if file is None:
            continue
        values = read_json(file)
        inner = values.get("quantization")
        method: Any = inner.get("quant_algo", "unknown") if isinstance(inner, dict) else "unknown"
        if method is None:  # only the KV cache of another engine
            continue
        if method == "unknown":
            method = values.get("quant_method") or values.get("bits") or method
        raise UnsupportedModelError(
            f"{source.name!r} has quantised weights ({name}, {str(method)[:40]!r}); load a float32, bfloat16 or "
            "float16 checkpoint of it"
        )


def check_contents(
    source: Source,
    files: list[Path],
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None = None,
    layout: Format | None = None,
) -> None:
    """Check that the weight files hold what the config asks for.

    Names go by `Places`. What transformers converts while it loads (experts joined, projections split) has other names:
    there, the number of elements in all must do.

    Args:
        files: validated.
        model_class: of code that the checkpoint brings, or of a multimodal model without its encoders; None takes the
            one that transformers has.
        layout: how quantised weights are stored; they count as what they become. None: there are none.

    Raises:
        CheckpointError: the config asks for layers, weights or shapes that the files do not have, or cannot be built;
            or a tensor of a quantised weight is missing or of another shape.
        UnsupportedModelError: weights are integers or 8-bit numbers, or have scales beside them.
    """
    if layout is not None:
        check_files(files, f"they are quantised, {layout.method}")
        with TensorFiles(files) as tensors:
            found = find_stored(tensors, layout)[1]
    else:
        found = _entries(files)
    if not found:
        return
    _check_layers(source, found, text_config(hf_config))
    model = skeleton(source, found, hf_config, model_class)
    names = Places(model)
    expected, places = names.expected, {name: names.of(name) for name in found}
    _check_dtypes(source, found, expected, places)
    _check_scales(source, found, names, places)
    _check_shapes(source, found, expected, places)
    _check_total(source, found, model, set(places.values()))


def _entries(files: list[Path]) -> dict[str, TensorEntry]:
    """All tensors of the files, by name."""
    entries: dict[str, TensorEntry] = {}
    for file in files:
        entries |= read_header(file) if file.suffix == ".safetensors" else _pickled(file)
    return entries


def _pickled(file: Path) -> dict[str, TensorEntry]:
    try:
        # On the meta device, tensors' bytes are not read.
        values = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{file} holds a {type(values).__name__}, no weights by name; fetch it again")
    return {
        str(name): TensorEntry(_TORCH_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), 0, 0)
        for name, tensor in values.items()
        if isinstance(tensor, torch.Tensor)
    }


def _check_layers(source: Source, found: Mapping[str, TensorEntry], hf_config: PreTrainedConfig) -> None:
    """Building a million layers takes long on the meta device too."""
    asked = config_value(hf_config, "num_hidden_layers")
    if not isinstance(asked, int) or asked <= len(found):
        return
    numbers = [int(match[1]) for name in found if (match := re.search(r"(?:^|\.)(\d{1,9})\.", name))]
    held = f"weights of {max(numbers) + 1} layers" if numbers else f"{len(found)} tensors"
    raise CheckpointError(
        f"the config of {source.name!r} asks for {asked} layers, and its files hold {held}; they do not belong together"
    )


def skeleton(
    source: Source,
    found: Mapping[str, TensorEntry],
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None,
) -> PreTrainedModel:
    """A model of the config without memory, on the meta device.

    Raises:
        CheckpointError: it cannot be built, or has far more parts than the files.
    """
    config = copy.deepcopy(hf_config)  # building one chooses an attention
    failed = f"no model can be built from the config of {source.name!r}"
    with load_errors(source, failed), torch.device("meta"), _limited(source, len(found)):
        return AutoModelForCausalLM.from_config(config) if model_class is None else model_class(config)


@contextmanager
def _limited(source: Source, tensors: int) -> Iterator[None]:
    """A model is not built on when it has far more parameters or modules than its files have tensors."""
    thread, counts = threading.get_ident(), {"weights": 0, "modules": 0}
    limit = _MORE_PARTS + _PARTS_PER_TENSOR * tensors

    def counting(what: str) -> Any:
        def count(module: nn.Module, name: str, added: Any) -> None:
            if threading.get_ident() != thread:
                return
            counts[what] += 1
            if counts[what] > limit:
                raise CheckpointError(
                    f"the config of {source.name!r} asks for more than {limit} {what}, and its files hold {tensors} "
                    "tensors; they do not belong together"
                )

        return count

    handles = [
        register_module_parameter_registration_hook(counting("weights")),
        register_module_module_registration_hook(counting("modules")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_dtypes(
    source: Source,
    found: Mapping[str, TensorEntry],
    expected: Mapping[str, torch.Tensor],
    places: Mapping[str, str | None],
) -> None:
    wrong = [
        f"{name} is {found[name].dtype}"
        for name, place in sorted(places.items())
        if found[name].dtype not in _FLOATS and _is_weight(name, None if place is None else expected[place])
    ]
    if wrong:
        raise UnsupportedModelError(
            f"{source.name!r} has weights that are no floating-point numbers of 16 bits or more, so that they are "
            f"quantised or broken: {few(wrong)}; load a float32, bfloat16 or float16 checkpoint of it"
        )


def _is_weight(name: str, expected: torch.Tensor | None) -> bool:
    """Whether a tensor of a file is, or becomes a part of, one of the model's floating-point parameters. What
    transformers joins, such as experts, is known by its name alone; masks and position ids are not called weights.
    """
    if expected is None:
        return name.endswith(".weight")
    return isinstance(expected, nn.Parameter) and expected.is_floating_point()


def _check_scales(
    source: Source,
    found: Mapping[str, TensorEntry],
    known_names: Places,
    places: Mapping[str, str | None],
) -> None:
    """Refuse what a quantiser keeps beside a weight."""
    expected, prefix = known_names.expected, known_names.prefix
    # Those of the files too: an expert's weight has another name in the model.
    weights = {name.removesuffix(".weight") for name in (*expected, *found) if name.endswith(".weight")}
    names = []
    for name in sorted(name for name, place in places.items() if place is None):
        # "a.b.weight_scale", "a.b.weight.absmax" and "a.b.weight.quant_state.bitsandbytes__nf4"
        for parts in (1, 2, 3):
            owner, _, rest = _split(name, parts)
            known = {owner, prefix + owner, owner.removeprefix(prefix)}
            if known & weights and _SCALES.fullmatch(rest):
                names.append(name)
                break
        else:  # "a.b.gate_up_proj_blocks", beside no weight but in its place
            if known_names.of(_PARTS.sub("", name)) is not None and _PARTS.search(name):
                names.append(name)
    if names:
        raise UnsupportedModelError(
            f"{source.name!r} has quantised weights: beside them are {few(names)}; load a float32, bfloat16 or float16 "
            "checkpoint of it"
        )


def _split(name: str, parts: int) -> tuple[str, str, str]:
    """A name before its last parts, and those."""
    pieces = name.split(".")
    return ".".join(pieces[:-parts]), ".", ".".join(pieces[-parts:])


def _check_shapes(
    source: Source,
    found: Mapping[str, TensorEntry],
    expected: Mapping[str, torch.Tensor],
    places: Mapping[str, str | None],
) -> None:
    # Of as many elements: transposed while it is loaded, or found by transformers.
    wrong = [
        f"{place} is {list(found[name].shape)}, the config says {list(expected[place].shape)}"
        for name, place in places.items()
        if place is not None
        and isinstance(expected[place], nn.Parameter)
        and found[name].numel != expected[place].numel()
    ]
    if wrong:
        raise CheckpointError(f"weights of {source.name!r} have other shapes than its config: {few(sorted(wrong))}")


def _check_total(
    source: Source, found: Mapping[str, TensorEntry], model: PreTrainedModel, placed: set[str | None]
) -> None:
    """As many elements as the model's parameters have must be there, whatever their names."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    needed = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if name not in tied and not any(pattern.search(name) for pattern in ignored)
    }
    have = sum(entry.numel for entry in found.values())
    asked = sum(needed.values())
    if asked <= have:
        return
    names = sorted(name for name in needed if name not in placed)
    if names:
        raise CheckpointError(
            f"{source.name!r} lacks {len(names)} weights that its config asks for: {few(names)}; its weights and "
            "config.json do not belong together, or a file is incomplete"
        )
    raise CheckpointError(
        f"the config of {source.name!r} asks for {asked} numbers, and its files hold {have}; they do not belong "
        "together"
    )
