"""What rank 0 tells the others arrives as it was."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import pytest

from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.graphs import GraphKey
from hybridgen.parallel import wire
from hybridgen.parallel.channel import Channel, arrivals
from hybridgen.params import SamplingParams
from hybridgen.sampling import SamplerPlan, resolve


def nothing() -> None:
    return None


def test_messages_of_all_sizes_go_around_the_ring_in_order(tmp_path: Path) -> None:
    numbers = random.Random(3)
    writer = Channel(tmp_path / "memory", 3, 1000, create=True)
    readers = [Channel(tmp_path / "memory", 3, 1000) for _ in range(2)]
    for _ in range(500):
        message = numbers.randbytes(numbers.randrange(400))
        writer.write(message, nothing)
        assert [reader.read(rank) for rank, reader in enumerate(readers, 1)] == [message] * 2
    with pytest.raises(ValueError, match="does not fit"):
        writer.write(bytes(1000), nothing)


def test_nothing_is_overwritten_that_a_rank_has_not_read(tmp_path: Path) -> None:
    writer = Channel(tmp_path / "memory", 2, 1024, create=True)
    reader = Channel(tmp_path / "memory", 2, 1024)
    waited = []

    def wait() -> None:
        waited.append(reader.read(1))

    messages = [bytes([number]) * 300 for number in range(20)]
    for message in messages:
        writer.write(message, wait)
    while len(waited) < len(messages):
        waited.append(reader.read(1))
    assert waited == messages


def test_each_byte_announces_a_message_and_the_end_ends() -> None:
    out, into = os.pipe()
    os.write(into, b"mm")
    os.close(into)
    assert len(list(arrivals(out))) == 2
    os.close(out)


def test_an_admission() -> None:
    params = SamplingParams(
        temperature=0.7,
        seed=2**63 - 1,
        logit_bias={3: -math.inf, 5: 0.1},
        sequence_bias={(1, 2): 1.5},
        stop=["x"],
        max_new_tokens=5,
    )
    sampling = resolve(params, None, (7,), 100)
    given = Admission(2, [3, 1, 4], sampling, [9] * 5)
    assert wire.read_admission(wire.unpack(wire.admission_message(given))) == given


def test_steps() -> None:
    sampler = SamplerPlan(sample=True, ranked=64, logprobs=0)
    told = wire.Told(GraphKey.decode(4, None, query_len=4, quiet=True), True, sampler, 3, own=True)
    assert wire.read_step(wire.unpack(wire.step_message(told, (2, 0, 1), ()))) == (told, (2, 0, 1), [])
    chunks = [
        PrefillChunk(0, [1, 2, 3], 0, 3, 0, True, (2, 3), (7, 8), 4),
        PrefillChunk(1, [7], 16, 40, 2, False),
        PrefillChunk(2, [8, 9], 0, 2, 0, True, (9,)),
    ]
    told = wire.Told(GraphKey.prefill(16, 2, sampler), False, None, 2)
    assert wire.read_step(wire.unpack(wire.step_message(told, (), chunks))) == (told, (), chunks)
