"""The op `hybridgen::rotate_and_write`: what lies between a step's projections and its attention, in one pass.

| tensor | shape | dtype |
|---|---|---|
| q | [T, Hq, D] | float32, bfloat16 or float16 |
| k, v | [T, Hkv, D], [T, Hkv, Dv] | as q |
| cos, sin | [T, R], R even and at most D, rows contiguous; or [T, R / 2] | any float |
| q_weight, k_weight | [D] | any float |
| k_pages, v_pages, block_table, slots, positions | see `hybridgen.kernels.attention.ops` | |

q, k and v may be views with any strides over tokens and heads. Heads are normalised where a weight is given,
`x / sqrt(mean(x^2) + eps) * (weight + shift)`, and then rotated: of the first R dimensions, the two halves against each
other, as in Llama (RoFormer, arXiv:2104.09864). All of it is computed in float32 and rounded once.

Compiled from the model's own code these are three kernels or more: K goes to memory and back before it is written to
its pages.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridgen.kernels.attention.ops import Places, on_device_of
from hybridgen.kernels.attention.reference import write_kv

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "rotate_and_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, "
    "float q_eps, float k_eps, float shift, bool half, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, "
    "Tensor slots, Tensor positions) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class HeadNorms(NamedTuple):
    """How heads are normalised before they are rotated."""

    q_weight: Tensor | None = None
    """None: they are not."""
    k_weight: Tensor | None = None
    q_eps: float = 0.0
    k_eps: float = 0.0
    shift: float = 0.0
    """What is added to both weights: 1 for Gemma's."""
    half: bool = False
    """Not of norms: cos and sin have R / 2 columns, of which both halves take the same (GPT-OSS)."""


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms, places: Places
) -> Tensor:
    """Normalise and rotate queries and keys; write keys and values to their pages, as `write_kv` does.

    Returns:
        The queries, [T, Hq, D], contiguous.
    """
    return torch.ops.hybridgen.rotate_and_write.default(q, k, v, cos, sin, *norms, *places)


def turned(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, shift: float, half: bool = False
) -> Tensor:
    """Heads [T, H, D], normalised and rotated, in plain torch."""
    if half:
        cos, sin = (torch.cat((table, table), -1) for table in (cos, sin))
    rows = x.float()
    if weight is not None:
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps) * (weight.float() + shift)
    turns = cos.shape[-1] // 2
    first, second, rest = rows.split([turns, turns, rows.shape[-1] - 2 * turns], -1)
    (cos_first, cos_second), (sin_first, sin_second) = (
        table.float()[:, None].split([turns, turns], -1) for table in (cos, sin)
    )
    parts = first * cos_first - second * sin_first, second * cos_second + first * sin_second, rest
    return torch.cat(parts, -1).to(x.dtype)


def rotate_and_write_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_eps: float,
    k_eps: float,
    shift: float,
    half: bool,
    *places: Tensor,
) -> Tensor:
    """`rotate_and_write` in torch operators."""
    write_kv(turned(k, cos, sin, k_weight, k_eps, shift, half), v, *places)
    return turned(q, cos, sin, q_weight, q_eps, shift, half)


def _rotate_and_write_cuda(q: Tensor, *args: Any) -> Tensor:
    from hybridgen.kernels.attention.rotary_kernels import rotate_and_write as launch

    with on_device_of(q):
        return launch(q, *args)


def _rotate_and_write_fake(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape)


_library.impl("rotate_and_write", rotate_and_write_on_cpu, "CPU")
_library.impl("rotate_and_write", _rotate_and_write_cuda, "CUDA")
torch.library.register_fake("hybridgen::rotate_and_write", _rotate_and_write_fake, lib=_library)
