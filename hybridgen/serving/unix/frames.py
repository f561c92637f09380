"""Frames: a 4-byte big-endian length and that many bytes of JSON, one object each."""

from __future__ import annotations

import json
import math
import re
import struct
from typing import Any, NamedTuple, NoReturn

HEADER = struct.Struct(">I")
MAX_DEPTH = 16
"""Objects and lists inside each other in one message."""

# A string, also one that is cut off. Possessive, so that no input takes quadratic time.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)', re.DOTALL)
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class FrameError(Exception):
    """Bytes that are no frame of this protocol; what follows them cannot be read."""


def encode(message: dict[str, Any]) -> bytes:
    """A message as a frame.

    Raises:
        ValueError, TypeError: it holds something that JSON cannot, NaN and infinities included.
    """
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")
    return HEADER.pack(len(body)) + body


def decode(body: bytes, *, elements: int | None = None, containers: int | None = None) -> dict[str, Any]:
    """The message in a frame's body.

    Args:
        elements: how many values it may hold, those inside others included; None: any number.
        containers: how many of these may be objects and lists.

    Raises:
        FrameError: it is not one JSON object, is over a limit, nests too deep, or holds a number that JSON does not
            have.
    """
    if elements is None and containers is None and body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return _parsed(body)  # most frames that a client gets are a token
    shape = measure(body)
    if elements is not None and shape.elements > elements:
        raise FrameError(f"a frame holds {shape.elements} values, over the limit of {elements}; send less at once")
    if containers is not None and shape.containers > containers:
        raise FrameError(
            f"a frame holds {shape.containers} objects and lists, over the limit of {containers}; send less at once"
        )
    if shape.too_deep:
        raise FrameError(f"a frame nests more than {MAX_DEPTH} levels of objects and lists")
    return _parsed(body)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        message = _DECODER.decode(body.decode("utf-8"))
    except FrameError:
        raise
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame is not UTF-8 JSON: {error}") from None
    if not isinstance(message, dict):
        raise FrameError("a frame holds JSON that is not an object; send one object per frame")
    return message


class FrameReader:
    """Cuts a stream of bytes into messages."""

    def __init__(self, max_frame: int, *, elements: int | None = None, containers: int | None = None) -> None:
        """
        Args:
            max_frame: bytes of the longest body that is accepted.
            elements, containers: see `decode`.
        """
        self.max_frame = max_frame
        self._elements = elements
        self._containers = containers
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
        return [message for message, _ in self.feed_sized(data)]

    def feed_sized(self, data: bytes) -> list[tuple[dict[str, Any], int]]:
        """`feed()`, with the bytes that each message's frame had."""
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
            body = bytes(memoryview(buffer)[start + HEADER.size : end])
            messages.append((decode(body, elements=self._elements, containers=self._containers), end - start))
            start = end
        del buffer[:start]
        return messages


class Shape(NamedTuple):
    """What can be said of JSON before it is parsed."""

    elements: int
    """Values, those inside others included; of valid JSON at most one too many."""
    containers: int
    """Objects and lists."""
    too_deep: bool
    """Whether it nests deeper than was asked."""


def measure(body: bytes, depth: int = MAX_DEPTH) -> Shape:
    """Count values and levels in time linear in the bytes, with no Python code per byte, bracket or value.

    Args:
        depth: levels of objects and lists that are not too deep.
    """
    outside = _STRING.sub(b"", body)
    containers = outside.count(b"[") + outside.count(b"{")
    elements = containers + outside.count(b",") + 1
    if containers <= depth:
        return Shape(elements, containers, False)
    brackets = outside.translate(_ONE_KIND, _NO_BRACKETS)
    for _ in range(depth):  # each round takes the innermost pairs away
        shorter = brackets.replace(b"[]", b"")
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    # What is left over is deeper, or does not pair up, which the parser says.
    return Shape(elements, containers, b"[]" in brackets or brackets.count(b"[") > depth)


def _refuse(name: str) -> NoReturn:
    raise FrameError(
        f"a frame holds {name}, which is not JSON; see the page on serving for numbers that are not finite"
    )


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FrameError(f"a frame holds the number {text[:40]}, which no float can hold")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
"""One for all frames: making it takes as long as reading a short one."""
