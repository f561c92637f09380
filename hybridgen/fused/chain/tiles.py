"""Tiles of the chain's projections: defaults by shape, and candidates; `search` tries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import triton

PROJECTIONS = ("qkv", "out", "gate_up", "down", "head")


class Tile(NamedTuple):
    """How a projection is cut into programs."""

    features: int
    """Output features of a program; of a gated projection, that many of each half. 16 or more, a power of two."""
    columns: int
    """Columns of one part that one iteration reads; 16 or more, a power of two."""
    splits: int
    """Parts of the inner dimension, added at the end; a power of two."""
    warps: int
    stages: int
    """Tiles in shared memory."""
    early: int
    """Whether the first tile is read into registers before the kernel before has ended."""
    ahead: int
    """Further iterations asked of the L2 cache then: 0 or a power of two."""
    slices: int = 1
    """Programs that share the inner dimension of the same features."""
    release: int = 1
    """When the next kernel's programs may start: 0 at once, 1 after the wait, 2 after the products, 3 at the end."""

    def fitted(self, rows: int, gated: bool, itemsize: int, shared_memory: int) -> Tile:
        """The same, with fewer stages and columns where a device's shared memory is short."""
        tile = self
        while tile.shared_bytes(rows, gated, itemsize) > shared_memory * 9 // 10:
            if tile.stages > 2:
                tile = tile._replace(stages=tile.stages - 1)
            elif tile.columns > 16:
                tile = tile._replace(columns=tile.columns // 2)
            else:
                break
        return tile

    def slice_length(self, inner: int) -> int:
        """Columns of a slice, whole iterations."""
        step = self.columns * self.splits
        return triton.cdiv(triton.cdiv(inner, step), self.slices) * step

    def leaves_slices_empty(self, inner: int) -> bool:
        """Whether a slice would have no columns."""
        return (self.slices - 1) * self.slice_length(inner) >= inner

    def shared_bytes(self, rows: int, gated: bool, itemsize: int) -> int:
        """Shared memory of the pipelined tiles of weights and inputs, about: one stage is on its way to registers."""
        return (
            max(1, self.stages - 1)
            * self.splits
            * self.columns
            * (self.features * (2 if gated else 1) + rows)
            * itemsize
        )


def rows_block(rows: int) -> int:
    """Rows that the kernels are compiled for: the widths that the tensor cores take."""
    return 8 if rows <= 8 else 16


def default_tile(features: int, inner: int, gated: bool, rows: int, processors: int) -> Tile:
    """A tile for a projection of `features` (of each half, if gated) by `inner`.

    What was fastest on an H200 in whole steps of 8 rows, for the shapes of Llama 3.2 1B and Llama 3.1 8B
    (`benchmarks/fused.py`).
    """
    programs = triton.cdiv(features, 16)
    if gated and inner <= 2048 and programs >= 2 * processors:
        tile = Tile(32, 64, splits=2, warps=2, stages=4, early=0, ahead=0, release=3)
    elif gated:
        tile = Tile(16, 64, splits=2, warps=2, stages=3, early=0, ahead=0, release=2)
    elif programs >= 16 * processors and rows > 8:
        tile = Tile(64, 64, splits=2, warps=2, stages=4, early=0, ahead=2)
    elif programs >= 16 * processors:
        tile = Tile(32, 128, splits=4, warps=4, stages=3, early=0, ahead=0)
    elif features > inner and programs > 2 * processors:
        tile = Tile(16, 128, splits=2, warps=2, stages=4, early=1, ahead=2, release=0)
    elif features > inner:
        tile = Tile(16, 128, splits=2, warps=2, stages=5, early=0, ahead=0)
    elif programs > processors and inner > features:
        tile = Tile(16, 64, splits=4, warps=4, stages=5, early=0, ahead=2, release=2)
    elif programs > processors:
        tile = Tile(16, 256, splits=2, warps=2, stages=3, early=0, ahead=0, release=2)
    elif inner > features:
        tile = Tile(16, 256, splits=2, warps=2, stages=4, early=0, ahead=0)
    else:
        tile = Tile(16, 64, splits=4, warps=4, stages=6, early=0, ahead=2)
    columns = max(16, min(tile.columns, triton.next_power_of_2(triton.cdiv(inner, tile.splits))))
    iterations = triton.next_power_of_2(triton.cdiv(inner, columns * tile.splits))
    return tile._replace(columns=columns, ahead=min(tile.ahead, iterations))


def candidates(
    features: int, inner: int, gated: bool, rows: int, itemsize: int, processors: int, most_tiles: int
) -> list[Tile]:
    """Tiles of different kinds worth timing; the first is the default. `variants` are of one kind.

    Args:
        most_tiles: tiles that slices may share.
    """
    default = default_tile(features, inner, gated, rows, processors)
    found = [default]
    for block, slices in ((16, 1), (32, 1), (64, 1), (32, 2), (64, 2), (64, 4), (128, 1), (32, 4), (16, 2)):
        programs = triton.cdiv(features, block) * slices
        if block * slices > 16 and programs < processors * 3 // 4:
            continue
        if slices > 1 and (programs > processors * 4 or triton.cdiv(features, block) > most_tiles):
            continue
        for splits, warps in ((4, 4), (8, 8), (2, 2), (1, 4)):
            # A part's warps share its features, 16 each.
            if warps // splits * 16 > block or (slices > 1 and warps < 4):
                continue
            for tile_bytes in (8192, 16384, 32768, 65536):
                columns = tile_bytes // (block * (2 if gated else 1) * itemsize * splits)
                if columns < 32 or columns * splits > max(inner // slices, 64) or tile_bytes > 8192 * warps:
                    continue
                stages = 3 if tile_bytes > 16384 else 4
                tile = Tile(block, columns, splits, warps, stages, 0, 0, slices)
                if not tile.leaves_slices_empty(inner):
                    found.append(tile)
    return list(dict.fromkeys(found))


def variants(tile: Tile, inner: int) -> list[Tile]:
    """The same cut with other depths and other ways to begin early."""
    iterations = triton.next_power_of_2(triton.cdiv(tile.slice_length(inner), tile.columns * tile.splits))
    releases = [tile._replace(release=release) for release in (2, 3, 1, 0)]
    starts = [(early, ahead, release) for release in (tile.release, 0) for ahead in (0, 2, 4, 8) for early in (0, 1)]
    begins = [tile._replace(early=e, ahead=ahead, release=r) for e, ahead, r in starts if ahead <= iterations]
    depths = [tile._replace(stages=stages) for stages in (2, 3, 4, 5, 6)]
    return [other for other in dict.fromkeys(releases + depths + begins) if other != tile]


def as_tiles(tiles: Mapping[str, Sequence[int]] | None) -> dict[str, Tile]:
    """Tiles from what `tune` returned.

    Raises:
        ValueError: a name or a tile is not one.
    """
    result = {}
    for key, values in (tiles or {}).items():
        name, _, block = key.partition(".")
        if name not in PROJECTIONS or block not in ("8", "16"):
            raise ValueError(f"{key!r} is no projection; give names such as 'qkv.8' or 'head.16'")
        if not len(Tile._fields) - len(Tile._field_defaults) <= len(values) <= len(Tile._fields):
            raise ValueError(f"the tile of {key!r} has {len(values)} values; give {', '.join(Tile._fields)}")
        tile = Tile(*map(int, values))
        powers = (tile.features, tile.columns, tile.splits, tile.warps, max(1, tile.ahead))
        if any(value < 1 or value & (value - 1) for value in powers) or tile.features < 16 or tile.columns < 16:
            raise ValueError(f"the tile of {key!r} is {tile}; give powers of two, 16 or more features and columns")
        if tile.stages < 1 or tile.slices < 1 or tile.early not in (0, 1) or tile.release not in range(4):
            raise ValueError(
                f"the tile of {key!r} is {tile}; give 1 or more stages and slices, early 0 or 1, release 0 to 3"
            )
        result[key] = tile
    return result
