"""Triton: choose a token per row without sorting the vocabulary. What the ops promise: `hybridgen.sampling.choice`.

A row is cut into blocks of 2048 tokens, one program each; the kernels run one after another over all rows:

1. `scan_kernel` finds each block's largest logit; the row's is a temperature's reference and what greedy rows take.
2. `digit_kernel` finds an edge by radix selection (as `torch.topk` does, by digits of 4 bits): the logit's bits, in an
   order where a smaller key is more likely, are fixed digit by digit from the top. A launch per digit adds, for each
   value of the digit, the tokens whose higher digits agree with what is fixed so far: counts for top-k, masses for
   top-p. 4 digits for bfloat16, 5 for float16, 8 for float32; first for top-k, then for top-p, as far as a row of the
   batch may have them.
3. `draw_kernel` adds noise and finds each block's best candidate among what is kept. It computes noise with the
   device's quick logarithm, and exactly only in a block where two tokens are too near each other for that.
4. `pick_kernel` computes exact noise for the tokens found, and takes the best. Greedy batches go from 1 to
   `greedy_kernel`.

Where no row has top-k, top-p or min-p, `draw_unfiltered_kernel` does the work of 1 and 3 in one pass over the logits,
and `pick_unfiltered_kernel` follows.

| batch | launches |
|---|---|
| greedy, temperature | 2 |
| min-p | 3 |
| with top-k or with top-p | 3 + digits |
| with both | 3 + 2 * digits |

Sums across blocks are of integers, so no order of arrival shows in them: masses are multiples of 2^-44 of the row's
most likely token's. On compute capability 9 each launch overlaps with the end of the one before (programmatic
dependent launch). Nothing outlives a call: the scan sets the sums to zero, scratch comes from torch's allocator.

Imports Triton; only the CUDA implementations import this module.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridgen.device.launcher import Launcher, device_of
from hybridgen.kernels.sampling.arithmetic import MASS_BITS, RADIX
from hybridgen.kernels.sampling.kernels import digit_kernel, draw_kernel, greedy_kernel, pick_kernel, scan_kernel
from hybridgen.kernels.sampling.unfiltered_kernels import draw_unfiltered_kernel, pick_unfiltered_kernel

BLOCK = 2048
"""Tokens of a program. No result depends on it."""
_WARPS = {"scan": 4, "digit": 16, "draw": 4, "draw unfiltered": 4, "pick": 4}
"""Per program. With 16, two programs of `digit_kernel` fit a multiprocessor's registers, so that the next one loads its
logits while one works."""
_KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
"""Leading bits of float32 that hold a number of the dtype."""
_RADIX = int(RADIX)


class Variant(NamedTuple):
    """All that calls of one kind share, but for the number of rows."""

    dtype: torch.dtype
    vocab: int
    stride: int
    """Elements from a row of the logits to the next."""
    block: int
    top_k: bool
    nucleus: bool
    min_p: bool
    device: int | None

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return triton.cdiv(self.vocab, self.block)

    @property
    def digits(self) -> int:
        """Digits of a key."""
        return triton.cdiv(_KEY_BITS[self.dtype], (_RADIX - 1).bit_length())

    @property
    def filtered(self) -> bool:
        """Whether rows that draw may leave tokens out."""
        return self.top_k or self.nucleus or self.min_p

    @property
    def sums(self) -> int:
        """Integers of a row for selection: a part for top-k, then one for top-p."""
        return (self.top_k + self.nucleus) * self.digits * (_RADIX + 2)


class Kernels(NamedTuple):
    """The launches of a variant."""

    scan: Launcher
    digits: tuple[Launcher, ...]
    draw: Launcher
    pick: Launcher
    greedy: Launcher


_prepared: dict[Variant, Kernels] = {}


def _prepare(variant: Variant, overlap: bool) -> Kernels:
    common: dict[str, Any] = {
        "OVERLAP": overlap,
        # A value computed in two kernels must be the same number, so nobody may contract what others do not.
        "enable_fp_fusion": False,
        **({"launch_pdl": True} if overlap else {}),
    }
    blocks = {"BLOCKS": triton.next_power_of_2(variant.blocks)}
    keys = {"DIGITS": variant.digits, "SHIFT": 32 - _KEY_BITS[variant.dtype]}
    tile = {"BLOCK": variant.block, **blocks, **keys, **common}
    filters = {"TOP_K": variant.top_k, "NUCLEUS": variant.nucleus}
    passes = [{"TOP_K": False, "NUCLEUS": False}] * variant.top_k
    passes += [{"TOP_K": variant.top_k, "NUCLEUS": True}] * variant.nucleus
    sums = triton.next_power_of_2(variant.sums) if variant.sums else 0
    if variant.filtered:
        draw = Launcher(draw_kernel, {"num_warps": _WARPS["draw"], **filters, **tile})
        pick = Launcher(pick_kernel, {"num_warps": _WARPS["pick"], **filters, **tile})
    else:
        one_pass = {"BLOCK": variant.block, **common}
        draw = Launcher(draw_unfiltered_kernel, {"num_warps": _WARPS["draw unfiltered"], **one_pass})
        pick = Launcher(pick_unfiltered_kernel, {"num_warps": _WARPS["pick"], **blocks, **one_pass})
    return Kernels(
        Launcher(scan_kernel, {"BLOCK": variant.block, "SUMS": sums, "num_warps": _WARPS["scan"], **common}),
        tuple(
            Launcher(digit_kernel, {"PLACE": place, "num_warps": _WARPS["digit"], **which, **tile})
            for which in passes
            for place in range(variant.digits)
        ),
        draw,
        pick,
        Launcher(greedy_kernel, {"num_warps": _WARPS["pick"], **blocks, **common}),
    )


def _kernels_of(logits: Tensor, top_k: bool, nucleus: bool, min_p: bool, block: int) -> tuple[Tensor, Variant, Kernels]:
    """The logits with adjacent columns, and how to launch on them."""
    if logits.dtype not in _KEY_BITS:
        raise TypeError(f"logits of {logits.dtype}; give bfloat16, float16 or float32")
    if logits.shape[1] >= 1 << (63 - int(MASS_BITS)):
        raise ValueError(f"a vocabulary of {logits.shape[1]}; the sums hold up to {(1 << (63 - int(MASS_BITS))) - 1}")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    device = logits.device.index
    variant = Variant(logits.dtype, logits.shape[1], logits.stride(0), block, top_k, nucleus, min_p, device)
    kernels = _prepared.get(variant)
    if kernels is None:
        kernels = _prepared[variant] = _prepare(variant, device_of(logits).overlap)
    return logits, variant, kernels


def _scratch(count: int, device: torch.device) -> Tensor:
    """int64 [count], holding anything."""
    return torch.empty(count, dtype=torch.int64, device=device)


def launch_greedy(logits: Tensor, block: int = BLOCK) -> Tensor:
    """See `choice.choose_greedy`; `block` is a power of two."""
    rows = logits.shape[0]
    tokens = _scratch(rows, logits.device)
    if rows == 0:
        return tokens
    logits, variant, kernels = _kernels_of(logits, False, False, False, block)
    blocks = variant.blocks
    peaks = _scratch(rows * blocks, logits.device)
    kernels.scan((blocks, rows, 1), (logits, peaks, peaks, variant.vocab, variant.stride, blocks, 0))
    kernels.greedy((rows, 1, 1), (peaks, tokens, blocks))
    return tokens


def launch_sampled(
    logits: Tensor,
    reals: Tensor,
    integers: Tensor,
    slots: Tensor,
    positions: Tensor,
    top_k: bool,
    nucleus: bool,
    min_p: bool,
    block: int = BLOCK,
) -> Tensor:
    """See `choice.choose_sampled`; `block` is a power of two, 4096 at most."""
    rows = logits.shape[0]
    tokens = _scratch(rows, logits.device)
    if rows == 0:
        return tokens
    logits, variant, kernels = _kernels_of(logits, top_k, nucleus, min_p, block)
    blocks = variant.blocks
    slots, positions = slots.contiguous(), positions.contiguous()
    widths = reals.stride(0), integers.stride(0)
    grid, tables = (blocks, rows, 1), (reals, integers, slots, positions)
    if not variant.filtered:
        peaks, draws = _scratch(2 * rows * blocks, logits.device).chunk(2)
        shape = variant.vocab, variant.stride, blocks
        kernels.draw(grid, (logits, peaks, draws, *tables, *shape, *widths))
        kernels.pick((rows, 1, 1), (logits, peaks, draws, *tables, tokens, *shape, *widths))
        return tokens
    sizes = rows * blocks, rows * variant.sums, rows * 4 * blocks
    peaks, sums, draws = _scratch(sum(sizes), logits.device).split(sizes)
    shape = variant.vocab, variant.stride, blocks, variant.sums
    kernels.scan(grid, (logits, peaks, sums, *shape))
    for digit in kernels.digits:
        digit(grid, (logits, peaks, sums, reals, integers, slots, *shape, *widths))
    kernels.draw(grid, (logits, peaks, sums, draws, *tables, *shape, *widths))
    kernels.pick((rows, 1, 1), (logits, peaks, sums, draws, *tables, tokens, *shape, *widths))
    return tokens
