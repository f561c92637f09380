"""What becomes of a model's modules where a rank has a part of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridgen.models.projections import product
from hybridgen.models.quantised import QuantisedLinear, quantised_product
from hybridgen.models.share import QuantisedShareLinear, ShareLinear
from hybridgen.parallel.group import Group, all_gather, all_reduce
from hybridgen.parallel.plan import Sharding


class RowShard(ShareLinear):
    """A projection that has some of the inputs: outputs are added up over the ranks, then gets its bias."""

    group: int

    def forward(self, input: Tensor) -> Tensor:
        total = all_reduce(product(input, self.weight, None), self.group)
        return total if self.bias is None else total + self.bias


class QuantisedRowShard(QuantisedShareLinear):
    """The same with a quantised weight."""

    group: int

    def forward(self, x: Tensor) -> Tensor:
        total = all_reduce(quantised_product(self, x, None), self.group)
        return total if self.bias is None else total + self.bias


class HeadShard(ShareLinear):
    """The output projection with some of its rows: every rank gets the logits of all."""

    group: int
    padded: int
    """Rows that the largest share has."""
    vocab_size: int

    def forward(self, input: Tensor) -> Tensor:
        return _gathered(self, product(input, self.weight, self.bias))


class QuantisedHeadShard(QuantisedShareLinear):
    """The same with a quantised weight."""

    group: int
    padded: int
    vocab_size: int

    def forward(self, x: Tensor) -> Tensor:
        return _gathered(self, quantised_product(self, x, self.bias))


def _gathered(head: HeadShard | QuantisedHeadShard, logits: Tensor) -> Tensor:
    if logits.shape[-1] < head.padded:
        logits = nn.functional.pad(logits, (0, head.padded - logits.shape[-1]))
    return all_gather(logits, head.group, head.vocab_size)


def _summed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module whose output is added up over the ranks."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return all_reduce(kind.forward(self, *args, **kwargs), self.group)

    return type(f"Summed{kind.__name__}", (kind,), {"forward": forward, "__module__": kind.__module__})


def cut_parameters(model: PreTrainedModel, sharding: Sharding) -> None:
    """Give a model without weights the parameters of one rank, by their shapes. A tied head stays whole."""
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    for name, cut in sharding.cuts.items():
        owner, _, own = name.rpartition(".")
        if tied and owner == sharding.head and own == "weight":
            continue
        module: Any = model.get_submodule(owner)
        parameter = getattr(module, own)
        shape = list(parameter.shape)
        shape[cut.dim] = cut.size
        setattr(module, own, nn.Parameter(parameter.new_empty(shape), requires_grad=False))
        if type(module) is nn.Linear:
            module.out_features, module.in_features = module.weight.shape


_SHARDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RowShard, QuantisedLinear: QuantisedRowShard}


def join(model: PreTrainedModel, sharding: Sharding, group: Group) -> None:
    """Put the collectives into a model that has its rank's parameters."""
    for name in sharding.summed:
        module: Any = model.get_submodule(name)
        module.__class__ = _SHARDS.get(type(module)) or _summed(type(module))
        module.group = group.number
    head: Any = model.get_submodule(sharding.head)
    cut = sharding.cuts[f"{sharding.head}.weight"]
    if type(head) is QuantisedLinear:  # one that was tied has a weight of its own
        head.__class__ = QuantisedHeadShard
    else:
        if head.weight.shape[0] == sharding.vocab_size:  # tied to the embedding, which is whole: rows of it
            with torch.no_grad():
                head.weight = nn.Parameter(head.weight.detach()[cut.start : cut.stop], requires_grad=False)
        head.__class__ = HeadShard
        head.out_features = head.weight.shape[0]
    head.group, head.vocab_size = group.number, sharding.vocab_size
    head.padded = -(-sharding.vocab_size // sharding.size)
