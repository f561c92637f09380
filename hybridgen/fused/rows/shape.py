"""Which models the kernel for a few columns takes, and the constants that it is compiled with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from hybridgen.fused.persistent.shape import PATIENCE, check_structure
from hybridgen.fused.rows.formats import Format, Formats
from hybridgen.models.decoder import Decoder, Unfit

COLUMNS = 8
"""Of a step at most: a column is a slot and a position."""
WARPS = 8
PRODUCERS = 4
THREADS = 32 * (WARPS + PRODUCERS)
_TILE = 16
_BATCH = 2
_USUAL = 4096
_WIDEST = 8192
"""Inputs whose activations a block has in registers at once; of int4 half, where hidden size and attention fit it."""
_OWNED = 64
"""Rows of the residual stream that a block can have."""
_ALIGNED = 1024
"""Bytes: tiles of keys and values are swizzled by their addresses."""
_LEAST_PIECE = 256
"""Bytes of a row in a stage at least: a thread issues a bulk copy in about 46 ns."""


@dataclass(frozen=True)
class Tuning:
    """What only speed depends on, but for `split`, `unit_heads` and `piece`: they change the order of sums."""

    piece: int = 2048
    """Bytes of a row of weights in a stage of the ring at most; a stage has 16 rows."""
    in_flight: int = 2
    """Stages that are being filled at most; more delay the activations."""
    split: int = 2048
    """Positions of a column that a block attends to at once."""
    unit_heads: int = 0
    """Query heads that a block takes at once; 0: as few as keep every block busy with one unit at most."""


def default_tuning(model: Decoder) -> Tuning:
    """What was measured best on an H200 for shapes like this one (`docs/performance.md`)."""
    small = model.hidden <= 2048
    return Tuning(piece=1024 if small else 2048, in_flight=3 if small else 2)


@dataclass(frozen=True)
class Shape:
    """A kernel's constants, and what its launch needs."""

    defines: dict[str, Any]
    blocks: int
    shared_bytes: int
    unit_heads: int
    split: int
    box: int
    """Positions that one copy brings of a page."""


def largest(unit: int, most: int, of: int) -> int:
    """The largest multiple of `unit` up to `most` that divides `of`; the unit where there is none."""
    return max((size for size in range(unit, min(most, of) + 1, unit) if of % size == 0), default=unit)


