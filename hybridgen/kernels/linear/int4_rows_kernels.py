"""int4 weights times up to 64 rows on tensor cores of compute capability 9.0: `int4_rows.cu`, and what goes before it."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

STEP = 128
ROWS = 64


@triton.jit(do_not_specialize=["rows"])
def rows_image_kernel(x, out, rows, INPUTS: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows in the order in which products take them. x, out: bfloat16 in pairs, int32 [rows, INPUTS / 2], [64 * INPUTS / 2].

    A program: 16 rows of 128 inputs. Product j of 16 inputs takes inputs 32 c + 4 j to 32 c + 4 j + 3 of each c = 0 to 3;
    the first two of them are its inputs 2 c and 2 c + 1, the others its inputs 8 + 2 c and 9 + 2 c.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    step = tl.program_id(0)
    part = tl.program_id(1)
    i = tl.arange(0, 1024)
    c = i & 3
    row = part * 16 + ((i >> 2) & 15)
    half = i >> 6  # of a product
    values = tl.load(x + row.to(tl.int64) * (INPUTS // 2) + step * 64 + c * 16 + half, mask=row < rows, other=0)
    tl.store(out + step.to(tl.int64) * 4096 + half * 256 + part * 64 + ((i >> 2) & 15) * 4 + c, values)
