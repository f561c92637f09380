"""Builds a model whose projections get their weights apart: quantised ones, as they are stored or made while loading.

transformers builds the model and reads everything else, with its own renaming, joining and tying. It is handed the
class with `QuantisedLinear` modules in place of the projections, and a dictionary of tensors that are read when it asks
for them, one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hybridgen.models.packed_experts import PackedExperts, PackedWeights
from hybridgen.models.quantised import QuantisedLinear, QuantisedWeight

Reader = Callable[[torch.device, torch.dtype], QuantisedWeight]
"""Gives a projection's weight on a device, to be multiplied in a dtype."""
ExpertsReader = Callable[[torch.device], PackedWeights]
"""Gives the weights of a layer's experts on a device."""


def assemble(
    model_class: type[PreTrainedModel],
    hf_config: PreTrainedConfig,
    tensors: Mapping[str, Any],
    apart: Mapping[str, Reader],
    dtype: torch.dtype,
    device: torch.device,
    unties_head: bool = False,
    experts: Mapping[str, ExpertsReader] | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model on its device, and transformers' account of what it loaded.

    Args:
        tensors: all others of the checkpoint, by its names: tensors, or what gives them when indexed with `...`.
        apart: readers by the names that the model has for its projections, all of them `nn.Linear`.
        experts: readers by the model's names of modules of experts that compute what our op does.
        unties_head: the head has a weight of its own though the config says that it shares the embedding's.

    Raises:
        Exception: whatever transformers and the readers raise.
    """
    own = copy.deepcopy(hf_config)
    tied = getattr(own, "tie_word_embeddings", False)
    if unties_head and tied:
        own.tie_word_embeddings = False
    experts = experts or {}
    loader: Any = _with_places(model_class, apart, experts).from_pretrained
    model, info = loader(
        None,
        config=own,
        state_dict=dict(tensors),
        dtype=dtype,
        device_map=None if device.type == "cpu" else {"": device},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model.__class__ = model_class
    for name, read in apart.items():
        place = model.get_submodule(name)
        assert isinstance(place, QuantisedLinear)
        del vars(place)["weight"]
        place.fill(read(device, dtype))
    for name, read_experts in experts.items():
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedExperts)
        packed.fill(read_experts(device))
    return model, info


def _with_places(
    model_class: type[PreTrainedModel], names: Iterable[str], experts: Iterable[str]
) -> type[PreTrainedModel]:
    """The class, whose models have empty `QuantisedLinear` and `PackedExperts` modules from the beginning.

    transformers asks classes for their names and modules, which are the original's.
    """

    # Models give weights their first values, by their names. This one has them: transformers leaves it alone.
    initialised = torch.empty(0)
    initialised._is_hf_initialized = True  # type: ignore[attr-defined]

    def build(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        for name in names:
            linear = self.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            place = QuantisedLinear(linear.in_features, linear.out_features, linear.bias is not None)
            place.bias = linear.bias
            vars(place)["weight"] = initialised
            self.set_submodule(name, place)
        for name in experts:
            self.set_submodule(name, PackedExperts(self.get_submodule(name)))

    attributes = {"__init__": build, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), attributes)
