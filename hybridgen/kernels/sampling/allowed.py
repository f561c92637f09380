"""Leave only some tokens of some rows: the op `hybridgen::keep_allowed`.

| tensor | shape | dtype |
|---|---|---|
| logits | [B, V] | bfloat16, float16 or float32 on CUDA, any floating type on a CPU |
| rows | [G] | int64, below B, each at most once: the rows that are changed; below 0: none |
| bits | [G, W], W * 32 >= V, contiguous | int32: a bit for each token that stays, the lowest bit of a word first |

The others become -inf, in place; on CUDA, columns lie beside each other. NaN stays NaN, so that a row that the model
failed at is not taken for one with nothing left. Rows that are not named keep every bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "keep_allowed(Tensor(a!) logits, Tensor rows, Tensor bits) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def keep_allowed(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Set the logits of tokens whose bit is 0 to -inf; see the module.

    Raises:
        ValueError: the shapes do not fit.
        TypeError: on CUDA, the logits are of another type than the kernel takes.
    """
    fits = logits.dim() == 2 and bits.dim() == 2 and rows.shape == bits.shape[:1]
    if not fits or bits.shape[1] * 32 < logits.shape[1]:
        raise ValueError(
            f"logits {list(logits.shape)}, rows {list(rows.shape)} and bits {list(bits.shape)}; "
            "give [B, V], [G] and [G, V / 32 or more]"
        )
    torch.ops.hybridgen.keep_allowed.default(logits, rows, bits)


def _cpu(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    named = rows >= 0
    rows, bits = rows[named], bits[named]
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    allowed = ((bits[:, :, None] >> places) & 1).bool().flatten(1)[:, : logits.shape[1]]
    scores = logits[rows]
    logits[rows] = torch.where(allowed | scores.isnan(), scores, -torch.inf)


def _cuda(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    from hybridgen.kernels.sampling.allowed_kernels import launch

    launch(logits, rows, bits)


def _fake(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    return None


_library.impl("keep_allowed", _cpu, "CPU")
_library.impl("keep_allowed", _cuda, "CUDA")
torch.library.register_fake("hybridgen::keep_allowed", _fake, lib=_library)
