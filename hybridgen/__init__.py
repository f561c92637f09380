"""hybridgen: text generation from Hugging Face causal language models, compiled with `torch.compile`.

import hybridgen
out = hybridgen.generate("path/or/hub-id", "def quicksort(", max_new_tokens=64)
print(out.text)
"""

from hybridgen.api import generate, stream, unload
from hybridgen.config import EngineConfig, Mode
from hybridgen.core import (
    Completion,
    FinishReason,
    SamplingParams,
    StepSummary,
    Timing,
    TokenEvent,
    TokenLogprob,
)
from hybridgen.engine import Engine
from hybridgen.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    EngineError,
    HybridgenError,
    Interrupted,
    LoadError,
    ModelNotFoundError,
    OutOfMemoryError,
    PromptError,
    RequestError,
    SamplingError,
    TokenizerError,
    UnsupportedModelError,
)
from hybridgen.execution.statistics import EngineStats

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DeviceError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "FinishReason",
    "HybridgenError",
    "Interrupted",
    "LoadError",
    "Mode",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "PromptError",
    "RequestError",
    "SamplingError",
    "SamplingParams",
    "StepSummary",
    "Timing",
    "TokenEvent",
    "TokenLogprob",
    "TokenizerError",
    "UnsupportedModelError",
    "generate",
    "stream",
    "unload",
]
