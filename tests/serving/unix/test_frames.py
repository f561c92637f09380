"""Frames and their JSON: what is cut right, and what is refused."""

from __future__ import annotations

import json
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridgen.serving.unix.frames import MAX_DEPTH, FrameError, FrameReader, decode, encode, measure

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40)
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
def test_no_input_takes_quadratic_time(piece: bytes) -> None:
    """It would be hours for this size."""
    with pytest.raises(FrameError):
        decode(piece * (2**21 // len(piece)))


@pytest.mark.parametrize("depth", [1, 3, 16])
def test_depth_is_exact(depth: int) -> None:
    def levels(value: object) -> int:
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(levels, inner), default=0)

    for left, right in ((b"[", b"]"), (b'{"a":', b"}"), (b'[{"b":[],"a":', b"}]")):
        for pairs in range(1, 20):
            for inner in (b"1", b"[]", b'"]]"', b'"\\"[["'):
                body = left * pairs + inner + right * pairs
                assert measure(body, depth).too_deep == (levels(json.loads(body)) > depth), body


@settings(max_examples=40)
@given(values)
def test_values_are_counted(value: object) -> None:
    def count(item: object) -> tuple[int, int]:
        inner = list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []
        parts = [count(part) for part in inner]
        return 1 + sum(part[0] for part in parts), isinstance(item, (dict, list)) + sum(part[1] for part in parts)

    elements, containers = count(value)
    shape = measure(json.dumps(value).encode())
    assert shape.containers == containers
    assert elements <= shape.elements <= elements + containers  # an empty list has no value, and no comma


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        (b"[],", "values"),
        (b"{},", "values"),
        (b"1,", "values"),
        (b'"",', "values"),
        (b'"\\"",', "values"),
        (b'"\\\\",', "values"),
        (b'{"a":1,"b":2,"c":3},', "values"),
        (b"[[[[[[1]]]]]],", "values"),
    ],
)
def test_too_many_values(piece: bytes, words: str) -> None:
    reader = FrameReader(2**22, elements=1000, containers=100)

    def frame(count: int) -> bytes:
        body = b'{"x":[' + piece * count + b"1]}"
        return struct.pack(">I", len(body)) + body

    assert len(reader.feed(frame(15))) == 1
    with pytest.raises(FrameError, match=words):
        reader.feed(frame(2**20 // len(piece)))
    with pytest.raises(FrameError, match=r"values|objects and lists"):
        FrameReader(2**22, elements=1000, containers=10).feed(frame(2**20 // len(piece)))


def test_too_many_lists() -> None:
    body = b'{"x":[' + b"[]," * 98 + b"1]}"
    assert decode(body, elements=1000, containers=100)
    with pytest.raises(FrameError, match="101 objects and lists, over the limit of 100"):
        decode(body.replace(b"1]}", b"[]]}"), elements=1000, containers=100)


def test_text_counts_as_one_value() -> None:
    message = {"prompt": "[],{}:1,2,3" * 10_000 + '\\"' * 10_000}
    assert decode(json.dumps(message).encode(), elements=3, containers=1) == message


def test_sizes_are_those_of_the_frames() -> None:
    frames = [encode({"a": "x" * length}) for length in (0, 10, 1000)]
    assert [size for _, size in FrameReader(2000).feed_sized(b"".join(frames))] == [len(frame) for frame in frames]


def test_encode_refuses_what_json_lacks() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            encode({"a": value})
