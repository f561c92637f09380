"""Opening checkpoints on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from hybridgen.config import EngineConfig
from hybridgen.loading import Checkpoint

EditJson = Callable[..., None]
CPU = EngineConfig(device="cpu")


def open_cpu(model: Any, **fields: Any) -> Checkpoint:
    """`Checkpoint.open` there."""
    return Checkpoint.open(model, CPU.replace(**fields))


def load_cpu(model: Any, **fields: Any) -> transformers.PreTrainedModel:
    """The model with its weights."""
    return open_cpu(model, **fields).load().model
