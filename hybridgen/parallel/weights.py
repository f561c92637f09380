"""Reads a rank's share of a checkpoint: of each tensor in the files only the slice that the rank has."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hybridgen.cache import KVScales
from hybridgen.errors import CheckpointError, UnsupportedModelError
from hybridgen.loading import Checkpoint, LoadedModel
from hybridgen.loading.assembly import Reader, assemble
from hybridgen.loading.device import without_default_device
from hybridgen.loading.kv_scales import is_scale
from hybridgen.loading.quantised import load_quantised
from hybridgen.loading.source import load_errors
from hybridgen.loading.stored import TensorFiles, check_files
from hybridgen.loading.weights import check_loading_info, progress_bars
from hybridgen.models.quantised import QuantisedWeight
from hybridgen.models.text_part import as_text_part, left_out_names
from hybridgen.parallel.group import Group
from hybridgen.parallel.modules import cut_parameters, join
from hybridgen.parallel.plan import Cut, Sharding, shard


class Slice:
    """A part of a tensor in a file, which is read when it is indexed with `...`, as transformers does."""

    def __init__(self, lazy: Any, cut: Cut, name: str) -> None:
        """
        Args:
            lazy: a slice of safetensors.

        Raises:
            CheckpointError: the tensor has another size along the cut than the config says.
        """
        self._lazy, self._cut = lazy, cut
        shape = list(lazy.get_shape())
        self._packed = cut.packed > 1 and shape[cut.dim] == cut.packed * cut.full
        if not self._packed and shape[cut.dim] != cut.full:
            raise CheckpointError(
                f"{name!r} has the shape {shape}, and the config says {cut.full} along dimension {cut.dim}; weights "
                "and config.json do not belong together"
            )
        part = cut.stop - cut.start
        shape[cut.dim] = part * cut.packed if self._packed else part
        self.shape = torch.Size(shape)

    def get_shape(self) -> list[int]:
        """Of the part, as a safetensors slice has it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return str(self._lazy.get_dtype())

    def __getitem__(self, place: Any) -> Tensor:
        cut = self._cut
        before = (slice(None),) * (len(self.shape) + cut.dim)
        starts = [piece * cut.full for piece in range(cut.packed if self._packed else 1)]
        parts = [self._lazy[(*before, slice(start + cut.start, start + cut.stop))] for start in starts]
        # A slice of the inputs can be a view of the file's whole tensor, which kernels would read with gaps.
        found = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=cut.dim)
        return found if place is Ellipsis else found[place]


def whole(checkpoint: Checkpoint) -> PreTrainedModel:
    """A checkpoint's model without weights, on the meta device; a multimodal one without its encoders."""
    with without_default_device(), torch.device("meta"):
        if checkpoint.whole_config is None:
            return AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.hf_config))
        model_class: Any = checkpoint.built_class()
        return model_class._from_config(copy.deepcopy(checkpoint.whole_config))


