"""The persistent kernel for a few columns as a step: its parameters and its buffers."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.device.program import Keeper, Program, driver_call, driver_module, machine_code
from hybridgen.fused.kernel_step import KernelStep, address_of, scale_of
from hybridgen.fused.persistent.shape import PATIENCE, PATIENCE_WITH_RANKS, check_places, peers
from hybridgen.fused.rows.formats import PROJECTIONS, Stored, formats_of, stored
from hybridgen.fused.rows.shape import COLUMNS, THREADS, Shape, Tuning, check, default_tuning, shape_of, shares
from hybridgen.models.decoder import Decoder, DecoderLayer, Linear, Unfit

ROWS = Program(
    (__package__ or "", "hybridgen.fused.persistent"),
    "rows.cu",
    ("words.cuh", "barriers.cuh", "units.cuh", "pairs.cuh", "tiles.cuh", "products.cuh", "columns.cuh", "peers.cuh"),
    "decode_columns",
)
_COUNTERS = 4
_MAP_ROW = 128
"""Bytes of a row of a box of the cache: as many as its copy swizzles."""


class RowsStep(KernelStep):
    """One decode step of up to eight columns: appends to the cache, leaves logits.

    A column is a slot and a position. Several columns may be of one slot, at neighbouring positions: each sees those
    before it.
    """

    def __init__(
        self,
        model: Decoder,
        pages: tuple[LayerPages, ...],
        *,
        block_table: Tensor,
        tuning: Tuning | None = None,
        patience: int | None = None,
        inboxes: Sequence[int] = (),
        reads: tuple[int, ...] = (),
        kept: Keeper | None = None,
        trace: Tensor | None = None,
        defines: Mapping[str, Any] | None = None,
    ) -> None:
        """Compile (or fetch) and load the kernel for these tensors, which must stay where they are.

        Args:
            block_table: int32 [slots, max_pages].
            tuning: what only speed depends on; else the defaults for the shape.
            patience: times that a block asks for an activation before the step is given up; by default a few seconds,
                and a minute where it waits for other ranks.
            inboxes: of a rank's share, where the ranks send partial sums to: an address of each rank's memory, of
                `inbox_bytes`, zeroed before the first step on any of them.
            reads: layers whose inputs are left in `states`.
            kept: gives the machine code kept under a key, or makes and keeps it.
            trace: where clocks of phases go, int64 [blocks, layers, 24], in a kernel compiled for that.
            defines: other constants for the compiler; for measurements.

        Raises:
            Unfit: the model or the device is not one that the kernel serves.
            DeviceError: the driver refuses the kernel.
        """
        device = model.device
        properties = torch.cuda.get_device_properties(device)
        capability = properties.major, properties.minor
        page_size, blocks = pages[0].keys.shape[2], properties.multi_processor_count
        check(model, page_size, capability)
        if pages[0].keys.dtype not in (model.dtype, torch.float8_e4m3fn):
            raise Unfit(f"its cache is {pages[0].keys.dtype}; for several rows that of its weights and e4m3 are fused")
        weights = [tuple(map(stored, _linears(layer))) for layer in model.layers]
        head = stored(model.head)
        formats = formats_of(weights)
        check_places([model.embedding, *(norm.scale for norm in model.norms)])
        check_places(tensor for weight in (*sum(weights, ()), head) for tensor in weight.tensors())
        self.tuning = tuning or default_tuning(model)
        shape = shape_of(
            model,
            formats,
            head.format,
            self.tuning,
            page_size=page_size,
            blocks=blocks,
            shared_memory=getattr(properties, "shared_memory_per_block_optin", 99 * 2**10),
            patience=patience or (PATIENCE if model.share is None else PATIENCE_WITH_RANKS),
            reads=reads,
            kv_bytes=pages[0].keys.element_size(),
        )
        constants = shape.defines | ({} if trace is None else {"TRACE": 1}) | dict(defines or {})
        cubin = machine_code(constants, capability, ROWS, kept)
        width, keys, dim = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.head_dim
        pairs = {"x": model.hidden, "middle": model.hidden, "mixed": width, "hidden": model.intermediate}
        sizes = {name: COLUMNS * size // 2 for name, size in {**pairs, "last": model.hidden}.items()}
        sizes |= {"qkv": COLUMNS * (width + 2 * keys)}
        sizes |= dict.fromkeys(("squares", "middle squares", "last squares"), COLUMNS * blocks)
        splits = COLUMNS * (-(-model.max_context // shape.split) + 1)
        super().__init__(
            ROWS,
            cubin,
            shape.shared_bytes,
            blocks=blocks,
            threads=THREADS,
            device=device,
            sizes=sizes,
            counters=_COUNTERS,
        )
        with torch.inference_mode(False):
            self.partial = torch.zeros(splits, model.heads, dim + 2, dtype=torch.float32, device=device)
            self.tickets = torch.zeros(COLUMNS * model.heads, dtype=torch.int32, device=device)
            self.logits = torch.zeros(COLUMNS, model.vocab, dtype=model.dtype, device=device)
            self.states = torch.zeros(COLUMNS, len(reads) * model.hidden, dtype=model.dtype, device=device)
            """What went into the layers of `reads`, side by side, by column."""
            self.shares = torch.tensor(shares(model, blocks), dtype=torch.int32, device=device)
            self._maps = torch.frombuffer(bytearray(_maps(pages, shape)), dtype=torch.uint8).to(device)
        words = [part.data_ptr() for part in self.parts.values()]
        cos, sin = model.rotary or (None, None)
        self._kept_alive = (model, pages, block_table, weights, head)
        header = [
            0, 0, 0, block_table.data_ptr(), 0, block_table.stride(0), model.embedding.data_ptr(),
            self._maps.data_ptr(), *_matrix(head, None), model.norm.scale.data_ptr(), address_of(cos), address_of(sin),
            self.logits.data_ptr(),
            *words, self.partial.data_ptr(), self.tickets.data_ptr(), self.shares.data_ptr(),
            self.counters.data_ptr(), self._fault.data_ptr(), *([self.states.data_ptr()] if reads else []),
            *peers(model, inboxes), *([trace.data_ptr()] if trace is not None else []),
        ]  # fmt: skip
        packed = struct.pack(f"<{len(header)}Q", *header)
        for index, layer in enumerate(zip(model.layers, weights, pages, strict=True)):
            packed += _packed_layer(*layer, formats.others[index : index + 1])
        self._parameters = ctypes.create_string_buffer(packed, len(packed))

    def __call__(self, ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Launch on the current stream; returns where the logits will be, [columns, vocab].

        Args:
            ids, positions: int64 [columns], one to eight of them.
            slots: int32 [columns]. Columns of one slot are at neighbouring positions, or padding.
        """
        columns = ids.shape[0]
        struct.pack_into("<3Q", self._parameters, 0, ids.data_ptr(), positions.data_ptr(), slots.data_ptr())
        struct.pack_into("<Q", self._parameters, 32, columns)
        self._launch()
        return self.logits[:columns]

    def _exchanged(self) -> tuple[Tensor, ...]:
        """What is zero before the first step."""
        return *super()._exchanged(), self.tickets

    def tensors(self) -> dict[str, Tensor]:
        """What outlives a launch, by name."""
        return {
            "rows words": self.words,
            "rows splits": self.partial,
            "rows tickets": self.tickets,
            "rows counters": self.counters,
            "rows logits": self.logits,
            **({"rows states": self.states} if self.states.numel() else {}),
        }


