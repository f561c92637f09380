"""Which tokens rows of a step may choose, on their way from the host to where the sampler reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NOBODY = -1
"""The row of a line that is for no row."""


class TokenMasks:
    """Bits for tokens, by line, and the row of the step that each line is for.

    They lie at fixed places, so that a recorded sampler reads them. The host fills pinned memory, of which there are
    two in turn; one copy brings the lines that are used to the device, in the order of the stream.
    """

    def __init__(self, lines: int, vocab_size: int, device: torch.device) -> None:
        """For so many rows at most; every line is for nobody."""
        words = -(-vocab_size // 32)
        on_cuda = device.type == "cuda"
        self.rows = torch.full((lines,), NOBODY, dtype=torch.int64, device=device)
        """int64 [lines]: rows of the step, each at most once; `NOBODY`."""
        self.bits = torch.zeros(lines, words, dtype=torch.int32, device=device)
        """int32 [lines, ceil(vocab_size / 32)]: a bit for each token that may be chosen, the lowest bit first."""
        self._hosts = [torch.zeros(lines, words, dtype=torch.int32, pin_memory=on_cuda, device="cpu") for _ in range(2)]
        self._places = [torch.zeros(lines, dtype=torch.int64, pin_memory=on_cuda, device="cpu") for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)] if on_cuda else None
        self._turn = 0
        self._sent: tuple[int, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """What steps read, by name."""
        return {"rows with masks": self.rows, "masks": self.bits}

    def open(self, count: int) -> Tensor:
        """The first lines of the next `send()`, int32 [count, words] on the CPU; waits while they are being copied."""
        if self._events is not None:
            self._events[self._turn].synchronize()
        return self._hosts[self._turn][:count]

    def send(self, rows: Sequence[int]) -> None:
        """Copy what was filled to the device, on the current stream.

        Args:
            rows: the row of each line that was opened.
        """
        used, named = len(rows), tuple(rows)
        self.bits[:used].copy_(self._hosts[self._turn][:used], non_blocking=True)
        if named != self._sent:
            places = self._places[self._turn]
            places.fill_(NOBODY)
            places[:used] = torch.tensor(named, dtype=torch.int64)
            self.rows.copy_(places, non_blocking=True)
            self._sent = named
        if self._events is not None:
            self._events[self._turn].record()
        self._turn = 1 - self._turn

    def clear(self) -> None:
        """Every line is for nobody."""
        self.rows.fill_(NOBODY)
        self._sent = ()


class HostDrafts:
    """What the host is told of the drafts that a step checks, while its forward runs."""

    def __init__(self, drafts: Tensor) -> None:
        """`drafts`: int64 [slots, K], where steps keep them."""
        self._drafts = drafts
        self._host = torch.empty(drafts.shape, dtype=drafts.dtype, pin_memory=drafts.is_cuda, device="cpu")
        self._event = torch.cuda.Event() if drafts.is_cuda else None

    def ask(self) -> None:
        """Copy them, in the order of the stream: behind the step that made them, before the one that checks them."""
        self._host.copy_(self._drafts, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> Tensor:
        """int64 [slots, K] on the CPU: what was asked for last, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
