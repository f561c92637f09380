"""Triton: choose a token per row without sorting the vocabulary. What the ops promise: `hybridgen.sampling.choice`.

A row is cut into blocks of 2048 tokens, one program each; the kernels run one after another over all rows. A batch of
greedy rows: `scan_kernel` finds each block's largest logit, `greedy_kernel` the row's. Else:

1. `draw_first_kernel` finds each block's largest logit, which is a temperature's reference, and its best token with
   noise, by the device's quick logarithm.
2. `pick_first_kernel` computes exact noise for these, and takes the row's best token. Where no row of the batch has
   top-k, top-p or min-p, that is all.
3. `weigh_kernel` sums what comes before that token. If top-k, top-p and min-p keep it, it is the best of those that are
   kept, too: the row is settled, and the programs of all later kernels leave at once. With top-p alone, a row is
   settled with a probability of p at least.
4. `digit_kernel` finds an edge by radix selection (as `torch.topk` does, by digits of 4 bits): the logit's bits, in an
   order where a smaller key is more likely, are fixed digit by digit from the top. A launch per digit adds, for each
   value of the digit, the tokens whose higher digits agree with what is fixed so far: counts for top-k, masses for
   top-p. 4 digits for bfloat16, 5 for float16, 8 for float32; first for top-k, then for top-p, as far as a row of the
   batch may have them.
5. `draw_kernel` finds each block's best token among what is kept, as the first kernel does.
6. `pick_kernel` takes the best of these.

| batch | launches |
|---|---|
| greedy, temperature | 2 |
| min-p | 4 |
| with top-k or with top-p | 5 + digits |
| with both | 5 + 2 * digits |

Sums across blocks are of integers, so no order of arrival shows in them: masses are multiples of 2^-44 of the row's
most likely token's. On compute capability 9 each launch overlaps with the end of the one before (programmatic
dependent launch). Nothing outlives a call: the second kernel sets the sums to zero, scratch comes from torch's
allocator.

Imports Triton; only the CUDA implementations import this module.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridgen.device.launcher import Launcher, device_of
from hybridgen.kernels.sampling.arithmetic import MASS_BITS, RADIX
from hybridgen.kernels.sampling.first_kernels import draw_first_kernel, pick_first_kernel, weigh_kernel
from hybridgen.kernels.sampling.kernels import (
    RECORD,
    digit_kernel,
    draw_kernel,
    greedy_kernel,
    pick_kernel,
    scan_kernel,
)

BLOCK = 2048
"""Tokens of a program. No result depends on it."""
_WARPS = {"scan": 4, "counts": 4, "masses": 16, "draw": 4, "pick": 4}
"""Per program. A thread has 16 sums of 8 bytes for each of its tokens where masses are summed: with 4 warps they do not
fit its registers, and with 16 some of the first digit's are spilled. 8 have not been timed."""
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
    greedy: Launcher
    draw_first: Launcher
    pick_first: Launcher
    weigh: Launcher
    digits: tuple[Launcher, ...]
    draw: Launcher
    pick: Launcher


_prepared: dict[Variant, Kernels] = {}


def _prepare(variant: Variant, overlap: bool) -> Kernels:
    common: dict[str, Any] = {
        "OVERLAP": overlap,
        # A value computed in two kernels must be the same number, so nobody may contract what others do not.
        "enable_fp_fusion": False,
        **({"launch_pdl": True} if overlap else {}),
    }
    block, blocks = {"BLOCK": variant.block, **common}, {"BLOCKS": triton.next_power_of_2(variant.blocks)}
    filters = {"TOP_K": variant.top_k, "NUCLEUS": variant.nucleus}
    keys = {"DIGITS": variant.digits, "SHIFT": 32 - _KEY_BITS[variant.dtype], **filters, **block}
    first = {"SUMS": triton.next_power_of_2(variant.sums) if variant.sums else 0, "FILTERED": variant.filtered}
    passes = [False] * variant.top_k + [True] * variant.nucleus
    return Kernels(
        scan=Launcher(scan_kernel, {"num_warps": _WARPS["scan"], **block}),
        greedy=Launcher(greedy_kernel, {"num_warps": _WARPS["pick"], **blocks, **common}),
        draw_first=Launcher(draw_first_kernel, {"num_warps": _WARPS["draw"], **block}),
        pick_first=Launcher(pick_first_kernel, {"num_warps": _WARPS["pick"], **first, **blocks, **block}),
        weigh=Launcher(weigh_kernel, {"num_warps": _WARPS["draw"], **filters, **block}),
        digits=tuple(
            Launcher(
                digit_kernel,
                {"PLACE": place, "MASSES": masses, "num_warps": _WARPS["masses" if masses else "counts"], **keys},
            )
            for masses in passes
            for place in range(variant.digits)
        ),
        draw=Launcher(draw_kernel, {"num_warps": _WARPS["draw"], **keys}),
        pick=Launcher(pick_kernel, {"num_warps": _WARPS["pick"], **blocks, **keys}),
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
    kernels.scan((blocks, rows, 1), (logits, peaks, variant.vocab, variant.stride, blocks))
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
    grid, widths = (blocks, rows, 1), (reals.stride(0), integers.stride(0))
    counts = blocks, blocks, variant.sums, variant.filtered * int(RECORD), variant.filtered * 4 * blocks
    sizes = [rows * count for count in counts]
    peaks, firsts, sums, records, draws = _scratch(sum(sizes), logits.device).split(sizes)
    shape = variant.vocab, variant.stride, blocks
    kernels.draw_first(grid, (logits, peaks, firsts, reals, integers, slots, positions, *shape, *widths))
    found = logits, peaks, firsts, sums, records, reals, integers, slots, positions, tokens
    kernels.pick_first((rows, 1, 1), (*found, *shape, variant.sums, *widths))
    if not variant.filtered:
        return tokens
    if variant.sums:
        kernels.weigh(grid, (logits, records, reals, integers, slots, *shape, *widths))
    for digit in kernels.digits:
        digit(grid, (logits, sums, records, reals, integers, slots, *shape, variant.sums, *widths))
    state = logits, sums, records, draws, reals, integers, slots, positions
    kernels.draw(grid, (*state, *shape, variant.sums, *widths))
    kernels.pick((rows, 1, 1), (*state, tokens, *shape, variant.sums, *widths))
    return tokens
