"""What turns a step's tokens into logits, as the router and the step see it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from hybridgen.graphs.key import GraphKey
from hybridgen.models.attention import StepMetadata


class Executor(Protocol):
    """One way to turn a step's tokens into logits. All that it reads and writes stays where it is, so that a step can
    be recorded."""

    @property
    def name(self) -> str:
        """`layers`, `chain`, `persistent` or `rows`."""
        ...

    @property
    def launch(self) -> str:
        """How a step runs without a recording: `eager`, `compiled` or `direct`."""
        ...

    def refuses(self, key: GraphKey) -> str | None:
        """Why it does not serve such steps, in words; None if it does."""
        ...

    def logits(self, step: StepMetadata, keep: Tensor | None) -> Tensor:
        """Logits of the step's tokens, [T, vocab_size]; the next call may overwrite them.

        Args:
            keep: int64 [K], the tokens whose logits are wanted, [K, vocab_size] then; None for all.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What outlives a step, the model's parameters and buffers apart, by name."""
        ...


@runtime_checkable
class StateExecutor(Executor, Protocol):
    """An executor that runs no layers, and leaves what would have gone into some of them."""

    def states(self, tokens: int) -> Tensor:
        """What went into the layers that whoever drafts reads, side by side, in the last step: [tokens, width]."""
        ...
