"""What recorders, the store and the router need of steps; `execution.step` has them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hybridgen.graphs.key import GraphKey
from hybridgen.sampling import SamplerPlan


class RunSteps(Protocol):
    """Steps that were staged."""

    def run(self, key: GraphKey) -> None:
        """Launch a step, without a recording."""
        ...

    def finish(self, key: GraphKey, sampler: SamplerPlan) -> None:
        """Launch what is left of a step that ended at its logits."""
        ...


class CapturedSteps(Protocol):
    """Steps that can be recorded."""

    def prepare(self, key: GraphKey) -> None:
        """Stage padding for a step, and allocate what it reads."""
        ...

    def run(self, key: GraphKey) -> None:
        """Launch it."""
        ...


class TreeSteps(Protocol):
    """Steps that are compiled whole."""

    def run(self, key: GraphKey) -> None:
        """Launch a step."""
        ...

    def sized(self, key: GraphKey) -> tuple[Tensor, Tensor]:
        """Inputs of a step, as long as its tokens and its rows."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What outlives a step, the model's parameters and buffers apart, by name."""
        ...
