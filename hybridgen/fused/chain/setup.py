"""What a `ChainStep` checks and allocates before its first launch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.kernels.attention.common import heads_of
from hybridgen.models.decoder import Decoder, Linear, Unfit, dense_parts
from hybridgen.models.quantised import QuantisedWeight

_LARGEST_HIDDEN = 16384
"""One program holds a row of the embedding."""
_SQUARES_ROWS = 16
"""As in `fused.chain.kernels`."""


def check(model: Decoder, *, codes: bool = False) -> None:
    """Whether the kernels compute this model.

    Args:
        codes: weights may be FP8 codes.

    Raises:
        Unfit: they do not; the message is the reason.
    """
    if model.device.type == "cuda":
        if torch.cuda.get_device_capability(model.device) < (8, 0):
            raise Unfit("its device is older than compute capability 8.0")
        if model.dtype not in (torch.bfloat16, torch.float16):
            raise Unfit(f"its weights are {model.dtype}; the chain takes bfloat16 and float16")
    if not model.layers:
        raise Unfit("it has no layers")
    if model.activation not in ("silu", "gelu_tanh"):
        raise Unfit(f"its activation is {model.activation}")
    if model.hidden > _LARGEST_HIDDEN:
        raise Unfit(f"its hidden size {model.hidden} is above {_LARGEST_HIDDEN}")
    coded = codes and any(linear.weight.format.kind == "fp8" for linear in model.linears)
    if coded and model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < (8, 9):
        raise Unfit("its device is older than compute capability 8.9, and weights are FP8 codes")
    unit = 16 if coded else 16 // model.dtype.itemsize
    for what, size in (
        ("hidden size", model.hidden),
        ("attention width", model.heads * model.head_dim),
        ("intermediate size", model.intermediate),
    ):
        if size % unit:
            raise Unfit(f"its {what} {size} is no multiple of {unit}: rows of a weight would not start at 16 bytes")
    check_places(weight for linear in model.linears for weight in stored(linear, codes=codes)[0])
    if model.share is not None and any(each.bias is not None for x in model.layers for each in (x.out, x.down)):
        raise Unfit("its output projections have biases, which each rank would add")
    if any(layer.attention_scale <= 0 for layer in model.layers):
        raise Unfit("its attention scale is not above 0")
    try:
        heads_of(model.heads, model.kv_heads, model.head_dim, model.head_dim, 16, model.dtype.itemsize)
    except ValueError as error:
        raise Unfit(f"its attention does not suit the kernels: {error}") from error


def stored(linear: Linear, *, codes: bool) -> tuple[list[Tensor], Tensor | None]:
    """The weights of a projection's parts where they are, and what their codes are multiplied by, float32 [outputs];
    None where they are no codes.

    Raises:
        Unfit: they are stored in another format.
    """
    weight = linear.weight
    if codes and not linear.parts and isinstance(weight, QuantisedWeight) and weight.kind == "fp8":
        if weight.scales.shape != (weight.shape[0], 1) or weight.scales.dtype != torch.float32:
            raise Unfit("its FP8 weights have other scales than one for each output")
        return [weight.data], weight.scales
    return dense_parts(linear), None


def check_places(weights: Iterable[Tensor]) -> None:
    """Whether the kernels can read weights where they lie.

    Raises:
        Unfit: they cannot.
    """
    if any(not weight.is_contiguous() or weight.data_ptr() % 16 for weight in weights):
        raise Unfit("a weight is not contiguous or does not start at a multiple of 16 bytes")


def check_pages(model: Decoder, pages: tuple[LayerPages, ...]) -> None:
    """Whether these are a model's pages.

    Raises:
        ValueError: they are not, or not contiguous, or of a size that the kernels do not take.
    """
    if len(pages) != len(model.layers):
        raise ValueError(f"pages of {len(pages)} layers for a model of {len(model.layers)}")
    for layer in pages:
        for part in layer:
            if part.dim() != 4 or (part.shape[1], part.shape[3]) != (model.kv_heads, model.head_dim):
                expected = f"[pages, {model.kv_heads}, page_size, {model.head_dim}]"
                raise ValueError(f"pages of shape {tuple(part.shape)}; give {expected}")
            if part.dtype != model.dtype or part.device != model.device:
                raise ValueError(f"pages of {part.dtype} on {part.device}; give {model.dtype} on {model.device}")
            if not part.is_contiguous():
                raise ValueError("pages that are not contiguous; give contiguous ones")
            heads_of(model.heads, model.kv_heads, model.head_dim, model.head_dim, part.shape[2], part.element_size())


def attention_counters(model: Decoder, rows: int) -> int:
    """Counters of attention, one for a row's kv head; those of projections' tiles follow at a multiple of 16 bytes."""
    return triton.cdiv(rows * model.kv_heads, 4) * 4


def allocate(model: Decoder, rows: int) -> dict[str, Tensor]:
    """Scratch of a step of up to `rows` rows, by name; zeros."""
    heads = model.heads + 2 * model.kv_heads

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=model.device)

    parts = triton.cdiv(model.hidden, 16)
    scratch = {
        "state": zeros(rows, model.hidden),
        "handed": zeros(rows, model.hidden, dtype=model.dtype),
        "qkv": zeros(rows, heads, model.head_dim),
        "attended": zeros(rows, model.heads * model.head_dim, dtype=model.dtype),
        "counters": zeros(attention_counters(model, rows) + parts, dtype=torch.int32),
        "partial": zeros(0),
        "mlp": zeros(rows, model.intermediate, dtype=model.dtype),
        # Two of each: a kernel reads its maker's while it writes its own.
        "squares": zeros(2, parts, _SQUARES_ROWS),
        "roots": zeros(2, _SQUARES_ROWS),
    }
    if model.share is not None:  # as the ranks add it up
        scratch["product"] = zeros(rows, model.hidden, dtype=model.dtype)
    elif any(layer.after_attention or layer.after_mlp for layer in model.layers):
        scratch["product"] = zeros(rows, model.hidden)
    return scratch
