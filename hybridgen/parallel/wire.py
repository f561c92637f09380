"""Messages from rank 0 to the other ranks: a kind, a small JSON head, and int64 arrays. No code is ever read.

| kind | head | arrays |
|---|---|---|
| `ALLOCATE` | pages | |
| `ADMIT` | slot, sampling | pages, prompt |
| `STEP` | how it runs: `Told` | of a decode step its slots; of a prefill chunks [n, 9], tokens, targets |
| `REPEAT` | | |
| `PADDING` | key, whether layers are compiled by it | |
| `RECORD` | key, whether while idle | |
| `RELEASE` | key | |
| `END` | | |
| `COMPARE` | | |
| `FUSE` | longest context, whether with equal bits | |
| `RESULT` | a part of a call's result as JSON text, and whether more follows | |
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.graphs import GraphKey
from hybridgen.models.attention import Phase
from hybridgen.sampling import ResolvedSampling, SamplerPlan

_HEADER = struct.Struct("<IIII")
_CHUNK_FIELDS = 9


class Kind(IntEnum):
    """What a message asks for."""

    ALLOCATE = 1
    ADMIT = 2
    STEP = 3
    REPEAT = 4
    PADDING = 5
    RECORD = 6
    RELEASE = 7
    END = 8
    COMPARE = 9
    RESULT = 10
    FUSE = 11


class Message(NamedTuple):
    """A message that was read."""

    kind: Kind
    head: Any
    arrays: list[np.ndarray]


class Told(NamedTuple):
    """How rank 0's router runs a step: what a rank needs of a `Route`."""

    key: GraphKey
    recorded: bool
    """Whether a recording of this key is replayed."""
    finish: SamplerPlan | None
    """What samples behind it, where it ends at the logits."""
    rows: int
    """Rows that belong to requests."""
    own: bool = False
    """Whether some row has functions or a grammar, which rank 0 alone has: its tokens are everybody's."""


def pack(kind: Kind, head: Any = None, arrays: Sequence[Sequence[int] | np.ndarray] = ()) -> bytes:
    """A message as bytes."""
    text = b"" if head is None else json.dumps(head).encode()
    values = [np.asarray(array, dtype=np.int64) for array in arrays]
    sizes = struct.pack(f"<{len(values)}I", *(value.size for value in values))
    header = _HEADER.pack(kind, len(text), len(values), 0)
    return b"".join([header, sizes, text, *(value.tobytes() for value in values)])


def unpack(message: bytes) -> Message:
    """What `pack` was given; arrays are flat."""
    kind, length, count, _ = _HEADER.unpack_from(message)
    place = _HEADER.size
    sizes = struct.unpack_from(f"<{count}I", message, place)
    place += 4 * count
    head = json.loads(message[place : place + length]) if length else None
    place += length
    arrays = []
    for size in sizes:
        arrays.append(np.frombuffer(message, dtype=np.int64, count=size, offset=place))
        place += 8 * size
    return Message(Kind(kind), head, arrays)


def admission_message(admission: Admission) -> bytes:
    """A request gets a slot. What is its own stays behind."""
    sampling = asdict(replace(admission.sampling, logits_processors=(), stopping_criteria=(), constraint=None))
    head = {"slot": admission.slot, "sampling": sampling}
    return pack(Kind.ADMIT, head, (list(admission.pages), list(admission.prompt_ids)))


def read_admission(message: Message) -> Admission:
    """What `admission_message` was given."""
    sampling = ResolvedSampling(**{name: _tuples(value) for name, value in message.head["sampling"].items()})
    pages, prompt = message.arrays
    return Admission(int(message.head["slot"]), pages.tolist(), sampling, prompt.tolist())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def key_head(key: GraphKey) -> list[Any]:
    """A key as JSON has it."""
    plan = None if key.sampler is None else list(key.sampler)
    return [key.executor, key.phase, key.rows, key.tokens, key.query_len, plan, key.quiet]


def read_key(head: Sequence[Any]) -> GraphKey:
    """What `key_head` was given."""
    executor, phase, rows, tokens, query_len, sampler, quiet = head
    return GraphKey(executor, Phase(phase), rows, tokens, query_len, _plan(sampler), quiet)


def _plan(head: Sequence[Any] | None) -> SamplerPlan | None:
    return None if head is None else SamplerPlan(*head)


def step_message(told: Told, slots: Sequence[int], chunks: Sequence[PrefillChunk]) -> bytes:
    """A step: of a decode step its slots, of a prefill its chunks. Hidden states are taken on rank 0 alone."""
    finish = None if told.finish is None else list(told.finish)
    head = {"key": key_head(told.key), "recorded": told.recorded, "finish": finish, "rows": told.rows}
    head["own"] = told.own
    if told.key.phase is Phase.DECODE:
        return pack(Kind.STEP, head, (list(slots),))
    table: list[int] = []
    tokens: list[int] = []
    targets: list[int] = []
    for chunk in chunks:
        table += (chunk.slot, chunk.start, chunk.rope_length, chunk.generated, chunk.last)
        table += (len(chunk.tokens), len(chunk.targets), len(chunk.others), chunk.likely)
        tokens += chunk.tokens
        targets += (*chunk.targets, *chunk.others)
    return pack(Kind.STEP, head, (table, tokens, targets))


def read_step(message: Message) -> tuple[Told, tuple[int, ...], list[PrefillChunk]]:
    """What `step_message` was given."""
    head = message.head
    told = Told(read_key(head["key"]), head["recorded"], _plan(head["finish"]), head["rows"], head["own"])
    if told.key.phase is Phase.DECODE:
        return told, tuple(message.arrays[0].tolist()), []
    table, tokens, targets = (array.tolist() for array in message.arrays)
    chunks = []
    fed = scored = 0
    for first in range(0, len(table), _CHUNK_FIELDS):
        slot, start, rope, generated, last, count, wanted, more, likely = table[first : first + _CHUNK_FIELDS]
        own, its = tokens[fed : fed + count], tuple(targets[scored : scored + wanted + more])
        chunk = PrefillChunk(slot, own, start, rope, generated, bool(last), its[:wanted], its[wanted:], likely)
        chunks.append(chunk)
        fed += count
        scored += wanted + more
    return told, (), chunks
