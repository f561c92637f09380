"""Which errors a device does not recover from."""

from __future__ import annotations

import torch

from hybridgen.errors import EngineError


class LostRanks(EngineError):
    """Another process that has a part of the model is gone: no step can run any more."""


def is_fatal(error: BaseException) -> bool:
    """Whether the CUDA context may be lost, or a part of the model is. Running out of memory is not fatal: a smaller
    call may fit."""
    if isinstance(error, LostRanks):
        return True
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)
