"""What is recorded: buckets that other sizes are padded to, and what recordings may cost."""

from __future__ import annotations

from dataclasses import dataclass

from hybridgen.models.attention import Phase

USUAL_PROMPT = 512
"""Prefill buckets are close together up to here. Above it there are few, whose recordings end at the logits and are for
many prompts: such calls have several, and what is launched behind them costs nothing beside them."""
_LARGE = (1024, 2048, 4096)
FEW_PROMPTS = 8
"""Prompts that a prefill graph with its sampler outside can have: their logits cost little more than one's."""
MANY_PROMPTS = 64
"""The same of a graph of more than 512 tokens: calls of 8192 often have 16 prompts and more."""


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """What is recorded and what it may cost; see the fields of `EngineConfig`."""

    decode: tuple[int, ...] = ()
    """Buckets of decode rows; empty: decode is not recorded."""
    prefill: tuple[int, ...] = ()
    """Buckets of prefill tokens; empty: prefill is not recorded."""
    no_prefill: str = "it has no buckets"
    """Why, where it is not."""
    max_rows: int
    """Rows that a step samples at most."""
    max_graphs: int = 128
    max_bytes: int | None = None
    max_padding_ratio: float | None = None
    lazy: bool = True
    capture_after: int = 3
    sample_in_graph: bool = True
    """Record sampling too; else recordings end at the logits."""
    named: frozenset[Phase] = frozenset()
    """Phases whose buckets the user named: all of those are recorded at warm-up, whatever earlier processes used."""
    improves: bool = True
    """Record also what would serve steps better that another recording serves."""
    exact_when_lazy: bool = False
    """Record decode sizes between the buckets as they are."""


def decode_buckets(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then in steps of 8 to 64 and of 16 above; ends with `max_batch`."""
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, max_batch + 16, 16))
    return (*(size for size in sizes if size < max_batch), max_batch)


def prefill_buckets(most: int, worth: int = 0) -> tuple[int, ...]:
    """In steps of 16 to 256 and of 32 to 512; then 1024, 2048, 4096 and `most` itself.

    Args:
        most: tokens that a call can have.
        worth: above 512, the largest for which a recording is worth while.
    """
    small = (*range(16, 256, 16), *range(256, USUAL_PROMPT + 1, 32))
    large = sorted({size for size in (*_LARGE, most) if USUAL_PROMPT < size <= worth})
    return tuple(size for size in (*small, *large) if size <= most)
