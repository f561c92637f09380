"""Torch's own product with int4 weights on a CPU, for few rows: it reads codes, where dequantising writes all values.

Torch wants them in an order of its own, so that each weight is kept a second time, made at its first product and given
up with it. Of a weight of 4096 x 4096 and one row it takes 1 to 5 ms in bfloat16 with one thread of a server's
processor, and 68 in float32, where dequantising takes 500 and more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hybridgen.kernels.linear.layout import INT4_ZERO, unpack_int4

_GROUPS = (32, 64, 128, 256)
_OUTPUTS = 32
"""Outputs are a multiple of it."""
_MOST_ROWS = {torch.bfloat16: 64, torch.float32: 4}
"""Its time grows with the rows, that of dequantising does not."""
_INNER = 2


class _Kept(NamedTuple):
    """A weight as torch wants it."""

    storages: tuple[StorageWeakRef, ...]
    """Of what it was made of. Their addresses are given to nobody else while it is held."""
    codes: Tensor
    scales: Tensor
    """[groups, outputs, 2]: scale, and the value of a code of 8."""


_kept: dict[tuple[Any, ...], _Kept] = {}


def product(x: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, inputs: int, group: int) -> Tensor | None:
    """`x @ weight.T` of x [M, K] and a weight with scales for `group` inputs of each output; None where torch's product
    is not for that."""
    rows, outputs = x.shape[0], data.shape[0]
    fits = group in _GROUPS and inputs % group == 0 and outputs % _OUTPUTS == 0
    exact = x.dtype == torch.float32 or scales.dtype == x.dtype
    if not fits or not exact or not 0 < rows <= _MOST_ROWS.get(x.dtype, 0) or not has_product():
        return None
    kept = _of(data, scales, zeros, inputs, x.dtype)
    found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), kept.codes, group, kept.scales)
    return found


def has_product() -> bool:
    """Whether this torch has the product."""
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def forget(*tensors: Tensor | None) -> None:
    """Somebody has written into tensors of weights: make what was made of them again."""
    written = {tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None}
    for key, kept in list(_kept.items()):
        if any(storage.expired() or storage.cdata in written for storage in kept.storages):
            del _kept[key]


def _of(data: Tensor, scales: Tensor, zeros: Tensor | None, inputs: int, dtype: torch.dtype) -> _Kept:
    tensors = [tensor for tensor in (data, scales, zeros) if tensor is not None]
    places = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), _version(t)) for t in tensors]
    key = (dtype, *places)
    kept = _kept.get(key)
    if kept is None:
        forget()  # what belongs to weights that are gone
        for other in [each for each in _kept if each[:1] == key[:1] and each[1][:2] == places[0][:2]]:
            del _kept[other]  # before it was written into
        storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_int4(data, inputs).int(), _INNER)
        wide = scales.to(dtype)
        eights = torch.zeros_like(wide) if zeros is None else ((INT4_ZERO - zeros.float()) * wide.float()).to(dtype)
        pairs = torch.stack((wide, eights), -1).transpose(0, 1).contiguous()
        kept = _kept[key] = _Kept(storages, codes, pairs)
    return kept


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
