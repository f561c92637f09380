"""Masks of grammars on logits: the op against a loop, and its Triton kernel in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import Interpreter

from hybridgen.kernels.sampling.allowed import keep_allowed

INF = float("inf")


def test_only_named_rows_lose_what_has_no_bit() -> None:
    logits = torch.randn(4, 70)
    logits[2, [5, 6]] = float("nan")
    before, bits = logits.clone(), torch.zeros(2, 3, dtype=torch.int32)
    bits[0, 0], bits[0, 2] = -(2**31), 32  # tokens 31 and 69
    bits[1, 1] = 1  # token 32
    bits = torch.cat((bits, torch.zeros(1, 3, dtype=torch.int32)))
    keep_allowed(logits, torch.tensor([2, 0, -1]), bits)  # the last line is for nobody
    assert torch.equal(logits[[1, 3]], before[[1, 3]])
    kept = {2: (31, 69), 0: (32,)}
    for row, tokens in kept.items():
        for token in range(70):
            value = logits[row, token]
            if row == 2 and token in (5, 6):
                assert value.isnan()
            else:
                assert value == (before[row, token] if token in tokens else -INF)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"give \[B, V\]"):
        keep_allowed(torch.zeros(2, 65), torch.tensor([0]), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"give \[B, V\]"):
        keep_allowed(torch.zeros(2, 64), torch.tensor([0]), torch.zeros(2, 2, dtype=torch.int32))


def test_the_kernel_in_the_interpreter(triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("allowed_interpreter.py"), "check")
