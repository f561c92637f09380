"""A decode step of 1 to 16 rows as a chain of Triton kernels; every weight is read once, whatever the rows.

Per layer: norm + qkv projection; head norms, rotary and paged attention, which writes the cache; output projection +
residual; norm + gate and up + activation; down projection + residual. Before the layers the embedding, behind them the
norm and the head. `fused.chain.kernels` says how the kernels divide the work and overlap; `reference.step` computes
the same in plain PyTorch.

Of a model that several ranks have together, each runs its share: what the output and down projections give is added up
over the ranks before it goes to the state, and logits are those of the rank's part of the vocabulary.

Hidden states are float32 from layer to layer. Rounded to the weights' dtype are: what a norm hands to a projection,
queries and the cache, attention's output, and the activated MLP state.

Imports Triton; import it only where that is there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.device.launcher import Launcher, device_of, power_of_two
from hybridgen.fused.chain.attention import Cut, attend_kernel, block_of, cut_contexts, least_tiles
from hybridgen.fused.chain.kernels import begin_kernel, close_kernel, project_kernel
from hybridgen.fused.chain.setup import allocate, attention_counters, check, check_pages, stored
from hybridgen.fused.chain.tiles import PROJECTIONS, Tile, as_tiles, candidates, default_tile, rows_block
from hybridgen.models.decoder import Decoder, DecoderLayer, Linear, Norm

MAX_ROWS = 16


class ChainStep:
    """A decode step of a few rows as a chain of Triton kernels.

    Args:
        model: on a CUDA device of compute capability 8.0 or later, in bfloat16 or float16. On a CPU the kernels run in
            Triton's interpreter, which is for tests; float32 there.
        max_rows: rows that a call may have, 1 to 16.
        tiles: what `fused.chain.search.tune` returned; the rest are defaults.

    Raises:
        Unfit: the kernels do not compute this model; the message is the reason.
        ValueError: `max_rows` or `tiles` is wrong.
    """

    projections: tuple[str, ...] = PROJECTIONS
    """What `shape` knows."""
    takes_codes = False
    """Whether weights may be FP8 codes."""

    def __init__(
        self,
        model: Decoder,
        *,
        max_rows: int = MAX_ROWS,
        tiles: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if not 1 <= max_rows <= MAX_ROWS:
            raise ValueError(f"max_rows={max_rows}; give 1 to {MAX_ROWS}")
        check(model, codes=self.takes_codes)
        self.model = model
        self.max_rows = max_rows
        self.device = device_of(model.embedding)
        self._scales = model.dtype == torch.float16
        self._launchers: dict[Any, Launcher] = {}
        self._wanted: dict[Any, Callable[[], object]] | None = None
        self._pages: tuple[LayerPages, ...] = ()
        self.tiles = {
            f"{name}.{rows}": default_tile(*self.shape(name), rows, self.device.processors).fitted(
                rows, name == "gate_up", model.dtype.itemsize, self.device.shared_memory
            )
            for name in self.projections
            for rows in ((8,) if max_rows <= 8 else (8, 16))
        }
        self._scratch = allocate(model, max_rows)
        self.use(as_tiles(tiles))

    def attach(self, pages: tuple[LayerPages, ...]) -> None:
        """Use these pages, one pair a layer, of the model's dtype.

        Raises:
            ValueError: their number, shapes or dtype are not the model's, or they are not contiguous.
        """
        check_pages(self.model, pages)
        self._pages = tuple(pages)

    def tensors(self) -> dict[str, Tensor]:
        """Scratch that outlives a call, by name; CUDA graphs refer to its addresses."""
        return dict(self._scratch)

    def use(self, tiles: Mapping[str, Tile]) -> None:
        """Cut the named projections into these tiles from the next call on; graphs captured before keep theirs.

        Raises:
            ValueError: a tile has more slices than the projection has room for.
        """
        for key, tile in tiles.items():
            name, _, rows = key.partition(".")
            features, inner, gated = self.shape(name)
            count = triton.cdiv(features, tile.features)
            if tile.slices > 1 and (count > triton.cdiv(self.model.hidden, 16) or tile.leaves_slices_empty(inner)):
                raise ValueError(f"the tile of {key!r} is {tile}: too many slices or tiles")
            size = count * tile.slices * tile.features * int(rows) * (2 if gated else 1) if tile.slices > 1 else 0
            if key in self.tiles:
                self.tiles[key] = tile
                if size > self._scratch["partial"].numel():
                    self._scratch["partial"] = torch.zeros(size, dtype=torch.float32, device=self.model.device)

    def candidates(self, name: str, rows: int) -> list[Tile]:
        """Tiles worth timing for a projection at so many rows, the default first."""
        itemsize, most = self.model.dtype.itemsize, triton.cdiv(self.model.hidden, 16)
        return candidates(*self.shape(name), rows, itemsize, self.device.processors, most)

    def shape(self, name: str) -> tuple[int, int, bool]:
        """Output features (of each half, if gated), inner dimension, and whether it is gated."""
        model = self.model
        attended = model.heads * model.head_dim
        return {
            "qkv": (attended + 2 * model.kv_heads * model.head_dim, model.hidden, False),
            "out": (model.hidden, attended, False),
            "gate_up": (model.intermediate, model.hidden, True),
            "down": (model.hidden, model.intermediate, False),
            "head": (model.vocab, model.hidden, False),
        }[name]

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Tensor, block_table: Tensor, out: Tensor) -> None:
        """Launch the step; nothing waits for the device. The new keys and values are written to the attached pages.

        Args:
            tokens: int64 [B], 1 to `max_rows` rows.
            positions: int64 [B]; position p means that p positions are cached.
            slots: int32 [B], each row's line of `block_table`.
            block_table: int32 [slots, max_pages].
            out: [B, vocab] in the model's dtype, adjacent in a row; gets the logits.

        Raises:
            ValueError: the rows are not 1 to `max_rows`, `out` does not fit, or no pages are attached.
        """
        model, scratch, rows = self.model, self._scratch, tokens.shape[0]
        if not 1 <= rows <= self.max_rows:
            raise ValueError(f"{rows} rows; give 1 to {self.max_rows}")
        if out.shape != (rows, model.vocab) or out.dtype != model.dtype or out.stride(1) != 1:
            raise ValueError(f"out is {tuple(out.shape)} of {out.dtype}; give [{rows}, {model.vocab}] of {model.dtype}")
        if not self._pages:
            raise ValueError("no pages are attached; call attach() first")
        cut, partial = self._cut(rows, block_table.shape[1])
        parts = self._begin(tokens)
        side = 0
        heads = model.heads + 2 * model.kv_heads
        for index, layer in enumerate(model.layers):
            self._read(
                "qkv", layer.qkv, layer.before_attention, scratch["qkv"], heads * model.head_dim, rows, side, parts
            )
            self._attend(index, positions, slots, block_table, rows, cut, partial)
            parts = self._write(
                "out", layer.out, layer.after_attention, layer.before_mlp, scratch["attended"], layer, rows, side, parts
            )
            side = 1 - side
            self._read(
                "gate_up", layer.gate_up, layer.before_mlp, scratch["mlp"], model.intermediate, rows, side, parts
            )
            following = model.layers[index + 1].before_attention if index + 1 < len(model.layers) else model.norm
            parts = self._write(
                "down", layer.down, layer.after_mlp, following, scratch["mlp"], layer, rows, side, parts
            )
            side = 1 - side
        self._read("head", model.head, model.norm, out, out.stride(0), rows, side, parts, factor=model.logits_scale)

    def project_all(self, name: str, rows: int) -> None:
        """Launch one projection of every layer one after another, on whatever scratch holds: for timing tiles."""
        model, scratch = self.model, self._scratch
        if name == "head":
            out = torch.empty(rows, model.vocab, dtype=model.dtype, device=model.device)
            self._read("head", model.head, model.norm, out, model.vocab, rows, 0, 1)
            return
        for layer in model.layers:
            if name == "qkv":
                heads = model.heads + 2 * model.kv_heads
                self._read(name, layer.qkv, layer.before_attention, scratch["qkv"], heads * model.head_dim, rows, 0, 1)
            elif name == "out":
                source, following = scratch["attended"], layer.before_mlp
                self._write(name, layer.out, layer.after_attention, following, source, layer, rows, 0, 1)
            elif name == "gate_up":
                self._read(name, layer.gate_up, layer.before_mlp, scratch["mlp"], model.intermediate, rows, 0, 1)
            else:
                self._write(name, layer.down, layer.after_mlp, model.norm, scratch["mlp"], layer, rows, 0, 1)

    def compile(self, name: str, rows: int, tile: Tile) -> None:
        """Compile the first layer's projection with a tile, without running it; may be called from any thread."""
        probe = self._probe()
        probe.tiles = {**self.tiles, f"{name}.{rows_block(rows)}": tile}
        probe.model = dataclasses.replace(self.model, layers=self.model.layers[:1])
        probe.project_all(name, rows)
        for compile_kernel in probe.wanted:
            compile_kernel()

    def prepare(self, rows: Iterable[int], max_pages: int) -> list[Callable[[], object]]:
        """What compiles the kernels that steps of so many rows launch, a call for each; any thread may make them.

        A first step compiles them one after another, which takes about a second each.

        Args:
            max_pages: columns of the block table.
        """
        probe = self._probe()
        for count in rows:
            tokens, slots = (torch.zeros(count, dtype=t, device=self.model.device) for t in (torch.int64, torch.int32))
            table = torch.zeros(1, max_pages, dtype=torch.int32, device=self.model.device)
            out = torch.empty(count, self.model.vocab, dtype=self.model.dtype, device=self.model.device)
            probe(tokens, tokens, slots, table, out)
        return probe.wanted

    def _probe(self) -> ChainStep:
        """A copy that notes which kernels it would launch, and launches none."""
        probe = copy.copy(self)
        probe._wanted = {}
        return probe

    @property
    def wanted(self) -> list[Callable[[], object]]:
        """Of a probe: what compiles each kernel that it would have launched."""
        return list((self._wanted or {}).values())

    def attend_all(self, positions: Tensor, slots: Tensor, block_table: Tensor) -> None:
        """Launch every layer's attention one after another, on whatever scratch holds: for timing."""
        rows = positions.shape[0]
        cut, partial = self._cut(rows, block_table.shape[1])
        for index in range(len(self.model.layers)):
            self._attend(index, positions, slots, block_table, rows, cut, partial)

    def _begin(self, tokens: Tensor) -> int:
        """The embedding; returns the parts of its sums of squares."""
        model, scratch = self.model, self._scratch
        norm = model.layers[0].before_attention
        constants = self._row_constants(norm)
        scale = scratch["state"] if norm is None else norm.scale
        args = tokens, model.embedding, model.embedding_scale, scratch["state"], scratch["handed"], scale
        count = scratch["counters"].numel()
        constants |= {"COUNTERS": count, "BLOCK_COUNTERS": triton.next_power_of_2(count)}
        launcher = self._launcher(begin_kernel, constants)
        launcher((tokens.shape[0], 1, 1), (*args, scratch["squares"][0], scratch["roots"][0], scratch["counters"]))
        return 1

    def _row_constants(self, norm: Norm | None) -> dict[str, Any]:
        hidden = self.model.hidden
        return {
            "FEATURES": hidden,
            "BLOCK": triton.next_power_of_2(hidden),
            "SCALED": norm is not None,
            "SCALES_OUT": self._scales,
            "num_warps": 8 if hidden >= 2048 else 4,
        }

    def _read(
        self, name: str, linear: Linear, norm: Norm | None, out: Tensor, stride: int, rows: int, side: int, parts: int,
        factor: float = 1.0,
    ) -> None:  # fmt: skip
        """A projection of the handed-on state."""
        constants = {
            "PARTS": parts,
            "NORM": norm is not None,
            "GATED": name == "gate_up",
            "GELU": self.model.activation == "gelu_tanh",
            "SCALES_IN": self._scales,
            "STRIDE": stride,
        }
        eps = 0.0 if norm is None else norm.eps
        self._project(name, linear, self._scratch["handed"], out, None, rows, side, eps, factor, constants)

    def _write(
        self, name: str, linear: Linear, after: Norm | None, following: Norm | None, source: Tensor,
        layer: DecoderLayer, rows: int, side: int, parts: int,
    ) -> int:  # fmt: skip
        """A projection that is added to the state; returns the parts of the new sums of squares."""
        scratch, hidden = self._scratch, self.model.hidden
        share = self.model.share
        if after is not None or share is not None:
            plain = {"PARTS": 1, "STRIDE": hidden}
            product = scratch["product"]
            self._project(name, linear, source, product, None, rows, side, 0.0, 1.0, plain)
            # Float16 is handed on with a scale of its own.
            fused = 0 if share is None or after is not None or self._scales else share.parts(rows, hidden)
            if share is not None and self._wanted is None:
                if fused:
                    gain = None if following is None else following.scale
                    places = scratch["state"], scratch["handed"], gain, scratch["squares"][1 - side]
                    share.add_to_state(product[:rows], *places, layer.residual)
                    return fused
                product = share.add_up(product[:rows])
            if fused:
                return fused
            launcher = self._launcher(close_kernel, {"NORM": after is not None, **self._row_constants(following)})
            scale, own_scale = (scratch["state"] if norm is None else norm.scale for norm in (following, after))
            tensors = product, own_scale, scratch["state"], scratch["handed"], scale
            outputs = scratch["squares"][1 - side], scratch["roots"][1 - side]
            launcher((rows, 1, 1), (*tensors, *outputs, 0.0 if after is None else after.eps, layer.residual))
            return 1
        constants = {
            "PARTS": parts if self._scales else 1,
            "RESIDUAL": True,
            "SCALED": following is not None,
            "SCALES_OUT": self._scales,
            "STRIDE": hidden,
        }
        self._project(
            name, linear, source, scratch["handed"], following, rows, side, 0.0, layer.residual, constants
        )  # fmt: skip
        return triton.cdiv(hidden, self.tiles[f"{name}.{rows_block(rows)}"].features)

    def _project(
        self, name: str, linear: Linear, source: Tensor, out: Tensor, following: Norm | None, rows: int, side: int,
        eps: float, factor: float, constants: dict[str, Any],
    ) -> None:  # fmt: skip
        scratch = self._scratch
        features, inner, _ = self.shape(name)
        tile = self.tiles[f"{name}.{rows_block(rows)}"]
        weights, code_scale = stored(linear, codes=self.takes_codes)
        biases = [part.bias for part in linear.parts or (linear,)]
        flags = ("NORM", "GATED", "GELU", "RESIDUAL", "SCALED", "SCALES_IN", "SCALES_OUT")
        launcher = self._launcher(
            project_kernel,
            {
                "FEATURES": features,
                "INNER": inner,
                "BLOCK": tile.features,
                "COLUMNS": tile.columns,
                "SPLITS": tile.splits,
                "SLICES": tile.slices,
                "LENGTH": tile.slice_length(inner),
                "ROWS": rows_block(rows),
                "STAGES": tile.stages,
                "EARLY": tile.early,
                "AHEAD": tile.ahead,
                "RELEASE": tile.release,
                "EVEN": inner % (tile.columns * tile.splits) == 0,
                "BLOCK_PARTS": triton.next_power_of_2(constants["PARTS"]),
                "BIAS": biases[0] is not None,
                "SEPARATE": bool(linear.parts),
                # Keys begin, and end, behind so many features; a gated projection's parts are its halves.
                "QUERIES": len(weights[0]) if len(weights) > 2 else 0,
                "ENDS": len(weights[0]) + len(weights[1]) if len(weights) > 2 else 0,
                "NATIVE": self.model.dtype != torch.float32,
                "CODED": code_scale is not None,
                "num_warps": tile.warps,
                **dict.fromkeys(flags, False),
                **constants,
            },
        )
        # Where there is nothing, something else stands that is not read.
        weights += weights[:1] * (3 - len(weights))
        biases = [weights[0] if bias is None else bias for bias in biases]
        biases += biases[:1] * (3 - len(biases))
        scale = scratch["state"] if following is None else following.scale
        maker = scratch["squares"][side], scratch["roots"][side]
        made = scratch["squares"][1 - side], scratch["roots"][1 - side]
        tensors = source, weights[0], biases[0], *maker, scratch["state"], out, scale, *made
        partial, counters = scratch["partial"], scratch["counters"][attention_counters(self.model, self.max_rows) :]
        grid = triton.cdiv(features, tile.features), tile.slices, 1
        partial = partial if tile.slices > 1 else scratch["state"]
        code_scale = scratch["state"] if code_scale is None else code_scale
        launcher(grid, (*tensors, partial, counters, rows, eps, factor, *weights[1:], *biases[1:], code_scale))

    def _cut(self, rows: int, max_pages: int) -> tuple[Cut, Tensor]:
        """How attention cuts contexts, and scratch for what its chunks give: values, then log-sums."""
        model = self.model
        block, page = block_of(model.head_dim), self._pages[0].keys.shape[2]
        max_tiles = triton.cdiv(max_pages * page, block)
        window = max(layer.window for layer in model.layers)
        if all(layer.window for layer in model.layers):
            max_tiles = min(max_tiles, window // block + 2)
        cut = cut_contexts(rows, model.kv_heads, model.head_dim, max_tiles, self.device.processors)
        lines = rows * cut.row_chunks * model.heads
        return cut, torch.empty(lines * (model.head_dim + 1), dtype=torch.float32, device=model.device)

    def _attend(
        self, index: int, positions: Tensor, slots: Tensor, block_table: Tensor, rows: int, cut: Cut, partial: Tensor,
        overlap: bool = True,
    ) -> None:  # fmt: skip
        """Attention of a layer. `overlap` False: it asks for nothing before the kernel before it has ended."""
        model, scratch, layer = self.model, self._scratch, self.model.layers[index]
        keys, values = self._pages[index]
        dim, rotary, group = model.head_dim, model.rotary, model.heads // model.kv_heads
        cos, sin = rotary if rotary is not None else (scratch["state"],) * 2
        norms = layer.query_norm, layer.key_norm
        scales = (scratch["state"] if norm is None else norm.scale for norm in norms)
        eps = (0.0 if norm is None else norm.eps for norm in norms)
        kinds = [0 if norm is None else 1 if norm.scale.shape[0] == dim else 2 for norm in norms]
        wide, merged = power_of_two(dim), triton.next_power_of_2(group)
        launcher = self._launcher(
            attend_kernel,
            {
                "HEADS": model.heads,
                "KV": model.kv_heads,
                "GROUP": group,
                "DIM": dim,
                "PAGE": keys.shape[2],
                "BLOCK": block_of(dim),
                "BLOCK_GROUP": power_of_two(group),
                "BLOCK_DIM": wide,
                "BLOCK_WIDE": triton.next_power_of_2(model.heads * dim),
                "MERGE_GROUP": merged,
                "MERGE_CHUNKS": max(1, min(triton.next_power_of_2(cut.row_chunks), 2048 // (merged * wide))),
                "LEAST": least_tiles(dim),
                "ROTATES": layer.rotates and rotary is not None,
                "QUERY_NORM": kinds[0],
                "KEY_NORM": kinds[1],
                "WINDOW": layer.window > 0,
                "NATIVE": model.dtype != torch.float32,
                "num_warps": 8 if wide >= 128 else 4,
                "num_stages": 2,
            },
            overlap,
        )
        inputs = scratch["qkv"], cos, sin, *scales, keys, values, block_table, slots, positions
        lines = rows * cut.row_chunks * model.heads
        outputs = partial, partial[lines * dim :], scratch["counters"], scratch["attended"]
        options = *eps, layer.attention_scale, layer.window, rows, *cut
        grid = rows * model.kv_heads * cut.row_chunks, 1, 1
        launcher(grid, (*inputs, *outputs, *options, block_table.stride(0)))

    def _launcher(
        self, kernel: Any, constants: dict[str, Any], overlap: bool = True
    ) -> Callable[[tuple[int, int, int], tuple[Any, ...]], Any]:
        overlap = overlap and self.device.overlap
        options = {"OVERLAP": overlap, **({"launch_pdl": True} if overlap else {})}
        key = kernel, overlap, *constants.items()
        if self._wanted is not None:
            return lambda grid, args: self._want(key, lambda: kernel.warmup(*args, grid=grid, **constants, **options))
        launcher = self._launchers.get(key)
        if launcher is None:
            launcher = self._launchers[key] = Launcher(kernel, {**constants, **options})
        return launcher

    def _want(self, key: Any, compile_kernel: Callable[[], object]) -> None:
        def on_device() -> None:
            # A thread of a pool starts on the first device.
            with torch.cuda.device(self.model.device) if self.model.embedding.is_cuda else nullcontext():
                compile_kernel()

        if self._wanted is not None:
            self._wanted.setdefault(key, on_device)