@dataclass(frozen=True)
class Tiles:
    """How rows of K inputs go through the ring; `Tiles` of `tiles.cuh`."""

    data: int
    """Bytes of a row in a stage."""
    scales: int

    @property
    def stage(self) -> int:
        """Bytes of 16 rows, an odd multiple of 16 bytes apart."""
        size = self.data + self.scales
        return _TILE * (size if size // 16 % 2 else size + 16)


def tiles(what: str, inputs: int, form: Format, piece: int, widest: int = _USUAL) -> Tiles:
    """The cut of a weight's rows.

    Args:
        widest: inputs of an int4 weight whose activations are in registers at once.

    Raises:
        Unfit: the warps cannot share its inputs evenly.
    """
    unit = max(256, 8 * form.group) if form.has_groups else 256
    unit = 512 if form.is_mxfp4 else unit  # of whose scales, a byte each, copies bring 16
    if inputs % unit:
        groups = f" in groups of {form.group}" if form.has_groups else ""
        raise Unfit(f"its {what} size {inputs} is no multiple of {unit}, which {form.bits}-bit weights{groups} need")
    at_once = widest if form.bits == 4 else _WIDEST
    chunk = inputs if inputs <= at_once else largest(unit, 2048 if widest == _USUAL else _USUAL, inputs)
    data = largest(unit * form.bits // 8, piece, chunk * form.bits // 8)
    if data < _LEAST_PIECE:
        raise Unfit(f"its {what} size {inputs} can only be cut in pieces of {data} bytes")
    scales = data * 8 // form.bits // form.group * form.scale_bytes if form.has_groups else 0
    return Tiles(data, scales)


def check(model: Decoder, page_size: int, capability: tuple[int, int]) -> None:
    """Raise if the kernel does not serve this model on this device, whatever its formats.

    Raises:
        Unfit: with the first reason found.
    """
    check_structure(model, page_size, capability)
    if model.head_dim not in (64, 128):
        raise Unfit(f"its heads have {model.head_dim} dimensions; for several rows 64 or 128 are fused")
    for what, width in (("hidden", model.hidden), ("attention", model.heads * model.head_dim)):
        if width > _WIDEST:
            raise Unfit(f"its {what} size {width} is above {_WIDEST}")
    if model.vocab % 2 or model.intermediate % 2:
        raise Unfit(f"its vocabulary of {model.vocab} is odd")


def shape_of(
    model: Decoder,
    layers: Formats,
    head: Format,
    tuning: Tuning,
    *,
    page_size: int,
    blocks: int,
    shared_memory: int,
    patience: int = PATIENCE,
    reads: tuple[int, ...] = (),
    kv_bytes: int = 2,
) -> Shape:
    """The constants for a model.

    Args:
        layers, head: formats of the layers' projections and of the head.
        blocks: multiprocessors of the device.
        shared_memory: bytes of it that a block can have.
        patience: times that a block asks for an activation before the step is given up.
        reads: layers whose inputs are left behind.
        kv_bytes: of a number in the cache: 2, or 1 for e4m3.

    Raises:
        Unfit: its sizes do not fit the ring, or there are too few multiprocessors.
    """
    if head.has_groups:
        raise Unfit(f"its head has {head.bits} bits in groups; 16 bits, and 8 with a scale for each output, are fused")
    if -(-(model.hidden // 2) // blocks) * 2 > _OWNED:
        raise Unfit(f"its hidden size {model.hidden} is above {_OWNED} rows for each of {blocks} blocks")
    group = model.heads // model.kv_heads
    width = max(model.hidden, model.heads * model.head_dim)
    if width > _USUAL and any(form.bits != 4 for _, form in layers):
        raise Unfit(f"its hidden or attention size {width} is above {_USUAL}, and its weights are not int4")
    read = (
        ("hidden", model.hidden),
        ("attention", model.heads * model.head_dim),
        ("hidden", model.hidden),
        ("intermediate", model.intermediate),
    )
    widths = [(*read[index], form) for index, form in layers] + [("hidden", model.hidden, head)]
    widest = _USUAL if width <= _USUAL else _WIDEST
    stage = max(tiles(what, inputs, form, tuning.piece, widest).stage for what, inputs, form in widths)
    stage = -(-stage // _ALIGNED) * _ALIGNED
    dim = model.head_dim
    units = [n for n in range(1, min(group, 8) + 1) if group % n == 0 and n * dim <= 2 * _BATCH * _TILE * COLUMNS]
    unit_heads = tuning.unit_heads or next((n for n in units if COLUMNS * model.heads // n <= blocks), units[-1])
    state = (
        8 * COLUMNS + 4 * COLUMNS * 5 + 32 * COLUMNS
        + 4 * unit_heads * (2 * WARPS + 1) + 24
        + 4 * dim * 4 + 2 * 2 * dim * COLUMNS + 128
        + 2 * WARPS * _BATCH * _TILE * COLUMNS * 4 + 128
    )  # fmt: skip
    stages = min(32, (shared_memory - state) // (stage + 16))
    if stages < 3:
        raise Unfit(f"stages of {stage:,} bytes, of which {shared_memory:,} hold {stages}")
    shared = -(-(state + 16 * stages) // 16) * 16
    first = model.layers[0]
    epsilons = {n.eps for layer in model.layers for n in (layer.query_norm, layer.key_norm) if n is not None}
    split = max(128, tuning.split)
    defines = {
        "HIDDEN": model.hidden,
        "HEADS": model.heads,
        "KV_HEADS": model.kv_heads,
        "HEAD": dim,
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
        **layers.defines(),
        "HEAD_FORMAT": head.code,
        "BLOCKS": blocks,
        "PIECE": tuning.piece,
        "STAGE": stage,
        "STAGES": stages,
        "IN_FLIGHT": min(tuning.in_flight, stages),
        "SHARED": shared,
        "KV8": int(kv_bytes == 1),
        "UNIT_HEADS": unit_heads,
        "SPLIT": split,
        "PATIENCE": f"{patience}u",
        "RANKS": 1 if model.share is None else model.share.size,
    }
    if reads:
        defines["READS"] = ",".join(map(str, reads))
    fits = stage // (2 * kv_bytes * dim)
    positions = next(n for n in (128, 64, 32, 16) if n <= max(fits, 16))
    box = min(positions, page_size)
    if kv_bytes == 1 and box * dim % _ALIGNED:
        raise Unfit(f"pages of {page_size} positions in 8 bits are no multiples of {_ALIGNED} bytes")
    return Shape(defines, blocks, stages * stage + shared, unit_heads, split, box)


def shares(model: Decoder, blocks: int) -> list[list[int]]:
    """The first rows of each block, and the end, of qkv, the hidden size, the intermediate size and the vocabulary.

    Pairs of rows are dealt out; who has one more of one projection has fewer of the next, so that all read alike.
    """
    order = sorted(range(blocks), key=lambda block: block * 61 % blocks)
    load = [0] * blocks

    def deal(rows: int, cost: int) -> list[int]:
        each, more = divmod(rows // 2, blocks)
        counts = [each] * blocks
        for block in sorted(order, key=lambda block: load[block])[:more]:
            counts[block] += 1
        starts = [0]
        for block, count in enumerate(counts):
            load[block] += count * cost
            starts.append(starts[-1] + 2 * count)
        return starts

    width = model.heads * model.head_dim
    hidden = deal(model.hidden, model.intermediate + width)
    inner = deal(model.intermediate, 2 * model.hidden)
    qkv = deal(width + 2 * model.kv_heads * model.head_dim, model.hidden)
    load = [0] * blocks
    return [qkv, hidden, inner, deal(model.vocab, model.hidden)]


def _float(value: float) -> str:
    return f"{float(value)!r}f"


def as_document(tuning: Tuning) -> dict[str, int]:
    """A tuning as the compile cache keeps it; `Tuning(**document)` brings it back."""
    return asdict(tuning)
