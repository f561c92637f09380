"""Reads a rank's share of a checkpoint: of each tensor in the files only the slice that the rank has."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hybridgen.cache import KVScales
from hybridgen.errors import CheckpointError
from hybridgen.loading import Checkpoint, LoadedModel
from hybridgen.loading.device import without_default_device
from hybridgen.loading.kv_scales import is_scale, read_kv_scales
from hybridgen.loading.source import load_errors
from hybridgen.loading.stored import TensorFiles, check_files
from hybridgen.loading.weights import check_loading_info, progress_bars
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
    """A checkpoint's model without weights, on the meta device."""
    with without_default_device(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.hf_config))


def load_share(checkpoint: Checkpoint, group: Group) -> LoadedModel:
    """Read the weights of a rank, and put the group's collectives into the model.

    Raises:
        CheckpointError: weights are missing, have other shapes than the config says, or cannot be read.
        UnsupportedModelError: they are in other files than safetensors.
    """
    source = checkpoint.source
    assert source is not None
    start = time.perf_counter()
    files = checkpoint.fetch()
    check_files(files, "each rank reads its share of them")
    scales = {} if checkpoint.config.kv_dtype is None else read_kv_scales(files, checkpoint.attention)
    skeleton = whole(checkpoint)
    sharding = shard(skeleton, checkpoint.hf_config, group.rank, group.size)
    failed = f"the weights of {source.name!r} cannot be read"
    with (
        progress_bars(False),
        load_errors(source, failed),
        without_default_device(),
        TensorFiles(files) as tensors,
    ):
        places = _places(skeleton, list(tensors.entries))
        tied = bool(getattr(checkpoint.hf_config, "tie_word_embeddings", False))
        state: dict[str, Any] = {}
        for name, place in places.items():
            if scales and is_scale(name):
                continue
            cut = sharding.cuts.get(place)
            if cut is None or (tied and place == f"{sharding.head}.weight"):
                state[name] = tensors.lazy(name)
            else:
                state[name] = Slice(tensors.lazy(name), cut, name)
        model, info = _load(type(skeleton), checkpoint, sharding, state)
    check_loading_info(source, info)
    join(model, sharding, group)
    model.config.name_or_path = model.name_or_path = source.name
    if checkpoint.device.type == "cuda":
        torch.cuda.synchronize(checkpoint.device)
    own = {name: KVScales(*(_of_heads(each, group) for each in pair)) for name, pair in scales.items()}
    return LoadedModel(model.eval().requires_grad_(False), time.perf_counter() - start, owned=True, kv_scales=own)


def _of_heads(scales: Tensor, group: Group) -> Tensor:
    """Of scales [1] or [num_kv_heads] those of a rank's heads; see `plan`."""
    count = scales.numel()
    if count == 1:
        return scales
    first = group.rank * count // group.size
    return scales[first : first + max(1, count // group.size)]


def _load(
    kind: type[PreTrainedModel], checkpoint: Checkpoint, sharding: Sharding, state: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with a rank's parameters, and transformers' account of what it loaded."""

    def build(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        cut_parameters(self, sharding)

    attributes = {"__init__": build, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    loader: Any = type(kind.__name__, (kind,), attributes)
    device = checkpoint.device
    model, info = loader.from_pretrained(
        None,
        config=copy.deepcopy(checkpoint.hf_config),
        state_dict=dict(state),
        dtype=checkpoint.dtype,
        device_map=None if device.type == "cpu" else {"": device},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model.__class__ = kind
    return model, info


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
