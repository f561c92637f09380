"""Which models the kernel takes, and the constants that it is compiled with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.models.decoder import Decoder, Unfit, dense_parts

THREADS = 384
"""Of a block: eight consumer warps and the producer's."""
_BATCH = 64
_WARPS = 8
PATIENCE = 1 << 22
"""Times that a block asks for an activation before a step is given up: a few seconds."""
PATIENCE_WITH_RANKS = 1 << 26
"""The same where it waits for other processes, too, which may be kept from launching."""
_PACKET = 8
"""Bytes of `peers.cuh`."""


@dataclass(frozen=True)
class Tuning:
    """What only speed depends on."""

    stage: int = 32768
    """Bytes of a stage of the ring: a power of two."""
    in_flight: int = 2
    """Stages that are being filled at most; more delay the activations."""
    short_splits: int = 4
    """Cuts of the positions of a query head."""
    long_splits: int = 16
    """Cuts of the positions of a kv head, where the context is long."""
    short_least: int = 128
    """Positions of a cut at least."""
    long_least: int = 256
    """The same, the long way."""
    long_from: int = 4096
    """Positions from which on the cache is read once for all query heads of a kv head."""


def default_tuning(model: Decoder, blocks: int) -> Tuning:
    """What was measured best on an H200 for shapes like this one (`docs/performance.md`)."""
    small = model.hidden <= 2048 and model.intermediate * 2 <= 16384
    wide = model.head_dim >= 128 and model.hidden <= 1024
    return Tuning(
        stage=16384 if small and not wide else 32768,
        in_flight=3 if small and not wide else 2,
        # Splits are merged four at a time: a fifth costs another round of waiting in every layer.
        short_splits=max(1, min(4, blocks // model.heads)),
        long_splits=max(1, min(32, blocks // model.kv_heads)),
    )


@dataclass(frozen=True)
class Shape:
    """A kernel's constants, and what its launch needs."""

    defines: dict[str, Any]
    blocks: int
    shared_bytes: int
    has_long: bool


def check(model: Decoder, page_size: int, capability: tuple[int, int]) -> None:
    """Raise if the kernel does not serve this model on this device.

    Raises:
        Unfit: with the first reason found.
    """
    check_structure(model, page_size, capability)
    weights = [weight for linear in model.linears for weight in dense_parts(linear)]
    check_places([model.embedding, *(norm.scale for norm in model.norms), *weights])


def check_cache(model: Decoder, pages: tuple[LayerPages, ...]) -> None:
    """Raise Unfit if keys and values are cached in another dtype than the weights', which one kernel reads alone."""
    if any(part.dtype != model.dtype for layer in pages for part in layer):
        raise Unfit("keys and values are cached in 8 bits (kv_dtype), which this kernel does not read")


def check_places(tensors: Iterable[Tensor]) -> None:
    """Raise Unfit if tensors do not lie as bulk copies and 16-byte loads want them."""
    if any(not tensor.is_contiguous() or tensor.data_ptr() % 16 for tensor in tensors):
        raise Unfit("a weight is not contiguous or does not start at a multiple of 16 bytes")


def check_structure(model: Decoder, page_size: int, capability: tuple[int, int]) -> None:
    """Raise if a model has parts that no persistent kernel computes, or the device is too old.

    Raises:
        Unfit: with the first reason found.
    """
    if capability[0] < 9:
        raise Unfit(f"compute capability {capability[0]}.{capability[1]}; bulk copies need 9.0 or newer")
    if model.dtype not in (torch.bfloat16, torch.float16):
        raise Unfit(f"its weights are {model.dtype}; bfloat16 and float16 are fused")
    if model.head_dim not in (32, 64, 128, 256):
        raise Unfit(f"its heads have {model.head_dim} dimensions; 32, 64, 128 or 256 are fused")
    for layer in model.layers:
        if layer.before_attention is None or layer.before_mlp is None or layer.after_attention or layer.after_mlp:
            raise Unfit("its layers normalise what they add, not what they read")
        for norm in (layer.query_norm, layer.key_norm):
            if norm is not None and norm.scale.shape[0] != model.head_dim:
                raise Unfit("its query norm spans all heads")
        if (layer.query_norm is None) != (layer.key_norm is None):
            raise Unfit("only one of queries and keys is normalised")
        if layer.attention_scale != model.layers[0].attention_scale or layer.residual != model.layers[0].residual:
            raise Unfit("its layers differ in their multipliers")
    epsilons = {n.eps for layer in model.layers for n in (layer.before_attention, layer.before_mlp) if n is not None}
    if len(epsilons | {model.norm.eps}) > 1 or len(_head_epsilons(model)) > 1:
        raise Unfit("its norms differ in their epsilon")
    if len({layer.query_norm is None for layer in model.layers}) > 1:
        raise Unfit("only some of its layers normalise queries and keys")
    for name, width in (("hidden", model.hidden), ("intermediate", model.intermediate)):
        if width % 8:
            raise Unfit(f"its {name} size {width} is no multiple of 8")
    if page_size & (page_size - 1):
        raise Unfit(f"page_size={page_size} is no power of two")


def _head_epsilons(model: Decoder) -> set[float]:
    return {norm.eps for layer in model.layers for norm in (layer.query_norm, layer.key_norm) if norm is not None}


def shape_of(
    model: Decoder, tuning: Tuning, *, page_size: int, blocks: int, shared_memory: int, patience: int = PATIENCE
) -> Shape:
    """The constants for a model.

    Args:
        blocks: multiprocessors of the device.
        shared_memory: bytes of it that a block can have.
        patience: times that a block asks for an activation before the step is given up.

    Raises:
        Unfit: a row of weights does not fit a stage, or there are too few multiprocessors.
    """
    group = model.heads // model.kv_heads
    # A stage holds a row of every weight, and of the gated one a row of each half.
    widest = 2 * max(2 * model.hidden, model.heads * model.head_dim, model.intermediate)
    stage = tuning.stage
    while stage < widest:
        stage *= 2
    if model.heads > blocks:
        raise Unfit(f"it has {model.heads} query heads and the device {blocks} multiprocessors")
    if -(-model.hidden // blocks) > _BATCH:
        raise Unfit(f"its hidden size {model.hidden} is above {_BATCH} rows for each of {blocks} multiprocessors")
    shared = 2 * 2 * _BATCH * _WARPS * 4 + _WARPS * 256 * 4 + 1024
    stages = min(32, (shared_memory - shared) // (stage + 16))
    if stages < 3:
        raise Unfit(f"a row of {widest:,} bytes needs stages of {stage:,}, of which {shared_memory:,} hold {stages}")
    shared += 16 * stages
    has_long = 1 < group <= 8 and model.head_dim in (64, 128)
    epsilons = _head_epsilons(model)
    first = model.layers[0]
    defines = {
        "HIDDEN": model.hidden,
        "HEADS": model.heads,
        "KV_HEADS": model.kv_heads,
        "HEAD": model.head_dim,
        "INTERMEDIATE": model.intermediate,
        "LAYERS": len(model.layers),
        "VOCAB": model.vocab,
        "PAGE": page_size,
        "HALF": int(model.dtype is torch.float16),
        "GELU": int(model.activation == "gelu_tanh"),
        "HEAD_NORMS": int(first.query_norm is not None),
        "EPSILON": _float(model.norm.eps),
        "HEAD_EPSILON": _float(epsilons.pop() if epsilons else 0.0),
        "ATTENTION_SCALE": _float(first.attention_scale),
        "RESIDUAL_SCALE": _float(first.residual),
        "EMBEDDING_SCALE": _float(model.embedding_scale),
        "LOGITS_SCALE": _float(model.logits_scale),
        "SEPARATE": int(model.separate),
        "BLOCKS": blocks,
        "STAGE": stage,
        "STAGES": stages,
        "IN_FLIGHT": min(tuning.in_flight, stages),
        "SHARED": shared,
        "SHORT_SPLITS": min(tuning.short_splits, blocks // model.heads),
        "HAS_LONG": int(has_long),
        "LONG_SPLITS": min(tuning.long_splits, blocks // model.kv_heads) if has_long else 1,
        "LONG_FROM": tuning.long_from,
        "SHORT_LEAST": tuning.short_least,
        "LONG_LEAST": tuning.long_least,
        "PATIENCE": f"{patience}u",
        "RANKS": 1 if model.share is None else model.share.size,
    }
    return Shape(defines, blocks, stages * stage + shared, has_long)


def inbox_bytes(model: Decoder, columns: int) -> int:
    """Of the memory in which a rank gets the partial sums of all ranks, for steps of so many columns."""
    return 0 if model.share is None else 2 * model.share.size * model.hidden * columns * _PACKET


def peers(model: Decoder, inboxes: Sequence[int]) -> list[int]:
    """`Peers` of `peers.cuh`, for the addresses of all ranks' inboxes; nothing for a model that is whole.

    Raises:
        Unfit: there are none.
    """
    if model.share is None:
        return []
    if len(inboxes) != model.share.size:
        raise Unfit("the ranks' memory is not mapped")
    return [model.share.rank, *inboxes]


def _float(value: float) -> str:
    return f"{float(value)!r}f"


def as_document(tuning: Tuning) -> dict[str, int]:
    """A tuning as the compile cache keeps it; `Tuning(**document)` brings it back."""
    return asdict(tuning)
