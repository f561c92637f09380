"""What a server accepts, checked before anything is allocated for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from hybridgen.errors import ConfigError, shown


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server; its hello tells them to clients.

    Raises:
        ConfigError: a value is not positive.
    """

    frame: int = 4 * 2**20
    """Bytes of one message to the server."""
    elements: int = 2**19
    """Values of one message to the server (numbers, strings, objects, lists), those inside others included."""
    containers: int = 2**16
    """How many of these may be objects and lists."""
    prompt_chars: int = 2**20
    """Characters of one text or chat prompt. (Its tokens are limited by the model's context.)"""
    n: int = 64
    """Completions of one prompt."""
    batch: int = 256
    """Prompts of one request."""
    stop_strings: int = 256
    """Different stop strings of one request, and other strings of its sampling."""
    stop_chars: int = 8192
    """Characters of these together. What finds them takes time and memory for each."""
    sampling_ids: int = 2**15
    """Members of lists and objects in one request's sampling: stop ids, biases and what is like them."""
    queue: int = 1024
    """Completions that run or wait, of all clients together; beyond, requests are answered `busy`."""
    clients: int = 128
    """Connections."""
    controls: int = 16
    """Unanswered `stats` messages of one connection."""
    unsent: int = 64 * 2**20
    """Bytes that wait for one client to read them; with more it is cut off."""
    held: int = 256 * 2**20
    """Bytes of all clients' requests that run or wait, about; beyond, requests are answered `busy`."""
    encode_seconds: float = 30.0
    """A prompt must have become token ids within this time, waiting included."""
    frame_seconds: float = 10.0
    """A frame, and the first hello, must arrive whole within this time."""
    write_seconds: float = 30.0
    """A client that reads nothing for this long, while something waits for it, is cut off."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int,) if field.type == "int" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 2**31:
                raise ConfigError(f"limit {field.name}={shown(value)}; give a positive number below 2**31")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
