"""hybridgen: text generation from Hugging Face causal language models, compiled with `torch.compile`.

import hybridgen
out = hybridgen.generate("path/or/hub-id", "def quicksort(", max_new_tokens=64)
print(out.text)
"""

import contextlib as _contextlib
import importlib as _importlib
import typing as _typing

from hybridgen._version import __version__ as __version__
from hybridgen.api import compare, generate, score, stream, unload
from hybridgen.config import EngineConfig, Mode
from hybridgen.core import Completion, FinishReason, GraphEvent, Score, StepSummary, Timing, TokenEvent, TokenLogprob
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
from hybridgen.params import SamplingParams
from hybridgen.serving.client import Client
from hybridgen.telemetry import import_time as _import_time

if _typing.TYPE_CHECKING:
    from hybridgen.comparison.results import Comparison
    from hybridgen.engine import Engine
    from hybridgen.integrations.attached import attach
    from hybridgen.serving.async_client import AsyncClient
    from hybridgen.serving.replicas.replicas import Replicas
    from hybridgen.telemetry.statistics import EngineStats

# Imported when they are first used: most bring torch, which a client does without.
_LATER = {
    "Comparison": "hybridgen.comparison.results",
    "Engine": "hybridgen.engine",
    "EngineStats": "hybridgen.telemetry.statistics",
    "AsyncClient": "hybridgen.serving.async_client",
    "Replicas": "hybridgen.serving.replicas.replicas",
    "attach": "hybridgen.integrations.attached",
}

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
    "Replicas",
    "RequestError",
    "SamplingError",
    "SamplingParams",
    "Score",
    "ServerBusyError",
    "ServerError",
    "StepSummary",
    "Timing",
    "TokenEvent",
    "TokenLogprob",
    "TokenizerError",
    "UnsupportedModelError",
    "attach",
    "compare",
    "generate",
    "score",
    "stream",
    "unload",
]


def __getattr__(name: str) -> _typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module 'hybridgen' has no attribute {name!r}")
    with _import_time.timed() if name == "Engine" else _contextlib.nullcontext():
        value = getattr(_importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
