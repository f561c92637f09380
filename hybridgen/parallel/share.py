"""A rank's share of a model, for the fused kernels: `models.share.Share` over a `Group`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridgen.parallel.group import Group
from hybridgen.parallel.modules import HeadShard, QuantisedHeadShard

_REASON_BYTES = 400
"""Of what a rank tells the others, at most."""


class GroupShare:
    """The other ranks of a model."""

    def __init__(self, group: Group, vocab_size: int) -> None:
        """`vocab_size`: of all ranks together."""
        self._group = group
        self._vocab_size = vocab_size
        self._padded = -(-vocab_size // group.size)

    @classmethod
    def of(cls, group: Group, model: PreTrainedModel) -> GroupShare:
        """That of a rank's part of a model, as `modules.join` left it."""
        head = model.get_output_embeddings()
        assert isinstance(head, HeadShard | QuantisedHeadShard)
        return cls(group, head.vocab_size)

    @property
    def rank(self) -> int:
        """See `Share.rank`."""
        return self._group.rank

    @property
    def size(self) -> int:
        """See `Share.size`."""
        return self._group.size

    def agree(self, reason: str) -> str:
        """See `Share.agree`."""
        given = reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES) if reason else b""
        said = [each.decode(errors="replace").strip() for each in self._group.exchange(given)]
        found = next((rank for rank, each in enumerate(said) if each), None)
        return "" if found is None else f"rank {found}: {said[found]}"

    def add_up(self, x: Tensor) -> Tensor:
        """See `Share.add_up`."""
        return self._group.reduce(x)

    def parts(self, rows: int, width: int) -> int:
        """See `Share.parts`."""
        one_shot = self._group.one_shot
        return 0 if one_shot is None else one_shot.parts(rows, width)

    def add_to_state(
        self, product: Tensor, state: Tensor, handed: Tensor, gain: Tensor | None, squares: Tensor, factor: float
    ) -> None:
        """See `Share.add_to_state`."""
        one_shot = self._group.one_shot
        assert one_shot is not None  # or there are no parts
        with self._group.progress.waits:
            one_shot.add_to_state(product, state, handed, gain, squares, factor)

    def gather(self, logits: Tensor) -> Tensor:
        """See `Share.gather`."""
        lacks = self._padded - logits.shape[-1]
        return self._group.gather(nn.functional.pad(logits, (0, lacks)) if lacks else logits, self._vocab_size)

    def memory(self, size: int) -> list[int]:
        """See `Share.memory`."""
        return self._group.memory(size)

    def on_end(self, call: Callable[[], None]) -> None:
        """See `Share.on_end`."""
        self._group.endings.append(call)
