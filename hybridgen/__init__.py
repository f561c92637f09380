"""hybridgen: text generation from Hugging Face causal language models, compiled with `torch.compile`.

import hybridgen
out = hybridgen.generate("path/or/hub-id", "def quicksort(", max_new_tokens=64)
print(out.text)
"""

import importlib as _importlib
import typing as _typing

from hybridgen import importing as _importing
from hybridgen.api import compare, generate, stream, unload
from hybridgen.config import EngineConfig, Mode
from hybridgen.core import (
    Completion,
    FinishReason,
    GraphEvent,
    SamplingParams,
    StepSummary,
    Timing,
    TokenEvent,
    TokenLogprob,
)
from hybridgen.errors import (
    CacheError,
    CacheMissError,
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
    ServerBusyError,
    ServerError,
    TokenizerError,
    UnsupportedModelError,
)
from hybridgen.serving.client import Client

if _typing.TYPE_CHECKING:
    from hybridgen.comparison.results import Comparison
    from hybridgen.engine import Engine
    from hybridgen.execution.statistics import EngineStats
    from hybridgen.serving.async_client import AsyncClient

# Imported when they are first used: most bring torch, which a client does without.
_LATER = {
    "Comparison": "hybridgen.comparison.results",
    "Engine": "hybridgen.engine",
    "EngineStats": "hybridgen.execution.statistics",
    "AsyncClient": "hybridgen.serving.async_client",
}

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "CacheError",
    "CacheMissError",
    "CheckpointError",
    "Client",
    "Comparison",
    "Completion",
    "ConfigError",
    "DeviceError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "FinishReason",
    "GraphEvent",
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
    "ServerBusyError",
    "ServerError",
    "StepSummary",
    "Timing",
    "TokenEvent",
    "TokenLogprob",
    "TokenizerError",
    "UnsupportedModelError",
    "compare",
    "generate",
    "stream",
    "unload",
]


def __getattr__(name: str) -> _typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module 'hybridgen' has no attribute {name!r}")
    if name == "Engine":
        _importing.engine()
    value = getattr(_importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
