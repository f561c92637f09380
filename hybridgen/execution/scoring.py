"""Log-probabilities of prompt tokens: which a prefill call tells, and their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from hybridgen.core import TokenLogprob
from hybridgen.execution.plan import PrefillChunk
from hybridgen.kernels.scoring.logprobs import token_logprobs

_LOGIT_BYTES = 256 * 2**20
"""What the logits of one call's scored tokens take at most."""
_FEW, _MANY = 32, 1024


def score_budget(vocab_size: int, dtype: torch.dtype) -> int:
    """Tokens that one call scores at most, so that their logits stay small whatever the prompts' lengths."""
    return min(_MANY, max(_FEW, _LOGIT_BYTES // (vocab_size * dtype.itemsize)))


class ScoredTokens:
    """The scored tokens of one prefill call."""

    def __init__(self, chunks: Sequence[PrefillChunk], device: torch.device) -> None:
        """Send to the device which tokens they are; waits for nothing."""
        places: list[int] = []
        targets: list[int] = []
        total = 0
        for chunk in chunks:
            total += len(chunk.tokens)
            end = total
            if chunk.targets and chunk.last:  # its last token is sampled behind
                end = total - 1
            places += (*range(end - len(chunk.targets), end), *[end - 1] * len(chunk.others))
            targets += (*chunk.targets, *chunk.others)
        self._chunks = tuple(chunk for chunk in chunks if chunk.targets)
        self._device = device
        self.places = self._sent(places)
        """int64 [K]: the tokens of the call whose logits are wanted, by their place in it."""
        self._targets = self._sent(targets)
        self._on_host: tuple[Tensor, ...] = ()
        self._event: torch.cuda.Event | None = None

    def _sent(self, values: list[int]) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64, device="cpu")
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host

    def take(self, logits: Tensor) -> None:
        """Part of the step: score the targets, and start the copy to the host.

        Args:
            logits: [K, vocab_size], of `places`.
        """
        likely = min(max(chunk.likely for chunk in self._chunks), logits.shape[1])
        found = token_logprobs(logits, self._targets, likely)
        if not logits.is_cuda:
            self._on_host = found
            return
        self._on_host = tuple(torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True) for t in found)
        for host, tensor in zip(self._on_host, found, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> list[list[TokenLogprob]]:
        """Wait for the step. One list for each chunk that has targets: of them, then of its other tokens."""
        if self._event is not None:
            self._event.synchronize()
        values, ids, tops = (tensor.tolist() for tensor in self._on_host)
        rows = iter(zip(values, ids, tops, strict=True))
        found = []
        for chunk in self._chunks:
            wanted = (*chunk.targets, *chunk.others)
            found.append(
                [
                    TokenLogprob(target, value, tuple(zip(some[: chunk.likely], those[: chunk.likely], strict=True)))
                    for target, (value, some, those) in zip(wanted, islice(rows, len(wanted)), strict=True)
                ]
            )
        return found
