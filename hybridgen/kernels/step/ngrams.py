"""Drafts from a row's own text: the op `hybridgen::draft_ngrams` (prompt lookup decoding, github.com/apoorvumang).

The end of a row's text is looked for earlier in it, and what came behind it there is the draft. Of all earlier places
the one counts whose tokens before it agree with the end for longest, and of those the last.

| tensor | shape | dtype |
|---|---|---|
| text | [slots, context], contiguous | int32: each slot's tokens by position |
| slots, lengths | [B] | int64: each row's slot, and how many tokens its text has |
| result | [B, count] | int64: the drafts; -1 in all places where no earlier place agrees |

A draft that reaches the end of the text goes on with what was drafted before, as a text that repeats itself does. Rows
are independent of each other, and grids follow from shapes alone, so that a step can be recorded. The CPU
implementation defines the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "draft_ngrams(Tensor text, Tensor slots, Tensor lengths, int shortest, int longest, int count) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def draft_ngrams(text: Tensor, slots: Tensor, lengths: Tensor, shortest: int, longest: int, count: int) -> Tensor:
    """Draft `count` tokens behind each row's text.

    Args:
        shortest: tokens that have to agree.
        longest: tokens that are compared at most.
    """
    return torch.ops.hybridgen.draft_ngrams.default(text, slots, lengths, shortest, longest, count)


def _draft_cpu(text: Tensor, slots: Tensor, lengths: Tensor, shortest: int, longest: int, count: int) -> Tensor:
    drafts = torch.full((slots.shape[0], count), -1, dtype=torch.int64)
    steps = torch.arange(count)
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        own = text[slot, : min(length, text.shape[1])]
        place = _best_place(own, shortest, longest)
        if place:
            drafts[row] = own[place + steps % (len(own) - place)]
    return drafts


def _best_place(text: Tensor, shortest: int, longest: int) -> int:
    """Where what came behind the end of the text earlier begins; 0 for nowhere."""
    end = len(text)
    if end < 2:
        return 0
    agree = torch.zeros(end, dtype=torch.int64)
    going = torch.ones(end, dtype=torch.bool)
    going[0] = False
    for back in range(1, min(longest, end - 1) + 1):
        going[:back] = False
        going[back:] &= text[: end - back] == text[end - back]
        if not bool(going.any()):
            break
        agree += going
    best = int(agree.max())
    return 0 if best < shortest else int((agree == best).nonzero()[-1, 0])


def _draft_cuda(text: Tensor, slots: Tensor, lengths: Tensor, shortest: int, longest: int, count: int) -> Tensor:
    from hybridgen.kernels.step.ngrams_kernels import launch_ngrams

    return launch_ngrams(text, slots, lengths, shortest, longest, count)


def _draft_fake(text: Tensor, slots: Tensor, lengths: Tensor, shortest: int, longest: int, count: int) -> Tensor:
    return slots.new_empty((slots.shape[0], count))


_library.impl("draft_ngrams", _draft_cpu, "CPU")
_library.impl("draft_ngrams", _draft_cuda, "CUDA")
torch.library.register_fake("hybridgen::draft_ngrams", _draft_fake, lib=_library)
