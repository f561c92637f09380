"""The exceptions that hybridgen raises for its users, and how messages quote values and other errors.

::

    HybridgenError
    ├── ConfigError            an EngineConfig field or keyword is wrong            (also ValueError)
    ├── SamplingError          a SamplingParams field is wrong                      (also ValueError)
    ├── PromptError            a prompt cannot be run as given                      (also ValueError)
    ├── LoadError              a model cannot be loaded
    │   ├── ModelNotFoundError     no such path or hub id
    │   ├── CheckpointError        files missing, truncated, corrupt or mismatched
    │   ├── TokenizerError         text was given or asked for and there is no tokenizer
    │   └── UnsupportedModelError  the architecture cannot run here (yet), and why
    ├── DeviceError            the device asked for is absent or failed
    │   └── OutOfMemoryError       the device's memory does not hold what was asked for
    ├── CacheError             the compile cache, or a bundle of it, cannot be used as asked
    │   └── CacheMissError         `offline_compile=True`, and what is needed is not in the cache
    ├── EngineError            the engine is closed, in use elsewhere, or broken
    ├── RequestError           one request failed while it ran; the others go on
    ├── ServerError            a generator process cannot be reached, refused a call, or went away
    │   └── ServerBusyError        its queue is full; holds when to try again
    └── Interrupted            Ctrl-C during a batch; holds what was finished       (also KeyboardInterrupt)

Every message says what was wrong, repeats the value, and says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridgen.core import Completion


def shown(value: Any, limit: int = 60) -> str:
    """A value as error messages quote it: on one line and short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"{'-' if value < 0 else ''}<an integer of {value.bit_length()} bits>"
    try:
        text = " ".join(repr(value).split("\n"))
    except Exception:  # a __repr__ can raise what it likes; integers of over 4300 digits do, inside a list too
        return f"<a value of type {type(value).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type where it has none: for messages of one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def described(error: BaseException) -> str:
    """An exception in one line: its type, and the first line of its message if it has one."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class HybridgenError(Exception):
    """Base of all exceptions that hybridgen raises on purpose. They can be copied and pickled, attributes included."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Python's own way calls the class with `args` alone, which fails where __init__ takes more: a process pool
        # hangs on an exception that its worker cannot send.
        return _restored, (type(self), self.args, dict(vars(self)))


class ConfigError(HybridgenError, ValueError):
    """An `EngineConfig` field, or a keyword that sets one, has a value that cannot work."""


class SamplingError(HybridgenError, ValueError):
    """A `SamplingParams` field has a value that cannot work."""


class PromptError(HybridgenError, ValueError):
    """A prompt is empty, too long for the context or the cache, or holds ids outside the vocabulary."""


class LoadError(HybridgenError):
    """A model cannot be loaded."""


class ModelNotFoundError(LoadError):
    """The path does not exist, or the hub id cannot be found or reached."""


class CheckpointError(LoadError):
    """A checkpoint's files are missing, truncated, corrupt, or do not match its config."""


class TokenizerError(LoadError):
    """Text was given or asked for, and the model has no usable tokenizer."""


class UnsupportedModelError(LoadError):
    """The architecture cannot run on this engine; the message names the reason."""


class DeviceError(HybridgenError):
    """The device asked for is absent, or it failed."""


class OutOfMemoryError(DeviceError):
    """The device's memory does not hold the weights or the KV cache asked for."""


class CacheError(HybridgenError):
    """The compile cache cannot be used as asked: its directory is not private, or a bundle is corrupt or not trusted.

    Starting an engine never raises it: an entry that cannot be used is a miss.
    """


class CacheMissError(CacheError):
    """`offline_compile=True`, and the cache lacks what the engine needs; the message names what differs."""


class EngineError(HybridgenError):
    """The engine is closed, its model is in use by another engine, or a fatal error broke it."""


class RequestError(HybridgenError):
    """One request failed while it ran (for example NaN logits); other requests are not affected."""


class ServerError(HybridgenError):
    """A generator process (`hybridgen serve`) cannot start, cannot be reached, refused a call, or went away.

    `code` is the code of its error message, as `docs/serving.md` lists them; None where the client found the problem.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class ServerBusyError(ServerError):
    """The server's queue is full; `retry_after` is its guess, in seconds, at when there is room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, "busy")
        self.retry_after = retry_after


class Interrupted(HybridgenError, KeyboardInterrupt):
    """Ctrl-C arrived during a batch.

    `completions` has one entry per prompt, in order: finished ones are whole, the others hold the tokens
    that they had and `finish_reason="cancelled"`.
    """

    def __init__(self, message: str, completions: Sequence[Completion]) -> None:
        super().__init__(message)
        self.completions = list(completions)


def _restored(kind: type[HybridgenError], args: tuple[Any, ...], attributes: dict[str, Any]) -> HybridgenError:
    """An exception as it was pickled, without a call of its `__init__`."""
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(attributes)
    return error
