"""What is recorded, when, and how recordings are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hybridgen.config.modes import GraphOwner
from hybridgen.config.settings import (
    check_buckets,
    check_ratio,
    integer,
    one_of,
    parse_bytes,
    setting,
    switch,
)


@dataclass(frozen=True, kw_only=True)
class RecordingFields:
    """Fields of `EngineConfig`."""

    graphs: GraphOwner | str = field(
        default=GraphOwner.MANUAL,
        metadata=setting(
            "Who records steps in modes `graph` and `hybrid`: `manual`, or in `hybrid` also `trees` or `both`.",
            one_of(GraphOwner),
        ),
    )
    decode_buckets: Sequence[int] | None = field(
        default=None,
        metadata=setting(
            "Batch sizes of decode graphs; other sizes are padded to the next. An empty list: decode is "
            "not recorded. Else 1, 2, 4, 8, then steps of 8 to 64 and of 16 above, up to max_batch.",
            check_buckets,
            in_key=False,
        ),
    )
    prefill_buckets: Sequence[int] | None = field(
        default=None,
        metadata=setting(
            "Prompt lengths of prefill graphs. An empty list: prefill is not recorded. Else steps of 16 "
            "to 256 and of 32 to 512, and on CUDA 1024, 2048, 4096 and the token budget's size, as far as launches "
            "can keep the device waiting there: more for small models.",
            check_buckets,
            in_key=False,
        ),
    )
    capture_at_start: bool = field(
        default=True,
        metadata=setting(
            "Record all buckets for greedy decoding and for the model's own sampling at warm-up; else "
            "only while idle. Where the compile cache knows what earlier processes used, that alone is "
            "recorded at warm-up, and all sizes of `decode_buckets` and `prefill_buckets` where they are "
            "given; everything is with `lazy_capture=False`.",
            switch,
            in_key=False,
        ),
    )
    lazy_capture: bool = field(
        default=True,
        metadata=setting(
            "Record what was missing when nothing runs: at the end of a call, one graph per call.", switch, in_key=False
        ),
    )
    capture_after: int = field(
        default=3,
        metadata=setting(
            "Steps that a missing graph must have been wanted for before it is recorded.", integer(1), in_key=False
        ),
    )
    sample_in_graph: bool = field(
        default=True,
        metadata=setting(
            "Record sampling and the step's end too. Else, and for sampling that no graph has, a graph "
            "ends at the logits.",
            switch,
        ),
    )
    max_graphs: int = field(
        default=128,
        metadata=setting(
            "Graphs that are kept; the least recently used is dropped before another is captured.",
            integer(1),
            in_key=False,
        ),
    )
    max_graph_memory: int | str | None = field(
        default=None,
        metadata=setting(
            'Bytes that the captures of the graphs kept may have taken, or a text such as "512MiB"; above '
            "it the least recently used is dropped. Graphs share a pool of memory: what one took from it "
            "is for the others when it is dropped. With the last graph the pool goes, and its memory goes "
            "back to the device.",
            parse_bytes,
            in_key=False,
        ),
    )
    max_padding_ratio: float | None = field(
        default=None,
        metadata=setting(
            "Padding to a bucket up to this share of a step's size (1 doubles it). Else what the measured times say.",
            check_ratio,
            in_key=False,
        ),
    )
    validate: bool = field(
        default=False,
        metadata=setting(
            "Compare the first replay of each graph with the step run without it, bit for bit; a graph "
            "that differs is not used.",
            switch,
            in_key=False,
        ),
    )
    check_addresses: bool = field(
        default=False,
        metadata=setting(
            "Before each replay, check that no tensor that it reads has moved (for debugging; costs time).",
            switch,
            in_key=False,
        ),
    )
    metadata_copy: bool = field(
        default=True,
        metadata=setting(
            "Copy a step's metadata in one launch (`hybridgen::copy_metadata`); else tensor by tensor.", switch
        ),
    )
    double_buffer: bool = field(
        default=True,
        metadata=setting(
            "Two host blocks of metadata in turn, so that the next is filled while one is copied; else one.",
            switch,
            in_key=False,
        ),
    )
