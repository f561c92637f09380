"""The list of decoder layers in a model, found by where its attention modules and mixers are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from hybridgen.errors import UnsupportedModelError


def decoder_layers(
    model: PreTrainedModel, attentions: Sequence[nn.Module], mixers: Sequence[nn.Module] = ()
) -> tuple[nn.Module, ...]:
    """The model's layer list: each attention module and each mixer is in an element of its own kind's own.

    An element without attention is for models with mixers alone. Without a list of elements with one attention each, it
    is one of elements with equally many (LongCat-Flash has two a layer).

    Raises:
        UnsupportedModelError: there is none.
    """
    alike: tuple[nn.Module, ...] = ()
    for candidate in model.modules():
        if not isinstance(candidate, nn.ModuleList) or not len(candidate):
            continue
        members = [set(layer.modules()) for layer in candidate]
        counts = [[sum(module in inside for module in kind) for inside in members] for kind in (attentions, mixers)]
        together = all(sum(count) == len(kind) for count, kind in zip(counts, (attentions, mixers), strict=True))
        if together and max(map(max, counts)) == 1 and (mixers or min(counts[0]) == 1):
            return tuple(candidate)
        equal = attentions and not mixers and len(set(counts[0])) == 1 and len(candidate) > 1
        if together and equal and not alike:
            alike = tuple(candidate)
    if alike:
        return alike
    beside = f" and has {len(mixers)} modules that keep a state" if mixers else ""
    raise UnsupportedModelError(
        f"{type(model).__name__} made {len(attentions)} attention calls{beside} that do not pair up with a list of "
        "decoder layers; hybridgen runs models with one attention per layer, or as many in each"
    )


def layer_around(module: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    """The one of the layers that a module is in."""
    return next(layer for layer in layers if module in set(layer.modules()))
