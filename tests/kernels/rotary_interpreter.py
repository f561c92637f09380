"""The Triton kernel of `rotate_and_write` in Triton's interpreter; run by test_rotary.py."""

from __future__ import annotations

import torch
from rotary_cases import CASES, inputs

from hybridgen.kernels.attention.rotary import rotate_and_write_on_cpu
from hybridgen.kernels.attention.rotary_kernels import Tuning, rotate_and_write


def check_case(number: int) -> None:
    """One of `CASES`, beside the same in torch operators."""
    case = CASES[number]
    for dtype in (torch.float32, torch.float16):
        for tune in (None, Tuning(elements=32)):
            *found, norms, places = inputs(case, dtype)
            *expected, _, wanted = inputs(case, dtype)
            out = rotate_and_write(*found, *norms, *places, tune=tune)
            reference = rotate_and_write_on_cpu(*expected, *norms, *wanted)
            tolerance = 1e-5 if dtype == torch.float32 else 2e-3
            torch.testing.assert_close(out, reference, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(places.k_pages, wanted.k_pages, rtol=tolerance, atol=tolerance)
            assert torch.equal(places.v_pages, wanted.v_pages)
