"""No kernel of ours is compiled by Triton while an engine with `offline_compile=True` lives.

Triton looks for a compiled kernel among its files right before it compiles one, through a class that can be replaced
(`triton.knobs.cache.manager_class`, in 3.6 and 3.7 alike). Ours raises where there is nothing. A launch never comes
there, and Triton's own hooks do not serve: `jit_cache_hook` does not know what is on the disk and does not see
`triton.compile`, and the listener is told when it is done.

The class is the process's, so only kernels of hybridgen are refused: not a user's own, and not while an engine lives
that may compile.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hybridgen.errors import CacheMissError

_lock = threading.Lock()
_refusing: list[list[str]] = []
"""By engine: the names of kernels that were refused."""
_allowing: list[object] = []
"""Engines that may compile."""


@contextmanager
def refusing() -> Iterator[list[str]]:
    """Refuse to compile kernels of ours inside; gives the names of those that were. Nothing without Triton.

    Where Triton would compile one, `CacheMissError` is raised.
    """
    refused: list[str] = []
    if importlib.util.find_spec("triton") is None:
        yield refused
        return
    cache = importlib.import_module("triton").knobs.cache
    with _lock:
        if not _refusing:
            _install(cache)
        _refusing.append(refused)
    try:
        yield refused
    finally:
        with _lock:
            _refusing[:] = [other for other in _refusing if other is not refused]
            if not _refusing:
                _remove(cache)


@contextmanager
def allowing() -> Iterator[None]:
    """Refuse nothing inside: an engine lives that may compile."""
    engine = object()
    with _lock:
        _allowing.append(engine)
    try:
        yield
    finally:
        with _lock:
            _allowing.remove(engine)


_before: dict[str, Any] = {}
"""What a user had set in place of Triton's own class."""


def _install(cache: Any) -> None:
    _before.clear()
    if "manager_class" in vars(cache):
        _before["manager_class"] = vars(cache)["manager_class"]
    base: Any = cache.manager_class or importlib.import_module("triton.runtime.cache").FileCacheManager

    class RefusingCacheManager(base):
        """Finds what is there, and raises where a kernel of ours is not."""

        def get_group(self, filename: str) -> Any:
            found = super().get_group(filename)
            if filename.endswith(".json") and filename not in (found or {}):
                _refuse(filename.removesuffix(".json"))
            return found

    cache.manager_class = RefusingCacheManager


def _remove(cache: Any) -> None:
    if getattr(vars(cache).get("manager_class"), "__name__", "") != "RefusingCacheManager":
        return  # somebody has set another since
    if _before:
        cache.manager_class = _before["manager_class"]
    else:
        del cache.manager_class  # as the environment has it


def _refuse(name: str) -> None:
    with _lock:
        if not _refusing or _allowing or not _is_ours(name):
            return
        for refused in _refusing:
            refused.append(name)
    raise CacheMissError(
        f"offline_compile=True, and the compile cache does not hold the Triton kernel {name} for this call; run "
        "hybridgen cache warm again with this engine's settings, or allow compiling"
    )


def _is_ours(name: str) -> bool:
    """Whether one of our modules has a kernel of that name."""
    kernel = importlib.import_module("triton").JITFunction
    modules = [module for key, module in list(sys.modules.items()) if key.startswith("hybridgen.")]
    return any(isinstance(value, kernel) and value.__name__ == name for m in modules for value in vars(m).values())
