"""The executor that serves every step: the model's own layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hybridgen.compilation.layers import CompiledLayers
from hybridgen.device.watched import has_forward_hooks
from hybridgen.execution.products import by_cublaslt
from hybridgen.graphs.key import LAYERS, GraphKey
from hybridgen.models import BoundModel, StepMetadata
from hybridgen.models.attention import RunEnds


class Cuts(NamedTuple):
    """Which prefills' last layer goes on with the prompts' last tokens alone. In shorter ones, what is saved is no more
    than the launches that come with it."""

    tokens: int = 1024
    """Tokens of the call at least."""
    an_end: int = 8
    """Tokens for each of these at least."""


class LayersExecutor:
    """Runs the model's own forward, whose decoder layers may be compiled.

    What a prefill is for are keys and values, and the logits of the prompts' last tokens. So a long one runs the last
    layer twice: for all tokens up to its keys and values, and for the last ones as if they were decoded.
    """

    name = LAYERS

    def __init__(self, bound: BoundModel, compiled: CompiledLayers | None = None) -> None:
        """`compiled` None runs every layer eagerly."""
        self._bound = bound
        self.compiled = compiled
        self.cuts: Cuts | None = None
        """When the last layer is cut; None: never. See `warm_up.cut_last_layer`."""
        self.by_cublaslt: frozenset[int] = frozenset()
        """Tokens of steps that multiply by cublasLt; see `products`. Empty where steps are traced as a whole: to look a
        size up would make it a constant there."""

    @property
    def launch(self) -> str:
        """`eager` or `compiled`."""
        return "compiled" if self.compiled is not None and self.compiled.routes_any else "eager"

    def refuses(self, key: GraphKey) -> str | None:
        """Nothing."""
        return None

    def logits(self, step: StepMetadata, keep: Tensor | None) -> Tensor:
        """Logits of the step's tokens, or of those in `keep`."""
        if self.by_cublaslt and step.slots.shape[0] in self.by_cublaslt:
            with by_cublaslt():
                return self._logits(step, keep)
        return self._logits(step, keep)

    def _logits(self, step: StepMetadata, keep: Tensor | None) -> Tensor:
        if step.ends is not None and self._cuts(step, step.ends):
            return self._bound.forward(step.ids, step, None)
        step.ends = None
        return self._bound.forward(step.ids, step, keep)

    def _cuts(self, step: StepMetadata, ends: RunEnds) -> bool:
        """Whether a prefill's last layer is cut. Whoever watches what comes behind the layers sees all tokens."""
        if self.cuts is None or self.compiled is None or not self.compiled.routes_last:
            return False
        if step.slots.shape[0] < max(self.cuts.tokens, self.cuts.an_end * ends.places.shape[0]):
            return False
        return not any(map(has_forward_hooks, self._bound.around))

    def tensors(self) -> dict[str, Tensor]:
        """The attention schedules; what the layers keep between steps is the step's."""
        return self._bound.tensors()
