"""Rules that read a request's tokens in their order: biased and banned sequences, repeated n-grams.

`apply_history` works on rows of bias that are then added to the logits: a ban is -inf there, as a ban by id is. The
tokens of a request lie in the history by slot and position, so that the rules can be asked at any position.

| tensor | shape | dtype |
|---|---|---|
| bias | [B, V] | float32, contiguous; written to |
| history | [slots, context] | int32: the token at each position of a slot's sequence, as far as it is known |
| tokens | [slots, capacity] | int32: the ids of a slot's sequences, one after the other |
| ends | [slots, capacity / 2 + 1] | int32: where each sequence begins; the next one's beginning is its end |
| values | [slots, capacity / 2] | float32: what is added for each sequence; those without tokens are none |
| ngrams | [slots] | int64, any stride: the n of n-grams that may not come twice; 0: off |
| slots, lengths | [B] | int64: each row's slot, and how many tokens its sequence has |

The CPU implementations define the result. On CUDA, sequences that are completed by the same token add in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.sampling.resolve import MAX_SEQUENCE_TOKENS

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "apply_history(Tensor(a!) bias, Tensor history, Tensor tokens, Tensor ends, Tensor values, Tensor ngrams, "
    "Tensor slots, Tensor lengths) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "remember(Tensor chosen, Tensor slots, Tensor lengths, Tensor(a!) history) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class History(NamedTuple):
    """The tables of all slots."""

    text: Tensor
    """int32 [slots, max_context]: each slot's tokens by position, the op's `history`."""
    tokens: Tensor
    """int32 [slots, MAX_SEQUENCE_TOKENS]."""
    ends: Tensor
    """int32 [slots, MAX_SEQUENCE_TOKENS / 2 + 1]."""
    values: Tensor
    """float32 [slots, MAX_SEQUENCE_TOKENS / 2]."""


def make_history(slots: int, max_context: int, device: torch.device) -> History:
    """Tables without any token or sequence."""
    most = MAX_SEQUENCE_TOKENS // 2
    widths = max_context, MAX_SEQUENCE_TOKENS, most + 1
    text, tokens, ends = (torch.zeros(slots, width, dtype=torch.int32, device=device) for width in widths)
    return History(text, tokens, ends, torch.zeros(slots, most, dtype=torch.float32, device=device))


def apply_history(
    bias: Tensor,
    history: Tensor,
    tokens: Tensor,
    ends: Tensor,
    values: Tensor,
    ngrams: Tensor,
    slots: Tensor,
    lengths: Tensor,
) -> None:
    """Add each sequence's value to the bias of its last token where the text ends with the tokens before it; then -inf
    for tokens that would repeat an n-gram. Ids of V and above are never chosen, and left out."""
    torch.ops.hybridgen.apply_history.default(bias, history, tokens, ends, values, ngrams, slots, lengths)


def remember(chosen: Tensor, slots: Tensor, lengths: Tensor, history: Tensor) -> None:
    """Write the chosen tokens (int64 [B]; -1: none, kept as 0) behind their sequences. Lengths of `context` and above
    are left out. To run again writes the same."""
    torch.ops.hybridgen.remember.default(chosen, slots, lengths, history)


def _apply_cpu(
    bias: Tensor,
    history: Tensor,
    tokens: Tensor,
    ends: Tensor,
    values: Tensor,
    ngrams: Tensor,
    slots: Tensor,
    lengths: Tensor,
) -> None:
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        text = history[slot, :length]
        _add_sequences(bias[row], text, tokens[slot], ends[slot], values[slot])
        size = int(ngrams[slot])
        if 0 < size <= len(text):
            _ban_repeats(bias[row], text, size)


def _add_sequences(bias: Tensor, text: Tensor, tokens: Tensor, ends: Tensor, values: Tensor) -> None:
    if not len(text):
        return
    # Most sequences differ from the text in the token before their last.
    likely = (ends[1:] > ends[:-1]) & (tokens[ends[1:] - 2] == text[-1])
    for index in likely.nonzero()[:, 0].tolist():
        start, end = int(ends[index]), int(ends[index + 1])
        before = tokens[start : end - 1]
        if len(before) <= len(text) and torch.equal(text[len(text) - len(before) :], before):
            bias[int(tokens[end - 1])] += values[index]


def _ban_repeats(bias: Tensor, text: Tensor, size: int) -> None:
    windows = text.unfold(0, size, 1)
    repeats = (windows[:, :-1] == text[len(text) - size + 1 :]).all(-1)
    banned = windows[repeats, -1].long()
    bias[banned[banned < bias.shape[0]]] = -torch.inf


def _remember_cpu(chosen: Tensor, slots: Tensor, lengths: Tensor, history: Tensor) -> None:
    inside = lengths < history.shape[1]
    history[slots[inside], lengths[inside]] = chosen.clamp(min=0).to(torch.int32)[inside]


def _apply_cuda(
    bias: Tensor,
    history: Tensor,
    tokens: Tensor,
    ends: Tensor,
    values: Tensor,
    ngrams: Tensor,
    slots: Tensor,
    lengths: Tensor,
) -> None:
    from hybridgen.kernels.sampling.history_kernels import launch_history

    launch_history(bias, history, tokens, ends, values, ngrams, slots, lengths)


def _remember_cuda(chosen: Tensor, slots: Tensor, lengths: Tensor, history: Tensor) -> None:
    from hybridgen.kernels.sampling.history_kernels import launch_remember

    launch_remember(chosen, slots, lengths, history)


def _no_output(*_: Tensor) -> None:
    return None


_library.impl("apply_history", _apply_cpu, "CPU")
_library.impl("apply_history", _apply_cuda, "CUDA")
_library.impl("remember", _remember_cpu, "CPU")
_library.impl("remember", _remember_cuda, "CUDA")
torch.library.register_fake("hybridgen::apply_history", _no_output, lib=_library)
torch.library.register_fake("hybridgen::remember", _no_output, lib=_library)
