"""Log-probabilities of given tokens: the op `hybridgen::token_logprobs`.

| tensor | shape | dtype |
|---|---|---|
| logits | [K, V] | bfloat16, float16 or float32 on CUDA, any floating type on a CPU |
| targets | [K] | int64, below V |
| logprobs | [K] | float32: the natural logarithm of softmax at each target |
| top ids | [K, max(k, 1)] | int64: the most likely ids, most likely first, of equal ones the lowest first |
| top log-probabilities | [K, max(k, 1)] | float32, as exact as those of the targets |

Everything is computed in float32 from the logits as they are. Nothing of [K, V] in float32 is made: the CPU's
implementation takes a few rows at a time, the CUDA kernel reads each row once with a running maximum and sum (online
softmax, Milakov and Gimelshein 2018, arXiv:1805.02867). A target's number is the same bits as its number among the most
likely ones. Where more ids share the k-th place than fit, which of them are told is open; the first is always the one
that greedy decoding takes. A NaN in a row makes all its numbers NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 16
"""Rows that the CPU takes at a time."""

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "token_logprobs(Tensor logits, Tensor targets, int k) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def token_logprobs(logits: Tensor, targets: Tensor, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, and the k most likely ids of each row with theirs; see the module.

    Raises:
        ValueError: the shapes do not fit, or k is above V.
        TypeError: on CUDA, the logits are of another type than the kernel takes.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {list(logits.shape)} and targets {list(targets.shape)}; give [K, V] and [K]")
    if not 0 <= k <= logits.shape[1]:
        raise ValueError(f"k={k}; give 0 to {logits.shape[1]}")
    return torch.ops.hybridgen.token_logprobs.default(logits, targets, k)  # type: ignore[no-any-return]


def in_order(values: Tensor, ids: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely ones of `topk`, equal ones by id, with the one that greedy decoding takes in front.

    Args:
        values, ids: [K, k].
        best: int64 [K], the lowest id of the largest logit.
    """
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    ids[:, 0] = best
    return values, ids


def _cpu(logits: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = logits.shape[0], max(k, 1)
    found = torch.empty(rows, dtype=torch.float32)
    top_ids = torch.empty(rows, width, dtype=torch.int64)
    top = torch.empty(rows, width, dtype=torch.float32)
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        values = logits[part].float()
        total = values.logsumexp(-1)
        found[part] = values.gather(-1, targets[part, None])[:, 0] - total
        largest, ids = values.topk(width)
        largest, top_ids[part] = in_order(largest, ids, values.argmax(-1))
        top[part] = largest - total[:, None]
    return found, top_ids, top


def _cuda(logits: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    from hybridgen.kernels.scoring.logprobs_kernels import launch

    return with_likely(logits, k, *launch(logits, targets))


def with_likely(
    logits: Tensor, k: int, found: Tensor, best: Tensor, best_found: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns, from what the kernel computed of each row: float32 [K], `best` int64.

    Args:
        found: of the targets.
        best, best_found: the most likely id and its log-probability.
        totals: the logarithm of the sum of exponentials.
    """
    if k <= 1:
        return found, best[:, None], best_found[:, None]
    values, ids = in_order(*logits.topk(k), best)
    return found, ids, values.float() - totals[:, None]


def _fake(logits: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = logits.shape[0], max(k, 1)
    return (
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, width, dtype=torch.int64),
        logits.new_empty(rows, width, dtype=torch.float32),
    )


_library.impl("token_logprobs", _cpu, "CPU")
_library.impl("token_logprobs", _cuda, "CUDA")
torch.library.register_fake("hybridgen::token_logprobs", _fake, lib=_library)