def _maps(pages: tuple[LayerPages, ...], shape: Shape) -> bytes:
    """Tensor maps of each layer's keys and values, 128 bytes each: boxes of positions by 128 bytes, swizzled."""
    driver = driver_module()
    elements = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float8_e4m3fn: "UINT8"}
    found = []
    for part in (part for layer in pages for part in layer):
        size = part.element_size()
        dim = part.shape[-1] if size == 2 else _MAP_ROW  # of 8 bits a row of 128 bytes may have two positions
        rows = part.numel() // dim
        if not part.is_contiguous() or rows > 2**31:
            raise Unfit("its cache is not one piece of memory, or larger than an index reaches")
        found.append(
            driver_call(
                "cuTensorMapEncodeTiled",
                getattr(driver.CUtensorMapDataType, "CU_TENSOR_MAP_DATA_TYPE_" + elements[part.dtype]),
                2,
                part.data_ptr(),
                [driver.cuuint64_t(dim), driver.cuuint64_t(rows)],
                [driver.cuuint64_t(dim * size)],
                [driver.cuuint32_t(_MAP_ROW // size), driver.cuuint32_t(shape.box * part.shape[-1] // dim)],
                [driver.cuuint32_t(1), driver.cuuint32_t(1)],
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )
    return b"".join(struct.pack("<16Q", *(int(word) for word in each.opaque)) for each in found)


def _linears(layer: DecoderLayer) -> tuple[Linear, ...]:
    return tuple(getattr(layer, name) for name in PROJECTIONS)


def _matrix(weight: Stored, bias: Tensor | None) -> tuple[int, int, int]:
    return weight.data.data_ptr(), address_of(weight.scales), address_of(bias)


def _packed_layer(
    layer: DecoderLayer, weights: tuple[Stored, ...], pages: LayerPages, others: tuple[int, ...]
) -> bytes:
    """`Layer` of `tiles.cuh`. `others`: which projections have the other format, where layers have two."""
    norms = (layer.before_attention, layer.before_mlp, layer.query_norm, layer.key_norm)
    values = [scale_of(norm) for norm in norms]
    for weight, linear in zip(weights, _linears(layer), strict=True):
        values += _matrix(weight, linear.bias)
    values += [pages.keys.data_ptr(), pages.values.data_ptr(), layer.window, int(layer.rotates), *others]
    return struct.pack(f"<{len(values)}Q", *values)
