"""Quantised weights, and the module that stands where a model has an `nn.Linear` with one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridgen.errors import EngineError
from hybridgen.kernels.linear import layout, rounded_rows
from hybridgen.kernels.linear.layout import Block
from hybridgen.kernels.linear.quantised import quantised_linear, reference


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the values of a weight are stored."""

    kind: str
    """`dense`: one number a value; `int4`, `int8`, `fp8` or `mxfp4`: see `kernels.linear.layout`."""
    dtype: torch.dtype
    """Of the values as they are multiplied with; a dense weight stores them in it."""
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale, for example (1, 128); None where values have no scale."""

    def __str__(self) -> str:
        block = f" in blocks of {self.block[0]}x{self.block[1]}" if self.block else ""
        return f"{self.kind} {str(self.dtype).removeprefix('torch.')}{block}"


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """A weight of small codes with a scale for each block of them. Satisfies `models.weights.Weight`."""

    kind: str
    """One of `layout.KINDS`."""
    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    inputs: int
    block: Block
    dtype: torch.dtype
    """What the values are multiplied in."""

    @property
    def format(self) -> WeightFormat:
        """The kind, with the block that shares a scale."""
        return WeightFormat(self.kind, self.dtype, (self.block.outputs, self.block.inputs))

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.data.shape[0], self.inputs

    @property
    def bytes_read(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values [outputs, inputs], rounded once to a dtype, the weight's own by default."""
        return layout.dequantise(
            self.kind, self.data, self.scales, self.zeros, self.inputs, self.block, dtype or self.dtype
        )

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Weight.matmul`: with the dequantised values, in plain torch."""
        return F.linear(x, self.dequantise(x.dtype), None if bias is None else bias.to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """`data`, `scales` and, where there are any, `zeros`."""
        found = {"data": self.data, "scales": self.scales}
        return found if self.zeros is None else {**found, "zeros": self.zeros}

    def rows(self, start: int, stop: int) -> QuantisedWeight:
        """Some outputs, as views. They begin and end where blocks do, or the blocks have all outputs."""
        size = self.block.outputs
        if self.scales.shape[0] == 1:
            first, last = 0, 1
        elif start % size or (stop % size and stop != self.data.shape[0]):
            raise ValueError(f"outputs {start} to {stop} do not begin and end with blocks of {size}")
        else:
            first, last = start // size, -(-stop // size)
        zeros = None if self.zeros is None else self.zeros[first:last]
        return self._with(self.data[start:stop], self.scales[first:last], zeros, self.inputs)

    def columns(self, start: int, stop: int) -> QuantisedWeight:
        """Some inputs, as views. They begin and end where blocks and items of the data do."""
        size = self.block.inputs
        items = layout.codes_per_item(self.kind)
        one = self.scales.shape[1] == 1
        if start % items or stop % items or not (one or start % size == stop % size == 0):
            raise ValueError(f"inputs {start} to {stop} do not begin and end with blocks of {size}")
        part = slice(0, 1) if one else slice(start // size, stop // size)
        zeros = None if self.zeros is None else self.zeros[:, part]
        return self._with(self.data[:, start // items : stop // items], self.scales[:, part], zeros, stop - start)

    def copy(self) -> QuantisedWeight:
        """The same in storage of its own."""
        zeros = None if self.zeros is None else self.zeros.clone(memory_format=torch.contiguous_format)
        data, scales = (each.clone(memory_format=torch.contiguous_format) for each in (self.data, self.scales))
        return self._with(data, scales, zeros, self.inputs)

    def _with(self, data: Tensor, scales: Tensor, zeros: Tensor | None, inputs: int) -> QuantisedWeight:
        return QuantisedWeight(self.kind, data, scales, zeros, inputs, self.block, self.dtype)

    def with_row_scales(self) -> QuantisedWeight:
        """The same values with a scale for each output: what weights with larger blocks become to be stacked."""
        size, outputs = self.block.outputs, self.data.shape[0]
        scales, zeros = (
            None if each is None else each.repeat_interleave(size, 0)[:outputs].contiguous()
            for each in (self.scales, self.zeros)
        )
        assert scales is not None
        block = Block(1, self.block.inputs)
        return QuantisedWeight(self.kind, self.data, scales, zeros, self.inputs, block, self.dtype)


def why_not_stacked(weights: Sequence[QuantisedWeight]) -> str | None:
    """Why weights cannot be stacked along the outputs, or None."""
    if len({each.inputs for each in weights}) > 1:
        return "input sizes differ"
    first = weights[0]
    for each in weights:
        if each.kind != first.kind or each.block.inputs != first.block.inputs or each.dtype != first.dtype:
            return f"formats differ ({first.format} and {each.format})"
        if (each.zeros is None) != (first.zeros is None) or each.scales.dtype != first.scales.dtype:
            return "only some have zero points, or scales differ in their dtype"
    return None


def stack(weights: Sequence[QuantisedWeight]) -> QuantisedWeight:
    """Weights of the same format, stacked along the outputs (a copy). `why_not_stacked` must be None."""
    size = weights[0].block.outputs
    if any(each.block.outputs != size or each.data.shape[0] % size for each in weights) or any(
        each.scales.shape[0] == 1 and size > 1 for each in weights
    ):
        weights = [each.with_row_scales() for each in weights]
    first = weights[0]
    zeros = None if first.zeros is None else torch.cat([each.zeros for each in weights if each.zeros is not None])
    return QuantisedWeight(
        first.kind,
        torch.cat([each.data for each in weights]),
        torch.cat([each.scales for each in weights]),
        zeros,
        first.inputs,
        first.block,
        first.dtype,
    )


class QuantisedLinear(nn.Module):
    """What a model has in place of an `nn.Linear` whose weight is quantised.

    Args:
        inputs, outputs: as of the linear layer.
        bias: whether it has one; it is a parameter, as a linear layer's.
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.kind = ""
        """Empty until there is a weight."""
        self.block = Block(1, inputs)
        self.dtype = torch.float32
        self.error: float | None = None
        """How far the weight is from the one that it was made of, relative to that; None where that is not known."""
        self.dequantises = False
        """Whether a call multiplies with dequantised values, whatever kernels there are: the reference."""
        self.rounds_rows = False
        """Whether many rows are rounded to FP8 before they are multiplied (`EngineConfig.fp8_activations`)."""
        for name in ("data", "scales", "zeros"):  # not in the state dict: nothing looks for them in files by name
            self.register_buffer(name, None, persistent=False)

    def fill(self, weight: QuantisedWeight) -> None:
        """Take a weight over."""
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"a weight of {weight.shape} in place of {(self.out_features, self.in_features)}")
        self.kind, self.block, self.dtype = weight.kind, weight.block, weight.dtype
        self.data, self.scales, self.zeros = weight.data, weight.scales, weight.zeros

    @property
    def weight_stored(self) -> QuantisedWeight:
        """Its weight; the same storage."""
        return QuantisedWeight(self.kind, self.data, self.scales, self.zeros, self.in_features, self.block, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return quantised_product(self, x, self.bias)

    def extra_repr(self) -> str:
        """Sizes and format."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if not self.kind:
            return sizes
        bits = 8 * self.weight_stored.bytes_read / (self.out_features * self.in_features)
        return f"{sizes}, {self.weight_stored.format}, {bits:.2f} bits a weight"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantisedLinear:
        with keeping_buffers(self):
            super()._apply(fn, recurse)
        return self


@contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """While a module is cast or moved: a cast is for what is multiplied in that dtype; codes and scales stay as they
    are, and move with the rest."""
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    yield
    for name, buffer in buffers.items():
        moved = module._buffers[name]
        assert moved is not None
        module._buffers[name] = buffer if moved.device == buffer.device else buffer.to(moved.device)


class QuantisedHead(QuantisedLinear):
    """The first of several projections that share their input: multiplies by all their weights stacked.

    Its buffers are the stacked weight's, so that kernels and recorded steps find them as any module's. Made of a
    `QuantisedLinear` by `models.projections`, which says what the other attributes are.
    """

    fused_bias: Tensor | None
    fused_sizes: tuple[int, ...]
    fused_slots: tuple[Any, ...]
    fused_members: tuple[QuantisedLinear, ...]

    @property
    def weight_stored(self) -> QuantisedWeight:
        """Its own part of the stacked weight."""
        return self.stacked.rows(0, self.out_features)

    @property
    def stacked(self) -> QuantisedWeight:
        """The weight of all members."""
        return super().weight_stored

    def forward(self, x: Tensor) -> Tensor:
        """Its own outputs; the others' go into their slots."""
        first, *others = quantised_product(self, x, self.fused_bias).split(self.fused_sizes, dim=-1)
        for slot, part in zip(self.fused_slots, others, strict=True):
            slot.item = (x, part)
        return first


class QuantisedTail(QuantisedLinear):
    """A member that is called later: returns the part that the head left for the same input tensor."""

    fused_slot: Any

    def forward(self, x: Tensor) -> Tensor:
        """Its outputs."""
        item = self.fused_slot.item
        self.fused_slot.item = None
        if item is None or item[0] is not x:
            raise EngineError(
                "a fused projection was called without its head, or with another input than the head got; "
                "load the model with fuse_projections=False"
            )
        return item[1]


def quantised_product(module: QuantisedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
    """[..., inputs] to [..., outputs] by a module's weight: by kernels, or dequantised where it says so."""
    kind, data, scales, zeros = module.kind, module.data, module.scales, module.zeros
    inputs, block, rounds = module.in_features, module.block, module.rounds_rows
    if module.dequantises:
        return reference(x, data, scales, zeros, bias, kind, inputs, *block, rounds)
    return quantised_linear(x, kind, data, scales, zeros, bias, inputs, block, rounds_rows=rounds)


def round_activations(model: nn.Module) -> tuple[int, Counter[str]]:
    """From now on a model's FP8 projections round many rows to FP8, those that can.

    Returns:
        How many do, and why others do not, counted.
    """
    count, others = 0, Counter[str]()
    for _, module in quantised_modules(model):
        if isinstance(module, QuantisedTail):
            continue
        reason = rounded_rows.takes(module.data, module.scales)
        module.rounds_rows = reason is None
        count += reason is None
        if reason is not None:
            others[f"fp8_activations: some projections take 16-bit activations, because {reason}"] += 1
    return count, others


def product(x: Tensor, weight: Any) -> Tensor:
    """`x @ weight.T` by the kernels of a weight's format.

    Args:
        x: [..., inputs] in the dtype that the weight is multiplied in.
        weight: a `models.weights.Weight`.
    """
    if isinstance(weight, QuantisedWeight):
        return quantised_linear(
            x, weight.kind, weight.data, weight.scales, weight.zeros, None, weight.inputs, weight.block
        )
    found: Tensor = weight.matmul(x)
    return found


def quantised_modules(model: nn.Module) -> list[tuple[str, QuantisedLinear]]:
    """The quantised projections of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantisedLinear)]
