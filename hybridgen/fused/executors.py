"""The fused executors: how the persistent kernels and the chain serve steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hybridgen.graphs.key import GraphKey
from hybridgen.models import StepMetadata
from hybridgen.models.attention import Phase
from hybridgen.models.share import Share

if TYPE_CHECKING:  # they import Triton and CUDA's bindings, which are not there everywhere
    from hybridgen.fused.chain.step import ChainStep
    from hybridgen.fused.persistent.step import PersistentStep
    from hybridgen.fused.rows.step import RowsStep


def _of_all_ranks(logits: Tensor, share: Share | None) -> Tensor:
    """The logits of the whole vocabulary."""
    return logits if share is None else share.gather(logits)


class PersistentExecutor:
    """One persistent kernel for a decode step of one row."""

    name = "persistent"
    launch = "direct"

    def __init__(self, step: PersistentStep, share: Share | None = None) -> None:
        """`share`: the other ranks, where the model is a rank's share."""
        self.step = step
        self._share = share

    def refuses(self, key: GraphKey) -> str | None:
        """Anything but a decode step of one row and one token."""
        if key.phase is Phase.DECODE and key.rows == key.query_len == 1:
            return None
        return "the persistent kernel decodes one row of one token"

    def logits(self, step: StepMetadata, keep: Tensor | None) -> Tensor:
        """Launch it. It finds its row in the inputs that it was built with."""
        return _of_all_ranks(self.step(), self._share)

    def tensors(self) -> dict[str, Tensor]:
        """What outlives a launch, by name."""
        return self.step.tensors()

    def close(self) -> None:
        """Unload the kernel."""
        self.step.kernel.close()


class RowsExecutor:
    """One persistent kernel for a decode step of a few columns: tokens of several rows, or several tokens of a row."""

    name = "rows"
    launch = "direct"

    def __init__(
        self, step: RowsStep, columns: int, least: int, share: Share | None = None, wide: Tensor | None = None
    ) -> None:
        """
        Args:
            columns: tokens of a launch at most.
            least: rows from which on it is used.
            share: the other ranks, where the model is a rank's share.
            wide: [rows, vocab], for logits of more rows than a launch has.
        """
        self.step = step
        self._share = share
        self._wide = wide
        self.columns = columns
        """Tokens of a launch at most. Steps with several tokens of a row have no other kernel than this one."""
        self.least = least
        """Rows of one token from which on it is used."""
        self.most = columns
        """Rows of one token up to which it is used."""
        self.widest = columns if wide is None else max(columns, wide.shape[0])
        """Rows of one token up to which it could be used: more than `columns` in several launches, each of which reads
        the weights; where that is faster than what else serves, `most` is raised."""

    def refuses(self, key: GraphKey) -> str | None:
        """Anything but a decode step of a few tokens."""
        if key.phase is Phase.DECODE:
            if key.query_len == 1 and self.least <= key.rows <= self.most:
                return None
            if key.query_len > 1 and key.rows * key.query_len <= self.columns:
                return None
        return (
            f"the persistent kernel for several rows decodes {self.least} to {self.most} rows of one token, and "
            f"{self.columns} tokens in steps with several of a row"
        )

    def logits(self, step: StepMetadata, keep: Tensor | None) -> Tensor:
        """Launch it; the next call overwrites what it returns."""
        tokens = step.ids.shape[0]
        if tokens <= self.columns:
            return _of_all_ranks(self.step(step.ids, step.positions, step.slots), self._share)
        if self._wide is None:
            raise ValueError(f"{tokens} tokens in launches of {self.columns} need room for their logits")
        for start in range(0, tokens, self.columns):
            part = slice(start, min(start + self.columns, tokens))
            self._wide[part].copy_(self.step(step.ids[part], step.positions[part], step.slots[part]))
        return self._wide[:tokens]

    def states(self, tokens: int) -> Tensor:
        """What went into the layers that whoever drafts reads, [tokens, width]; the next call overwrites it."""
        return self.step.states[:tokens]

    def tensors(self) -> dict[str, Tensor]:
        """What outlives a launch, by name."""
        return self.step.tensors() | ({} if self._wide is None else {"rows logits of several launches": self._wide})

    def close(self) -> None:
        """Unload the kernel."""
        self.step.kernel.close()


class ChainExecutor:
    """A chain of Triton kernels for a decode step of a few rows."""

    name = "chain"
    launch = "direct"

    def __init__(self, chain: ChainStep, logits: Tensor) -> None:
        """`logits` [rows, vocab] is where steps leave theirs."""
        self.chain = chain
        self._logits = logits
        self.least = 2
        """Rows from which on it is used."""
        self.most = logits.shape[0]
        """Rows up to which it is used."""

    def refuses(self, key: GraphKey) -> str | None:
        """Anything but a decode step of a few rows of one token."""
        if key.phase is Phase.DECODE and key.query_len == 1 and self.least <= key.rows <= self.most:
            return None
        return f"the chain decodes {self.least} to {self.most} rows of one token"

    def logits(self, step: StepMetadata, keep: Tensor | None) -> Tensor:
        """Launch it; the next call overwrites what it returns."""
        out = self._logits[: step.ids.shape[0]]
        self.chain(step.ids, step.positions, step.slots, step.block_table, out)
        return _of_all_ranks(out, self.chain.model.share)

    def tensors(self) -> dict[str, Tensor]:
        """What outlives a launch, by name."""
        named = {f"chain {name}": tensor for name, tensor in self.chain.tensors().items()}
        return named | {"chain logits": self._logits}
