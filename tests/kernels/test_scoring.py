"""Log-probabilities of given tokens: the op against torch, in blocks and at the edges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import Interpreter

from hybridgen.kernels.scoring import logprobs
from hybridgen.kernels.scoring.logprobs import token_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "k"), [(1, 2, 1), (40, 257, 5), (16, 33, 33), (3, 1, 0)])
def test_they_are_those_of_log_softmax(rows: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocab, generator=generator) * 20).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    found, ids, top = token_logprobs(logits, targets, k)
    expected = logits.double().log_softmax(-1)
    assert found.dtype == top.dtype == torch.float32
    assert torch.allclose(found.double(), expected.gather(-1, targets[:, None])[:, 0], atol=1e-5)
    assert ids.shape == top.shape == (rows, max(k, 1))
    assert torch.allclose(top.double(), expected.topk(max(k, 1)).values, atol=1e-5)
    assert torch.equal(ids[:, 0], logits.float().argmax(-1))
    for row in range(rows):
        place = (ids[row] == targets[row]).nonzero()
        if len(place):  # one number for one token, not two that differ in a last bit
            assert top[row, place[0, 0]] == found[row]


def test_of_equal_ids_the_lowest_comes_first() -> None:
    logits = torch.zeros(2, 50)
    logits[1, [7, 30]] = 5.0
    _, ids, top = token_logprobs(logits, torch.tensor([3, 30]), 4)
    assert ids[:, 0].tolist() == [0, 7]
    assert ids[1, :2].tolist() == [7, 30]
    assert top[1, 0] == top[1, 1]
    assert torch.equal(ids.sort(-1).values.unique_consecutive(dim=-1), ids.sort(-1).values)


def test_infinite_and_missing_logits() -> None:
    inf = float("inf")
    logits = torch.tensor([[0.0, -inf, 0.0], [float("nan"), 1.0, 2.0], [-inf, -inf, 3.0]])
    found, _, top = token_logprobs(logits, torch.tensor([1, 1, 2]), 1)
    assert found[0] == -inf
    assert found[1].isnan()
    assert top[1].isnan().all()
    assert found[2] == 0.0


def test_no_rows() -> None:
    found, ids, top = token_logprobs(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), 3)
    assert found.shape == (0,)
    assert ids.shape == top.shape == (0, 3)


def test_nothing_as_wide_as_the_logits_is_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes `_ROWS` rows at a time."""
    seen: list[int] = []
    real = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: seen.append(self.shape[0]) or real(self))
    token_logprobs(torch.randn(100, 7).bfloat16(), torch.zeros(100, dtype=torch.int64), 2)
    assert max(seen) == logprobs._ROWS


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits \[2, 3\] and targets \[3\]"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="k=4"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 4)


def test_the_kernel_in_the_interpreter(triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("scoring_interpreter.py"), "check")
