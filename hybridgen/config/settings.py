"""What a field of a config is: its description, whose key it is in, and the check of its value alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any

from hybridgen.errors import ConfigError, shown
from hybridgen.fields import about
from hybridgen.params import MAX_INT

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|KIB|MIB|GIB)?\s*$", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("fp8", "int8", "int4")
KV_DTYPES = ("fp8",)

Check = Callable[[str, Any], Any]
"""Takes a field's name and value; returns the value to keep, or raises `ConfigError`."""


def setting(text: str, check: Check, *, in_key: bool = True, opens: bool = False) -> dict[str, Any]:
    """Metadata of a field of `EngineConfig`: all that the library has to know of it stands where it is declared.

    Args:
        text: what it is for.
        check: of its value alone; what depends on other fields is checked in `EngineConfig.__post_init__`.
        in_key: whether it is part of the compile cache's key. Leave out only a field that no compiler sees, or that is
            in the key under another name: a cold start too many is better than stale code.
        opens: whether it is needed to open a checkpoint, before an engine is built.
    """
    return {**about(text), "check": check, "in_key": in_key, "opens": opens}


def switch(name: str, value: Any) -> bool:
    """True or False, and nothing that only counts as one of them."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}; give True or False")
    return value


def integer(low: int, high: int = MAX_INT, *, optional: bool = False) -> Check:
    """An integer in a range; `optional`: or None."""

    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        bound = f"at least {low}" if high == MAX_INT else f"from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}={shown(value)} is not an integer; give one {bound}")
        if not low <= value <= high:
            raise ConfigError(f"{name}={shown(value)} is out of range; give an integer {bound}")
        return value

    return check


def one_of(kind: type[StrEnum]) -> Check:
    """A member of an enumeration, or its text."""

    def check(name: str, value: Any) -> StrEnum:
        try:
            return kind(value)
        except ValueError:
            known = ", ".join(member.value for member in kind)
            raise ConfigError(f"{name}={shown(value)} is unknown; choose one of: {known}") from None

    return check


def check_dtype(name: str, value: Any) -> str:
    """One of `DTYPES`; a `torch.dtype` is taken by its name."""
    dtype = str(value).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"{name}={shown(value)} is unknown; choose one of: {', '.join(DTYPES)}")
    return dtype


def check_device(name: str, value: Any) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    device = str(value)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"{name}={shown(value)} is unknown; choose auto, cpu, cuda or cuda:N")
    return device


def check_adapter(name: str, value: Any) -> str | None:
    """A path or an id, or None."""
    if value is None or (isinstance(value, (str, os.PathLike)) and os.fspath(value)):
        return None if value is None else os.fspath(value)
    raise ConfigError(f"{name}={shown(value)}; give a directory or hub id of a PEFT adapter, or None")


def check_revision(name: str, value: Any) -> str | None:
    """A branch, tag or commit, or None."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(f"{name}={shown(value)}; give a branch, tag or commit as text, or None")
    return value


def check_page_size(name: str, value: Any) -> int:
    """A power of two from 8 to 256."""
    size: int = integer(8, 256)(name, value)
    if size & (size - 1):
        raise ConfigError(f"{name}={size} is not a power of two; use 16, 32, 64, 128 or 256")
    return size


def check_seconds(name: str, value: Any) -> float:
    """A finite number of seconds from 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigError(f"{name}={shown(value)}; give a number of at least 0")
    return value


def check_quantization(name: str, value: Any) -> str | None:
    """One of `QUANTIZATIONS`, or None."""
    if value is not None and value not in QUANTIZATIONS:
        raise ConfigError(f"{name}={shown(value)} is unknown; choose one of: {', '.join(QUANTIZATIONS)}, or None")
    return value


def check_kv_dtype(name: str, value: Any) -> str | None:
    """One of `KV_DTYPES`, or None."""
    if value is not None and value not in KV_DTYPES:
        raise ConfigError(
            f"{name}={shown(value)} is unknown; choose one of: {', '.join(KV_DTYPES)}, or None for that of the weights"
        )
    return value


def check_ratio(name: str, value: Any) -> float | None:
    """How many times as large at most, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0):
        raise ConfigError(f"{name}={shown(value)}; give a number of at least 0, or None to measure")
    return value


def check_backend(name: str, value: Any) -> str:
    """The name of a backend of `torch.compile`."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(
            f"{name}={shown(value)} is no name of a backend; give one such as 'inductor', or mode='eager' to compile "
            "nothing"
        )
    return value


def check_compile_cache(name: str, value: Any) -> bool | str:
    """Whether to keep what is compiled, or the directory for it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, bool) and (not isinstance(value, str) or not value or "\0" in value):
        raise ConfigError(f"{name}={shown(value)}; give True, False or a directory")
    return value


def check_speculation(name: str, value: Any) -> Any:
    """Who drafts: a name, or an object that can."""
    drafts = all(hasattr(value, part) for part in ("name", "begin", "draft", "tensors"))
    if value is None or value == "ngram" or (drafts and not isinstance(value, type)):
        return value
    raise ConfigError(
        f'{name}={shown(value)}; give "ngram", None, or a drafter of your own: an object with name, begin(), draft() '
        "and tensors() (docs/speculation.md)"
    )


def check_drafter(name: str, value: Any) -> Any:
    """A model or a head that drafts: a path, an id, a live module, or None."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    module = hasattr(value, "named_parameters") and not isinstance(value, type)
    if value is None or module or (isinstance(value, str) and value and "\0" not in value):
        return value
    raise ConfigError(
        f"{name}={shown(value)}; give a smaller model of the same vocabulary: a directory, a hub id, a live module; "
        "or an EAGLE-3 head. What drafts without a model is speculation="
    )


def check_listener(name: str, value: Any) -> Any:
    """Something to call, or None."""
    if value is not None and not callable(value):
        raise ConfigError(f"{name}={shown(value)}; give a function of one GraphEvent")
    return value


def check_progress(name: str, value: Any) -> bool | None:
    """Whether bars are shown; None: where a terminal is."""
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}; give True, False or None")
    return value


def check_buckets(name: str, sizes: Any) -> tuple[int, ...] | None:
    """A user's bucket sizes in order, each once."""
    if sizes is None:
        return None
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Iterable):
        raise ConfigError(f"{name}={shown(sizes)} is no list; give sizes such as [1, 4, 16], or None for the default")
    listed = list(sizes)
    for size in listed:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_INT:
            raise ConfigError(f"{name} holds {shown(size)}; give integers of at least 1")
    return tuple(sorted(set(listed)))


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


def bar_disabled(progress: bool | None) -> bool | None:
    """tqdm's `disable` for a `progress`: None switches a bar off where standard error is no terminal."""
    return None if progress is None else not progress
