"""A step that was launched, and its result once the host reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hybridgen.core import TokenLogprob
from hybridgen.sampling import SampleOutput


class StepOutput(NamedTuple):
    """What a step produced, by row."""

    tokens: list[int]
    """-1 where the row's logits held no number that could be chosen."""
    logprobs: list[TokenLogprob] | None


class LaunchedStep:
    """Sampled tokens on their way to the host.

    On CUDA the copies go to pinned memory behind the step on its stream and an event follows them, so that `read()`
    waits for this step alone while later ones run.
    """

    def __init__(self, sampled: SampleOutput) -> None:
        self._tensors = [None if tensor is None else _to_host(tensor) for tensor in sampled]
        self._event: torch.cuda.Event | None = None
        if sampled.tokens.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> StepOutput:
        """Wait for the step and return its tokens."""
        if self._event is not None:
            self._event.synchronize()
        tokens, logprobs, top_ids, top_logprobs = ([] if t is None else t.tolist() for t in self._tensors)
        if not logprobs:
            return StepOutput(tokens, None)
        tops = [tuple(zip(ids, values, strict=True)) for ids, values in zip(top_ids, top_logprobs, strict=True)] or [
            ()
        ] * len(tokens)
        return StepOutput(tokens, list(map(TokenLogprob, tokens, logprobs, tops)))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
