"""How a model is loaded and run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

from hybridgen.core import MAX_INT, shown
from hybridgen.errors import ConfigError

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|KIB|MIB|GIB)?\s*$", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Mode(StrEnum):
    """How the steps of the model run."""

    EAGER = "eager"
    """PyTorch operators, one at a time."""
    JIT = "jit"
    """The decoder layer compiled with `torch.compile`; dynamic sizes; no graphs."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is loaded and run; each field is also a keyword of `generate()` and `stream()`.

    Raises:
        ConfigError: a value is unknown or out of its range.
    """

    mode: Mode | str = Mode.JIT
    """`eager` or `jit`."""
    dtype: str = "auto"
    """`auto` (the checkpoint's), `float32`, `bfloat16` or `float16`."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint brings; reaches config, tokenizer and model alike."""
    allow_pickle: bool = False
    """Also read `.bin` weights, whose loading can run code; safetensors only otherwise."""
    local_files_only: bool = False
    """Never ask the hub; use what its cache holds."""
    max_batch: int = 32
    """Requests that run at once."""
    max_context: int | None = None
    """Longest prompt plus output, in tokens. Else the model's own limit."""
    page_size: int = 64
    """Tokens per KV-cache page; a power of two from 8 to 256."""
    kv_memory: int | str | None = None
    """Bytes for the KV cache, or a text such as "4GiB". Else what the device has free, up to what max_batch
    requests of max_context tokens can use (at most 1 GiB on a CPU)."""
    token_budget: int | None = None
    """Prompt tokens in one prefill call; longer prompts run in chunks. Else 8192 on CUDA, 1024 on a CPU."""
    run_ahead: int | None = None
    """Decode steps launched before the host reads the last one's tokens: 0 or 1. Else 1 on CUDA, 0 on a CPU."""
    fuse_projections: bool = True
    """Join q/k/v and gate/up weights where the layer allows it (one matrix product each)."""
    compile_backend: str = "inductor"
    """The backend of `torch.compile` in mode `jit`."""
    progress: bool | None = None
    """Progress bars over one second: on, off, or (None) on when standard error is a terminal."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "mode", Mode(self.mode))
        except ValueError:
            known = ", ".join(m.value for m in Mode)
            raise ConfigError(f"mode={shown(self.mode)} is unknown; choose one of: {known}") from None
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={shown(self.dtype)} is unknown; choose one of: {', '.join(DTYPES)}")
        object.__setattr__(self, "dtype", dtype)
        device = str(self.device)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ConfigError(f"device={shown(self.device)} is unknown; choose auto, cpu, cuda or cuda:N")
        object.__setattr__(self, "device", device)
        self._check_int("max_batch", low=1, high=4096)
        self._check_int("max_context", low=2, optional=True)
        self._check_int("page_size", low=8, high=256)
        if self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size={self.page_size} is not a power of two; use 16, 32, 64, 128 or 256")
        self._check_int("token_budget", low=2, optional=True)
        self._check_int("run_ahead", low=0, high=1, optional=True)
        for name in ("trust_remote_code", "allow_pickle", "local_files_only", "fuse_projections"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={shown(getattr(self, name))}; give True or False")
        if self.progress is not None and not isinstance(self.progress, bool):
            raise ConfigError(f"progress={shown(self.progress)}; give True, False or None")
        if not isinstance(self.compile_backend, str) or not self.compile_backend.strip():
            raise ConfigError(
                f"compile_backend={shown(self.compile_backend)} is no name of a backend; give one such as 'inductor', "
                "or mode='eager' to compile nothing"
            )
        if self.revision is not None and (not isinstance(self.revision, str) or not self.revision):
            raise ConfigError(f"revision={shown(self.revision)}; give a branch, tag or commit as text, or None")
        object.__setattr__(self, "kv_memory", parse_bytes("kv_memory", self.kv_memory))

    def _check_int(self, name: str, *, low: int, high: int = MAX_INT, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        bound = f"at least {low}" if high == MAX_INT else f"from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}={shown(value)} is not an integer; give one {bound}")
        if not low <= value <= high:
            raise ConfigError(f"{name}={shown(value)} is out of range; give an integer {bound}")

    @classmethod
    def field_names(cls) -> frozenset[str]:
        """The names that `generate()` accepts as keywords for loading and running."""
        return frozenset(f.name for f in fields(cls))

    @classmethod
    def of(cls, config: EngineConfig | None, fields: Mapping[str, Any]) -> EngineConfig:
        """What a call's `config=` and single fields amount to; None is the default config.

        Args:
            fields: values that replace those of `config`; the names must be `field_names()`.

        Raises:
            ConfigError: `config` is something else, or a value is unknown or out of its range.
        """
        if config is None:
            config = cls()
        if not isinstance(config, EngineConfig):
            raise ConfigError(
                f"config={shown(config)} is not an EngineConfig; give EngineConfig(mode=...), or its fields as keywords"
            )
        return config.replace(**fields)

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)


def parse_bytes(name: str, value: int | str | None) -> int | None:
    """Bytes from a number or a text such as `"4GiB"`; None stays None.

    Raises:
        ConfigError: the text is no size, or the number is not positive or beyond any memory.
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = _SIZE.match(value)
        if match is None:
            raise ConfigError(f"{name}={shown(value)} is not a size; write bytes or a size such as 512MiB or 4GiB")
        size = float(match[1]) * _UNITS[(match[2] or "B").lower()]
        count: Any = math.floor(size) if math.isfinite(size) else MAX_INT + 1
    else:
        count = value
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= MAX_INT:
        raise ConfigError(
            f"{name}={shown(value)}; give a positive number of bytes that memory can have, or a size such as 4GiB"
        )
    return count
