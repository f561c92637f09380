"""The executor that serves every step: the model's own layers."""

from __future__ import annotations

from torch import Tensor

from hybridgen.compilation.layers import CompiledLayers
from hybridgen.graphs.key import LAYERS, GraphKey
from hybridgen.models import BoundModel, StepMetadata


class LayersExecutor:
    """Runs the model's own forward, whose decoder layers may be compiled."""

    name = LAYERS

    def __init__(self, bound: BoundModel, compiled: CompiledLayers | None = None) -> None:
        """`compiled` None runs every layer eagerly."""
        self._bound = bound
        self.compiled = compiled

    @property
    def launch(self) -> str:
        """`eager` or `compiled`."""
        return "compiled" if self.compiled is not None and self.compiled.routes_any else "eager"

    def refuses(self, key: GraphKey) -> str | None:
        """Nothing."""
        return None

    def logits(self, step: StepMetadata, keep: Tensor | None) -> Tensor:
        """Logits of the step's tokens, or of those in `keep`."""
        return self._bound.forward(step.ids, step, keep)

    def tensors(self) -> dict[str, Tensor]:
        """The attention schedules; what the layers keep between steps is the step's."""
        return self._bound.tensors()
