"""How experts of a mixture compute and are chosen, and their tensors: see `hybridgen.kernels.linear.experts`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Size, Tensor

DENSE = "dense"
FEW_ROWS = 64
"""Tokens up to which a result does not depend on the number of tokens."""
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "clamped")
"""What is done to the gate before it is multiplied with the other half; see `experts.activate`."""


class Form(NamedTuple):
    """How experts compute, besides their numbers."""

    activation: str
    """One of `ACTIVATIONS`."""
    interleaved: bool = False
    """Gate and up take turns; else all gates come first."""
    transposed: bool = False
    """Dense weights lie as [E, inputs, outputs]."""
    alpha: float = 1.0
    limit: float = 0.0
    """Of the activation `clamped`."""


class RouteForm(NamedTuple):
    """How scores are made of logits."""

    chosen_only: bool
    """Softmax of the chosen logits, in their dtype; else of all, in float32."""
    normalised: bool = False
    """Of all: scores are divided by their sum."""
    wide: bool = False
    """Scores are float32, whatever x is."""


class Normed(NamedTuple):
    """How states are normalised: x / sqrt(mean(x^2) + eps) * (weight + shift)."""

    weight: Tensor
    eps: float
    shift: float


class Routed(NamedTuple):
    """How experts are chosen."""

    weight: Tensor
    bias: Tensor | None
    chosen: int
    """Experts of a token."""
    form: RouteForm


class Projection(NamedTuple):
    """One projection of all experts."""

    data: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    bias: Tensor | None = None


def sizes_of(gate_up: Projection, down: Projection) -> tuple[Size, Size]:
    """What tells layers of experts apart for whom one kernel or another is faster."""
    return gate_up.data.shape, down.data.shape
