"""Which errors a device does not recover from."""

from __future__ import annotations

import torch


def is_fatal(error: BaseException) -> bool:
    """Whether the CUDA context may be lost. Running out of memory is not fatal: a smaller call may fit."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)