class _Parts:
    """What a rank has; see `loading.quantised.Parts`."""

    def __init__(self, checkpoint: Checkpoint, skeleton: PreTrainedModel, sharding: Sharding) -> None:
        self._checkpoint, self._skeleton, self._sharding = checkpoint, skeleton, sharding

    def tensors(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The rank's parts of tensors that are read when they are indexed, by the files' names."""
        sharding = self._sharding
        tied = bool(getattr(self._checkpoint.hf_config, "tie_word_embeddings", False))
        state: dict[str, Any] = {}
        for name, place in _places(self._skeleton, list(tensors)).items():
            cut = sharding.cuts.get(place)
            if cut is None or (tied and place == f"{sharding.head}.weight"):
                state[name] = tensors[name]
            else:
                state[name] = Slice(tensors[name], cut, name)
        return state

    def readers(self, readers: Mapping[str, Reader]) -> dict[str, Reader]:
        """What gives the rank's parts of quantised weights. Each is read whole, so that it rounds as it does there."""
        return {name: self._part(name, read) for name, read in readers.items()}

    def _part(self, name: str, read: Reader) -> Reader:
        cut = self._sharding.cuts.get(f"{name}.weight")
        if cut is None:
            return read

        def part(device: torch.device, dtype: torch.dtype) -> QuantisedWeight:
            weight = read(device, dtype)
            try:
                found = (weight.rows if cut.dim == -2 else weight.columns)(cut.start, cut.stop)
            except ValueError as error:
                raise UnsupportedModelError(
                    f"tensor_parallel={self._sharding.size}: the quantised weight of {name} cannot be cut: {error}; "
                    "give a smaller number, or leave it out"
                ) from None
            return found.copy()  # nothing holds the whole one

        return part

    def model_class(self, kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """The class, whose models have the rank's parameters. transformers asks it for what the original has."""

        def build(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
            kind.__init__(model, *args, **kwargs)
            cut_parameters(model, self._sharding)

        attributes = {"__init__": build, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        return type(kind.__name__, (kind,), attributes)


def load_share(checkpoint: Checkpoint, group: Group) -> LoadedModel:
    """Read the weights of a rank, and put the group's collectives into the model.

    Raises:
        CheckpointError: weights are missing, have other shapes than the config says, or cannot be read.
        UnsupportedModelError: they are in other files than safetensors, or quantised weights cannot be cut so.
    """
    source, config = checkpoint.source, checkpoint.config
    assert source is not None
    start = time.perf_counter()
    files = checkpoint.fetch()
    check_files(files, "each rank reads its share of them")
    scales = checkpoint.kv_scales(files)
    skeleton = whole(checkpoint)
    sharding = shard(skeleton, checkpoint.hf_config, group.rank, group.size)
    parts = _Parts(checkpoint, skeleton, sharding)
    of_all = checkpoint.whole_config or checkpoint.hf_config
    failed = f"the weights of {source.name!r} cannot be read"
    notes: Counter[str] = Counter()
    with progress_bars(False), load_errors(source, failed), without_default_device():
        if checkpoint.layout is not None or config.quantization is not None or config.quantize_head is not None:
            arguments = source, files, of_all, checkpoint.dtype, checkpoint.device, config
            built = None if checkpoint.whole_config is None else type(skeleton)
            model, info, notes = load_quantised(*arguments, checkpoint.layout, built, parts)
        else:
            with TensorFiles(files) as tensors:
                lazy = {name: tensors.lazy(name) for name in tensors.entries if not (scales and is_scale(name))}
                model, info = assemble(
                    parts.model_class(type(skeleton)),
                    of_all,
                    parts.tensors(lazy),
                    {},
                    checkpoint.dtype,
                    checkpoint.device,
                )
    model.__class__ = type(skeleton)
    left_out = left_out_names(model)
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not name.startswith(left_out)]
    check_loading_info(source, info)
    join(model, sharding, group)
    model.config.name_or_path = model.name_or_path = source.name
    model = as_text_part(model)
    if checkpoint.device.type == "cuda":
        torch.cuda.synchronize(checkpoint.device)
    seconds = time.perf_counter() - start
    own = {name: KVScales(*(_of_heads(each, group) for each in pair)) for name, pair in scales.items()}
    return LoadedModel(model.eval().requires_grad_(False), seconds, owned=True, notes=notes, kv_scales=own)


def _of_heads(scales: Tensor, group: Group) -> Tensor:
    """Of scales [1] or [num_kv_heads] those of a rank's heads; see `plan`."""
    count = scales.numel()
    if count == 1:
        return scales
    first = group.rank * count // group.size
    return scales[first : first + max(1, count // group.size)]


def _places(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """The model's parameter that each tensor of the files becomes, or becomes a part of; itself where there is none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    known = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix
    return {name: rename_source_key(name, renamings, converters, prefix, known)[0] for name in names}
