"""Frames and their JSON: what is cut right, and what is refused."""

from __future__ import annotations

import json
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridgen.serving.frames import MAX_DEPTH, FrameError, FrameReader, decode, encode

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=5), st.randoms())
def test_any_cut_gives_the_same_messages(messages: list[dict[str, object]], chance: random.Random) -> None:
    data = b"".join(map(encode, messages))
    reader, found = FrameReader(2**20), []
    while data:
        size = chance.randint(1, len(data))
        found += reader.feed(data[:size])
        data = data[size:]
    assert found == messages
    assert not reader.partial


def test_a_length_over_the_limit_is_refused_before_the_body() -> None:
    reader = FrameReader(1000)
    with pytest.raises(FrameError, match="1001 bytes is over the limit of 1000"):
        reader.feed(struct.pack(">I", 1001))
    assert FrameReader(1000).feed(struct.pack(">I", 1000)) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not UTF-8 JSON"),
        (b"{", "not UTF-8 JSON"),
        (b"\xff\xfe{}", "not UTF-8 JSON"),
        (b"[]", "not an object"),
        (b"17", "not an object"),
        (b'{"a": NaN}', "NaN, which is not JSON"),
        (b'{"a": -Infinity}', "-Infinity, which is not JSON"),
        (b'{"a": 1e999}', "no float can hold"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not UTF-8 JSON"),
        (b'{"a": ' + b"[" * 16 + b"]" * 16 + b"}", "nests more"),
        (b"[" * 100_000, "nests more"),
        (b'{"a":' * 100_000, "nests more"),
    ],
)
def test_bodies_that_are_refused(body: bytes, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        decode(body)


def test_brackets_in_strings_are_no_depth() -> None:
    message = {"prompt": "[{" * 1000 + '\\"]' * 100, "list": [[1]] * 100}
    assert decode(json.dumps(message).encode()) == message
    deep = b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert decode(deep)


@pytest.mark.parametrize("piece", [b'"', b'"\\"', b"\\", b'\\"', b"[", b'"[', b'["\\', b'{"'])
@pytest.mark.timeout(60)
def test_no_input_takes_quadratic_time(piece: bytes) -> None:
    """It would be hours for this size."""
    with pytest.raises(FrameError):
        decode(piece * (2**21 // len(piece)))


def test_encode_refuses_what_json_lacks() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            encode({"a": value})
