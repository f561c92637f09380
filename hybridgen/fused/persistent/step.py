"""The persistent kernel for one row as a step: its parameters and its buffers."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.device.program import Keeper, Program, machine_code
from hybridgen.fused.kernel_step import KernelStep, address_of, scale_of
from hybridgen.fused.persistent.shape import (
    PATIENCE,
    PATIENCE_WITH_RANKS,
    THREADS,
    Tuning,
    check,
    check_cache,
    default_tuning,
    peers,
    shape_of,
)
from hybridgen.models.decoder import Decoder, DecoderLayer, Linear, cut, dense

ONE_ROW = Program(
    (__package__ or "",),
    "step.cu",
    ("words.cuh", "barriers.cuh", "ring.cuh", "projection.cuh", "attention.cuh", "attention_long.cuh", "peers.cuh"),
    "decode_step",
)
_COUNTERS = 5


class PersistentStep(KernelStep):
    """One decode step of one row: reads its slot's state and pages, appends to the cache, leaves logits."""

    def __init__(
        self,
        model: Decoder,
        pages: tuple[LayerPages, ...],
        *,
        rows: Tensor,
        state: Tensor,
        block_table: Tensor,
        tuning: Tuning | None = None,
        patience: int | None = None,
        inboxes: Sequence[int] = (),
        kept: Keeper | None = None,
    ) -> None:
        """Compile (or fetch) and load the kernel for these tensors, which must stay where they are.

        Args:
            rows: int64 [>= 1]; its first element is the slot of the row.
            state: int64 [3, slots]: last token, length (the new token's position) and generated tokens by slot.
            block_table: int32 [slots, max_pages].
            tuning: what only speed depends on; else the defaults for the shape.
            patience: times that a block asks for an activation before the step is given up; by default a few seconds,
                and a minute where it waits for other ranks.
            inboxes: of a rank's share, where the ranks send partial sums to: an address of each rank's memory, of
                `inbox_bytes`, zeroed before the first step on any of them.
            kept: gives the machine code kept under a key, or makes and keeps it.

        Raises:
            Unfit: the model or the device is not one that the kernel serves.
            DeviceError: the driver refuses the kernel.
        """
        device = model.device
        properties = torch.cuda.get_device_properties(device)
        capability = properties.major, properties.minor
        page_size = pages[0].keys.shape[2]
        check(model, page_size, capability)
        check_cache(model, pages)
        blocks = properties.multi_processor_count
        self.tuning = tuning or default_tuning(model, blocks)
        shape = shape_of(
            model,
            self.tuning,
            page_size=page_size,
            blocks=blocks,
            shared_memory=getattr(properties, "shared_memory_per_block_optin", 99 * 2**10),
            patience=patience or (PATIENCE if model.share is None else PATIENCE_WITH_RANKS),
        )
        cubin = machine_code(shape.defines, capability, ONE_ROW, kept)
        width, heads = model.heads * model.head_dim, model.heads
        short, long = shape.defines["SHORT_SPLITS"], shape.defines["LONG_SPLITS"]
        sizes = {
            "x": model.hidden,
            "middle": model.hidden,
            "qkv": width + 2 * model.kv_heads * model.head_dim,
            "hidden": model.intermediate,
            "short_mixed": short * width,
            "short_sums": short * heads * 8,
            "long_mixed": long * width,
            "long_sums": long * heads * 8,
            "long_merged": width,
        }
        super().__init__(
            ONE_ROW,
            cubin,
            shape.shared_bytes,
            blocks=blocks,
            threads=THREADS,
            device=device,
            sizes=sizes,
            counters=_COUNTERS,
        )
        with torch.inference_mode(False):
            self.logits = torch.zeros(1, model.vocab, dtype=model.dtype, device=device)
        words = [part.data_ptr() for part in self.parts.values()]
        cos, sin = model.rotary or (None, None)
        self._kept_alive = (model, pages, rows, state, block_table)
        header = [
            rows.data_ptr(), state.data_ptr(), block_table.data_ptr(), state.stride(0), block_table.stride(0),
            model.embedding.data_ptr(), dense(model.head).data_ptr(), model.norm.scale.data_ptr(), address_of(cos),
            address_of(sin), self.logits.data_ptr(), *words, self.counters.data_ptr(), self._fault.data_ptr(),
            *peers(model, inboxes),
        ]  # fmt: skip
        packed = struct.pack(f"<{len(header)}Q", *header)
        packed += b"".join(_packed_layer(model, *each) for each in zip(model.layers, pages, strict=True))
        self._parameters = ctypes.create_string_buffer(packed, len(packed))

    def __call__(self) -> Tensor:
        """Launch on the current stream; returns where the logits will be, [1, vocab]."""
        self._launch()
        return self.logits

    def tensors(self) -> dict[str, Tensor]:
        """What outlives a launch, by name."""
        return {"fused words": self.words, "fused counters": self.counters, "fused logits": self.logits}


def _packed_layer(model: Decoder, layer: DecoderLayer, pages: LayerPages) -> bytes:
    """`Layer` of `ring.cuh`. Where some layer's projections lie apart, the parts behind the first follow, those of
    joined ones by where they begin."""
    width, keys, inner = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.intermediate
    norms = (layer.before_attention, layer.before_mlp, layer.query_norm, layer.key_norm)
    first, *others = cut(layer.qkv, [width, keys, keys])
    gate, up = cut(layer.gate_up, [inner, inner])
    pairs = [first, _whole(layer.out), gate, _whole(layer.down)]
    addresses = [scale_of(norm) for norm in norms]
    addresses += [weight.data_ptr() for weight, _ in pairs] + [address_of(bias) for _, bias in pairs]
    addresses += [pages.keys.data_ptr(), pages.values.data_ptr()]
    packed = struct.pack(f"<{len(addresses)}Q2i", *addresses, layer.window, int(layer.rotates))
    if model.separate:
        others.append(up)
        parts = [weight.data_ptr() for weight, _ in others] + [address_of(bias) for _, bias in others]
        packed += struct.pack(f"<{len(parts)}Q", *parts)
    return packed


def _whole(linear: Linear) -> tuple[Tensor, Tensor | None]:
    return dense(linear), linear.bias
