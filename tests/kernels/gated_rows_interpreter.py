"""Triton's half of gate and up against torch's, in Triton's interpreter; run by test_gated_rows.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hybridgen.kernels.linear.gated_kernels import gate


def check_gate(_: int) -> None:
    """Widths within a block, of one and of several, none of which a block ends with."""
    g = torch.Generator().manual_seed(0)
    for rows, width in ((1, 7), (3, 1024), (2, 2500), (0, 8)):
        both = torch.randn(rows, 2 * width, generator=g).half()
        first, second = both.float().chunk(2, dim=-1)
        found = gate(both)
        torch.testing.assert_close(found.float(), F.silu(first) * second, rtol=2e-3, atol=1e-5)
