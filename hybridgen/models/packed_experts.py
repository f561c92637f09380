"""Experts of a mixture whose weights are quantised: the module that stands where a model has experts of 16 bits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from hybridgen.kernels.linear.experts import experts, problem, reference
from hybridgen.kernels.linear.experts_form import Projection
from hybridgen.kernels.linear.layout import Block
from hybridgen.models.experts import probe, sizes_of
from hybridgen.models.quantised import keeping_buffers

_PLAIN = (bool, int, float, str)


class PackedWeights(NamedTuple):
    """Both projections of a layer's experts, in the layout of `kernels.linear.experts`; without biases."""

    gate_up: Projection
    down: Projection
    kind: str
    block: Block
    """0 inputs: a scale is a whole row's."""


class PackedExperts(nn.Module):
    """Experts whose weights are small codes with scales. Biases are parameters, as they were.

    Args:
        own: the module that it takes the place of, whose code was probed.

    Raises:
        ValueError: the module computes something else than the op.
    """

    down_data: Tensor

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        form, sizes = probe(own), sizes_of(own)
        if form is None or sizes is None:
            raise ValueError(f"{type(own).__name__} computes something else than the op for experts")
        for name, value in vars(own).items():
            if isinstance(value, _PLAIN) and name != "training":
                setattr(self, name, value)
        self.form = form._replace(transposed=False)
        self.hidden, self.experts_width = sizes.hidden, sizes.width
        self.kind = ""
        """Empty until there are weights."""
        self.block = Block(1, 0)
        self.dequantises = False
        """Whether a call multiplies with dequantised values, whatever kernels there are: the reference."""
        self._names = tuple(inspect.signature(type(own).forward).parameters)[1:4]
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            self.register_parameter(name, own._parameters.get(name))
        for part in ("gate_up", "down"):
            for tensor in ("data", "scales", "zeros"):  # not in the state dict: nothing looks for them in files by name
                self.register_buffer(f"{part}_{tensor}", None, persistent=False)

    def fill(self, weights: PackedWeights) -> None:
        """Take weights over.

        Raises:
            ValueError: they have other shapes.
        """
        found = problem(weights.gate_up, weights.down, self.hidden, weights.kind, weights.block)
        shapes = weights.gate_up.data.shape[1], weights.down.data.shape[1]
        if found is None and shapes != (2 * self.experts_width, self.hidden):
            found = f"they have {shapes} outputs, not {(2 * self.experts_width, self.hidden)}"
        if found is not None:
            raise ValueError(f"weights of experts do not fit: {found}")
        self.kind, self.block = weights.kind, weights.block
        for part, one in (("gate_up", weights.gate_up), ("down", weights.down)):
            for name in ("data", "scales", "zeros"):
                setattr(self, f"{part}_{name}", getattr(one, name))

    def _projection(self, part: str) -> Projection:
        data, scales, zeros = (getattr(self, f"{part}_{name}") for name in ("data", "scales", "zeros"))
        return Projection(data, scales, zeros, getattr(self, f"{part}_proj_bias"))

    @property
    def weights_stored(self) -> PackedWeights:
        """Its weights; the same storage."""
        return PackedWeights(self._projection("gate_up"), self._projection("down"), self.kind, self.block)

    @property
    def format(self) -> str:
        """Kind and block, in words."""
        return f"{self.kind} experts in blocks of {self.block.outputs}x{self.block.inputs or 'all inputs'}"

    @property
    def projections(self) -> int:
        """Two of each expert."""
        return 2 * int(self.down_data.shape[0])

    @property
    def values(self) -> int:
        """How many numbers the codes stand for."""
        return 3 * int(self.down_data.shape[0]) * self.hidden * self.experts_width

    @property
    def bytes_stored(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values() if buffer is not None)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """States [T, H], ids [T, k] and weights [T, k], by position or as the module before called them; [T, H]."""
        x, ids, weights = (*args, *(kwargs[name] for name in self._names[len(args) :]))
        gate_up, down = self._projection("gate_up"), self._projection("down")
        form, block = self.form, self.block
        if self.dequantises:
            return reference(
                x, ids, weights, *gate_up, *down, self.kind, *block,
                False, form.interleaved, form.activation, form.alpha, form.limit,
            )  # fmt: skip
        return experts(x, ids, weights, gate_up, down, form, self.kind, block)

    def extra_repr(self) -> str:
        """Sizes and format."""
        sizes = f"hidden={self.hidden}, width={self.experts_width}"
        if not self.kind:
            return f"{sizes}, {self.form}"
        return f"{sizes}, {self.format}, {8 * self.bytes_stored / self.values:.2f} bits a weight, {self.form}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedExperts:
        with keeping_buffers(self):
            super()._apply(fn, recurse)
        return self


def pad_rows(scales: Tensor) -> Tensor:
    """Scales uint8 [E, N, G] whose rows begin at multiples of four bytes, so that kernels read them by words."""
    count = scales.shape[2]
    if count % 4 == 0:
        return scales.contiguous()
    return nn.functional.pad(scales, (0, -count % 4))[..., :count]


def packed_experts(model: nn.Module) -> list[PackedExperts]:
    """The quantised experts of a model."""
    return [module for module in model.modules() if isinstance(module, PackedExperts)]
