"""The weights of projections, whatever their format, and where they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridgen.models.projections import FusedHead, FusedTail, RowsLinear
from hybridgen.models.quantised import (
    QuantisedHead,
    QuantisedLinear,
    QuantisedTail,
    QuantisedWeight,
    WeightFormat,
    quantised_modules,
    stack,
    why_not_stacked,
)
from hybridgen.models.share import QuantisedShareLinear, ShareLinear

_PART = 2**26
"""Elements of a weight that are converted to another dtype at once: a converted copy of all of it may not fit."""


class WeightError(LookupError):
    """A provider does not have a weight as it was asked for; the message is the reason."""


class NotJoinedError(WeightError):
    """Several projections were asked for as one, and each lies by itself."""


class Weight(Protocol):
    """The weight of one projection, or of several that share their input and are stacked along the outputs."""

    @property
    def format(self) -> WeightFormat:
        """How its values are stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""

    @property
    def bytes_read(self) -> int:
        """Bytes that a product reads, scales included."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`, computed in x's dtype.

        Args:
            x: [..., inputs], any number of rows, float32 or the format's dtype.
            bias: [outputs].

        Returns:
            [..., outputs] in x's dtype.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name: what kernels read and what recorded steps refer to."""


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight:
    """A weight whose values are stored as they are multiplied with."""

    values: Tensor
    """[outputs, inputs]."""

    @property
    def format(self) -> WeightFormat:
        """`dense`, in the dtype of the values."""
        return WeightFormat("dense", self.values.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, inputs = self.values.shape
        return outputs, inputs

    @property
    def bytes_read(self) -> int:
        """Bytes of the values."""
        return self.values.numel() * self.values.element_size()

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Weight.matmul`."""
        if x.dtype == self.values.dtype:
            return F.linear(x, self.values, bias)
        rows = max(1, _PART // self.values.shape[1])
        out = torch.cat([F.linear(x, part.to(x.dtype)) for part in self.values.split(rows)], -1)
        return out if bias is None else out + bias.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """`values`."""
        return {"values": self.values}


@dataclass(frozen=True, slots=True, eq=False)
class SeparateWeights:
    """Dense weights of projections that read the same input, stacked along the outputs, each where it is."""

    parts: tuple[DenseWeight, ...]
    """Of one dtype and as many inputs."""

    @property
    def format(self) -> WeightFormat:
        """`dense`, in the dtype of the values."""
        return self.parts[0].format

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs of all, and inputs."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def bytes_read(self) -> int:
        """Bytes of the values."""
        return sum(part.bytes_read for part in self.parts)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Weight.matmul`."""
        out = torch.cat([part.matmul(x) for part in self.parts], -1)
        return out if bias is None else out + bias.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """`values 0` and so on."""
        return {f"values {index}": part.values for index, part in enumerate(self.parts)}


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a weight a rank of a group has; the whole by default."""

    rank: int = 0
    ranks: int = 1
    axis: int = 0
    """What is cut into `ranks` equal parts: 0 the outputs, 1 the inputs."""


WHOLE = Shard()


class WeightProvider(Protocol):
    """Where weights come from: a module, or a checkpoint's tensors."""

    @property
    def identity(self) -> str:
        """The formats that it gives, for the compile cache's key. Never values: a fine-tune has the same."""

    def get(self, names: Sequence[str], shard: Shard = WHOLE) -> Weight:
        """The weight of projections, stacked along the outputs in this order.

        Args:
            names: of projections that read the same input, as `named_modules()` has them.
            shard: the part wanted; of several projections, that part of each.

        Raises:
            NotJoinedError: they do not lie in one piece, and it does not copy.
            WeightError: it has no such weight, or not without a copy.
        """

    def bias(self, names: Sequence[str], shard: Shard = WHOLE) -> Tensor | None:
        """The biases of the same projections, stacked alike; None where none has one. Raises WeightError, too."""


class ModuleWeights:
    """The weights that a module holds, loaded or the user's own: always the module's own storage.

    Several projections are one weight where `models.projections` has joined them.

    Args:
        module: what `names` are names in.
        may_copy: whether what does not lie in one piece (projections that are not joined, some shards) is copied. Else
            projections that are not joined are refused, and a shard may be a view that is not contiguous.
    """

    def __init__(self, module: nn.Module, *, may_copy: bool = False) -> None:
        self._module = module
        self._may_copy = may_copy

    @property
    def identity(self) -> str:
        """`dense`, or the formats of quantised projections with their numbers. The dtype is in the key by itself."""
        return identity_of(module.weight_stored.format for _, module in quantised_modules(self._module))

    def get(self, names: Sequence[str], shard: Shard = WHOLE) -> Weight:
        """See `WeightProvider.get`."""
        linears = self._linears(names)
        joined = self._joined(names, linears) if shard.ranks == 1 else None
        if isinstance(joined, QuantisedHead):
            return joined.stacked
        if isinstance(joined, FusedHead):
            return DenseWeight(joined.fused_weight.detach())
        if all(isinstance(each, QuantisedLinear) for each in linears):
            return self._quantised(names, [each for each in linears if isinstance(each, QuantisedLinear)], shard)
        if any(isinstance(each, QuantisedLinear) for each in linears):
            raise WeightError(f"of {_listed(names)} only some are quantised")
        dense = [each.weight.detach() for each in linears if isinstance(each, nn.Linear)]
        return DenseWeight(self._stacked(names, [_part(weight, shard) for weight in dense]))

    def bias(self, names: Sequence[str], shard: Shard = WHOLE) -> Tensor | None:
        """See `WeightProvider.bias`. Where inputs are cut, each rank has the whole bias; one of them adds it."""
        linears = self._linears(names)
        if all(each.bias is None for each in linears):
            return None
        joined = self._joined(names, linears) if shard.ranks == 1 else None
        if joined is not None and joined.fused_bias is not None:
            return joined.fused_bias.detach()
        given = next(each.bias for each in linears if each.bias is not None)
        parts = []
        for each in linears:
            bias = given.new_zeros(each.out_features) if each.bias is None else each.bias
            parts.append(bias.detach() if shard.axis else _part(bias.detach(), shard))
        return self._stacked(names, parts)

    def _linears(self, names: Sequence[str]) -> list[nn.Linear | QuantisedLinear]:
        found: list[nn.Linear | QuantisedLinear] = []
        for name in names:
            try:
                module = self._module.get_submodule(name)
            except AttributeError as error:
                raise WeightError(f"there is no {name}") from error
            whole = type(module) in (QuantisedLinear, QuantisedHead, QuantisedTail)
            if isinstance(module, QuantisedLinear) and (whole or isinstance(module, QuantisedShareLinear)):
                found.append(module)
                continue
            plain = type(module) in (nn.Linear, FusedHead, FusedTail, RowsLinear) or isinstance(module, ShareLinear)
            if not isinstance(module, nn.Linear) or not plain:
                raise WeightError(f"{name} is a {type(module).__name__}, not a plain nn.Linear")
            # A class of its own, or none at all: quantised libraries keep the module and change what it holds.
            weight = vars(module)["_parameters"].get("weight")
            if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() < 2:
                kind = "no weight" if weight is None else f"a weight of class {type(weight).__name__}, {weight.dtype}"
                raise WeightError(f"{name} has {kind}, not a plain one of floating-point numbers")
            found.append(module)
        return found

    def _joined(
        self, names: Sequence[str], linears: Sequence[nn.Linear | QuantisedLinear]
    ) -> FusedHead | QuantisedHead | None:
        """The head of the projections, if they are joined in this order. None for a single one."""
        first = linears[0]
        if len(linears) == 1:
            return None
        if isinstance(first, (FusedHead, QuantisedHead)) and list(first.fused_members) == list(linears):
            return first
        if not self._may_copy:
            kinds = (FusedHead, FusedTail, QuantisedHead, QuantisedTail)
            joined = any(isinstance(each, kinds) for each in linears)
            why = "joined in another order or with others" if joined else "not joined"
            raise NotJoinedError(f"{_listed(names)} are {why} (fuse_projections=False, or they could not be)")
        return None

    def _quantised(self, names: Sequence[str], linears: Sequence[QuantisedLinear], shard: Shard) -> QuantisedWeight:
        parts = [_quantised_part(each.weight_stored, shard) for each in linears]
        if len(parts) == 1:
            return parts[0]
        if not self._may_copy:
            raise WeightError(f"a part of {_listed(names)} together does not lie in one piece")
        reason = why_not_stacked(parts)
        if reason is not None:
            raise WeightError(f"{_listed(names)} cannot be stacked: {reason}")
        return stack(parts)

    def _stacked(self, names: Sequence[str], parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0].contiguous() if self._may_copy else parts[0]
        if not self._may_copy:
            raise WeightError(f"a part of {_listed(names)} together does not lie in one piece")
        return torch.cat(parts)


def identity_of(formats: Iterable[WeightFormat]) -> str:
    """What a provider says of its formats: those of quantised projections, in their order; `dense` where none are."""
    counted = Counter(f"{each.kind} {each.block}" for each in formats)
    return "; ".join(f"{name} x{count}" for name, count in sorted(counted.items())) or "dense"


def _quantised_part(weight: QuantisedWeight, shard: Shard) -> QuantisedWeight:
    """A rank's part of a quantised weight, as a view; blocks are not cut."""
    if shard.ranks == 1:
        return weight
    size = weight.shape[shard.axis]
    each = size // shard.ranks
    if size % shard.ranks:
        what = "inputs" if shard.axis else "outputs"
        raise WeightError(f"{size} {what} cannot be cut into {shard.ranks} equal parts")
    cut = weight.columns if shard.axis else weight.rows
    try:
        return cut(shard.rank * each, (shard.rank + 1) * each)
    except ValueError as error:
        raise WeightError(f"a {weight.format} weight cannot be cut into {shard.ranks} parts: {error}") from error


def _part(tensor: Tensor, shard: Shard) -> Tensor:
    """A rank's part of a weight [outputs, inputs] or a bias [outputs], as a view."""
    size = tensor.shape[shard.axis]
    if size % shard.ranks:
        what = "inputs" if shard.axis else "outputs"
        raise WeightError(f"{size} {what} cannot be cut into {shard.ranks} equal parts")
    each = size // shard.ranks
    return tensor.narrow(shard.axis, shard.rank * each, each)


def _listed(names: Sequence[str]) -> str:
    return "/".join(name.rpartition(".")[2] for name in names)
