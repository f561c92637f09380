"""Frames: a 4-byte big-endian length and that many bytes of JSON, one object each."""

from __future__ import annotations

import json
import math
import re
import struct
from typing import Any, NoReturn

HEADER = struct.Struct(">I")
MAX_DEPTH = 16
"""Objects and lists inside each other in one message."""

# A string (also one that is cut off), or a bracket. Possessive, so that no input takes quadratic time.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)


class FrameError(Exception):
    """Bytes that are no frame of this protocol; what follows them cannot be read."""


def encode(message: dict[str, Any]) -> bytes:
    """A message as a frame.

    Raises:
        ValueError, TypeError: it holds something that JSON cannot, NaN and infinities included.
    """
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> dict[str, Any]:
    """The message in a frame's body.

    Raises:
        FrameError: it is not one JSON object, nests too deep, or holds a number that JSON does not have.
    """
    check_depth(body)
    try:
        message = json.loads(body.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except FrameError:
        raise
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame is not UTF-8 JSON: {error}") from None
    if not isinstance(message, dict):
        raise FrameError("a frame holds JSON that is not an object; send one object per frame")
    return message


class FrameReader:
    """Cuts a stream of bytes into messages."""

    def __init__(self, max_frame: int) -> None:
        """`max_frame`: bytes of the longest body that is accepted."""
        self.max_frame = max_frame
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that are complete with these bytes.

        Raises:
            FrameError: a frame is longer than `max_frame`, empty, or no message; nothing can be read after it.
        """
        buffer = self._buffer
        buffer += data
        messages = []
        start = 0
        while len(buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(buffer, start)
            # Before the body arrives, so that nobody makes us hold more than the limit.
            if length > self.max_frame:
                raise FrameError(f"a frame of {length} bytes is over the limit of {self.max_frame}; send less at once")
            end = start + HEADER.size + length
            if len(buffer) < end:
                break
            messages.append(decode(bytes(memoryview(buffer)[start + HEADER.size : end])))
            start = end
        del buffer[:start]
        return messages


def check_depth(body: bytes, limit: int = MAX_DEPTH) -> None:
    """Check how deep JSON nests, before it is parsed.

    Raises:
        FrameError: deeper than the limit.
    """
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    depth = 0
    for match in _TOKEN.finditer(body):
        first = body[match.start()]
        if first in b"[{":
            depth += 1
            if depth > limit:
                raise FrameError(f"a frame nests more than {limit} levels of objects and lists")
        elif first in b"]}":
            depth -= 1


def _refuse(name: str) -> NoReturn:
    raise FrameError(
        f"a frame holds {name}, which is not JSON; see the page on serving for numbers that are not finite"
    )


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FrameError(f"a frame holds the number {text[:40]}, which no float can hold")
    return value
