"""Which earlier positions a layer's attention sees, read from the predicate that transformers itself would apply.

transformers describes a mask by a predicate over (batch, head, query position, key position). `read_visibility`
evaluates it up to the longest context and says which of the masks that our kernels run it is, or what it is instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Predicate = Callable[[Any, Any, Any, Any], Any]
"""`mask_function(batch, head, q, kv)` of transformers: whether the query at position q sees the key at position kv."""


@dataclass(frozen=True, slots=True)
class Visibility:
    """The positions that a query sees: all up to its own (causal), or fewer of them."""

    window: int = 0
    """Only the last so many, the own one included; 0 for no window."""
    chunk: int = 0
    """Only those in the query's own chunk: positions with the same `position // chunk` (Llama 4); 0 for no chunks."""

    @property
    def kind(self) -> str:
        """`causal`, `window` or `chunk`."""
        return "window" if self.window else "chunk" if self.chunk else "causal"

    @property
    def reach(self) -> int:
        """The most positions that a query can see; 0 for all."""
        return self.window or self.chunk

    def first(self, positions: Tensor) -> Tensor:
        """The first position that each query sees."""
        if self.chunk:
            return positions // self.chunk * self.chunk
        return (positions - self.window + 1).clamp(min=0) if self.window else torch.zeros_like(positions)

    def __str__(self) -> str:
        return f"{self.kind} {self.reach}" if self.reach else self.kind


CAUSAL = Visibility()

_WHOLE_ROWS = 2**21
"""Positions up to which whole rows are evaluated; only chosen pairs lie beyond."""


class UnknownMaskError(Exception):
    """A mask that no kernel here runs; the text says what was seen."""


def read_visibility(predicate: Predicate, context: int, heads: int, vmapped: bool = False) -> Visibility:
    """What a mask predicate lets queries see at positions below `context`.

    The last row and the step to the position before are evaluated in full, which gives the only candidate; that is
    then compared at some thousand pairs: a dense block at the start, the edges of every kind of mask, and random ones.

    Args:
        predicate: transformers' mask function. It is called with int64 vectors of equal length.
        context: the longest sequence.
        heads: query heads; the first and the last must see the same.
        vmapped: call it through `torch.vmap`, as transformers does where a model or a user brings one of their own.

    Raises:
        UnknownMaskError: it is not causal, windowed or chunked, or cannot be evaluated without a model's inputs.
    """
    context = min(max(context, 2), 2**62)
    whole = min(context, _WHOLE_ROWS)
    every = torch.arange(whole)
    last = every[-1:].expand(whole)

    def sees(q: Tensor, kv: Tensor, head: int = 0) -> Tensor:
        return _evaluate(predicate, q, kv, head, vmapped)

    newest = sees(last, every)
    before = sees(every[1:], every[:-1])
    candidate = _candidate(newest, before)
    _compare(last, every, newest, candidate)
    _compare(every[1:], every[:-1], before, candidate)
    q, kv = _pairs(candidate, context)
    for head in {0, max(0, heads - 1)}:
        _compare(q, kv, sees(q, kv, head), candidate)
    return candidate


def _evaluate(predicate: Predicate, q: Tensor, kv: Tensor, head: int, vmapped: bool) -> Tensor:
    batch, heads = torch.zeros_like(q), torch.full_like(q, head)
    try:
        if vmapped:
            # Lets a predicate index a tensor with its vmapped arguments; transformers does the same.
            from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

            with TransformGetItemToIndex():
                found = torch.vmap(predicate)(batch, heads, q, kv)
        else:
            found = predicate(batch, heads, q, kv)
        found = torch.as_tensor(found)
        if found.dtype is not torch.bool:
            raise UnknownMaskError(f"its mask function gives {found.dtype} values instead of true and false")
        return found.expand(q.shape).cpu()
    except UnknownMaskError:
        raise
    except Exception as error:  # a predicate is anybody's code: whatever it raises, it cannot be read
        raise UnknownMaskError(
            f"its mask depends on more than positions: evaluated alone, it raises {type(error).__name__}: {error}"
        ) from error


def _candidate(newest: Tensor, before: Tensor) -> Visibility:
    """The only mask of a kind we know that has this last row and this sight of the position before."""
    gaps = (~before).nonzero()
    if len(gaps):
        step = int(gaps[0]) + 1  # the first position that does not see the one before
        return Visibility(chunk=step) if step > 1 else Visibility(window=1)
    seen = newest.nonzero()
    first = int(seen[0]) if len(seen) else len(newest) - 1
    return Visibility(window=len(newest) - first) if first else CAUSAL


def _pairs(candidate: Visibility, context: int) -> tuple[Tensor, Tensor]:
    """Pairs (q, kv) at which a mask of another kind would differ."""
    edges = {0, 1, 2, context // 2, context - 2, context - 1}
    sizes = {2**power for power in range(context.bit_length())}
    if candidate.reach:
        sizes |= {candidate.reach * factor for factor in (1, 2, 3, context // candidate.reach)}
    edges |= {size + offset for size in sizes for offset in (-1, 0, 1)}
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor(sorted(edge for edge in edges if 0 <= edge < context))
    rows = torch.cat([rows, torch.randint(context, (64,), generator=generator)])
    first = candidate.first(rows)
    near = [rows + offset for offset in (-2, -1, 0, 1, 2)] + [first + offset for offset in (-1, 0, 1)]
    far = [torch.zeros_like(rows), torch.full_like(rows, context - 1)]
    anywhere = [torch.randint(context, rows.shape, generator=generator) for _ in range(8)]
    kv = torch.cat(near + far + anywhere)
    q = rows.repeat(len(kv) // len(rows))
    block = torch.arange(min(context, 64))
    q, kv = torch.cat([q, block.repeat_interleave(len(block))]), torch.cat([kv, block.repeat(len(block))])
    inside = (kv >= 0) & (kv < context)
    return q[inside], kv[inside]


def _compare(q: Tensor, kv: Tensor, found: Tensor, candidate: Visibility) -> None:
    later = (found & (kv > q)).nonzero()
    if len(later):
        pair = later[0]
        raise UnknownMaskError(
            f"its attention is not causal: position {int(q[pair])} sees the later position {int(kv[pair])}"
        )
    wrong = (found != ((kv <= q) & (kv >= candidate.first(q)))).nonzero()
    if len(wrong):
        pair = wrong[0]
        verb = "sees" if found[pair] else "does not see"
        raise UnknownMaskError(
            f"its mask is not causal, a sliding window or chunks: position {int(q[pair])} {verb} position "
            f"{int(kv[pair])}, unlike in a mask of kind {str(candidate)!r}, which is the nearest"
        )
