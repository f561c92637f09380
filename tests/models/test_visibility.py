"""Which mask a predicate is, up to the longest context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils as masks

from hybridgen.models.visibility import UnknownMaskError, Visibility, read_visibility

CONTEXT = 300
NO_PADDING = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        (masks.causal_mask_function, Visibility()),
        (masks.sliding_window_causal_mask_function(1), Visibility(window=1)),
        (masks.sliding_window_causal_mask_function(2), Visibility(window=2)),
        (masks.sliding_window_causal_mask_function(130), Visibility(window=130)),
        (masks.sliding_window_causal_mask_function(CONTEXT - 1), Visibility(window=CONTEXT - 1)),
        (masks.sliding_window_causal_mask_function(CONTEXT), Visibility()),  # nothing below the context shows it
        (masks.chunked_causal_mask_function(1, NO_PADDING), Visibility(window=1)),
        (masks.chunked_causal_mask_function(2, NO_PADDING), Visibility(chunk=2)),
        (masks.chunked_causal_mask_function(100, NO_PADDING), Visibility(chunk=100)),
        (masks.chunked_causal_mask_function(CONTEXT - 1, NO_PADDING), Visibility(chunk=CONTEXT - 1)),
        (masks.chunked_causal_mask_function(CONTEXT, NO_PADDING), Visibility()),
        (lambda b, h, q, kv: (q - kv >= 0) & (q - kv < 5), Visibility(window=5)),  # the rule counts, not its name
    ],
)
def test_masks_that_run(predicate: Any, expected: Visibility) -> None:
    for vmapped in (False, True):
        assert read_visibility(predicate, CONTEXT, heads=4, vmapped=vmapped) == expected


@pytest.mark.parametrize(
    ("predicate", "words"),
    [
        (masks.bidirectional_mask_function, "position 0 sees the later position"),
        (masks.sliding_window_bidirectional_mask_function(5), "sees the later position"),
        (lambda b, h, q, kv: (kv <= q) | (kv < 3), "position 0 sees the later position 1"),  # a prefix
        (lambda b, h, q, kv: (kv <= q) | ((q == 1) & (kv == 200)), "position 1 sees the later position 200"),
        (lambda b, h, q, kv: (kv <= q) & ((q - kv) % 2 == 0), "not causal, a sliding window or chunks"),  # dilated
        (lambda b, h, q, kv: (kv <= q) & ((kv < 4) | (q - kv < 8)), "not causal, a sliding window"),  # first ones stay
        (lambda b, h, q, kv: (kv <= q) & ((h == 0) | (q - kv < 8)), "not causal, a sliding window"),  # by head
        (lambda b, h, q, kv: kv < q, "does not see position"),  # not even itself
        (lambda b, h, q, kv: (kv <= q) & ((q < 128) | (q - kv < 50)), "not causal, a sliding"),  # from some length on
        (lambda b, h, q, kv: torch.where(kv <= q, 0.0, -1e9), "gives torch.float32 values"),
        (masks.blockwise_overlay(torch.zeros(1, 8, dtype=torch.long)), "depends on more than positions"),
        (lambda b, h, q, kv: q.new_ones((), device="meta", dtype=torch.bool), "depends on more than positions"),
    ],
)
def test_other_masks_are_described(predicate: Any, words: str) -> None:
    with pytest.raises(UnknownMaskError, match=words):
        read_visibility(predicate, CONTEXT, heads=4)


def test_contexts_of_millions_are_read_in_part() -> None:
    assert read_visibility(masks.causal_mask_function, 2**40, heads=1) == Visibility()
    assert read_visibility(masks.sliding_window_causal_mask_function(4096), 2**63, heads=1) == Visibility(window=4096)
    with pytest.raises(UnknownMaskError, match="not causal, a sliding window"):
        read_visibility(masks.sliding_window_causal_mask_function(2**30), 2**40, heads=1)


def test_what_a_value_says() -> None:
    assert [str(v) for v in (Visibility(), Visibility(window=8), Visibility(chunk=4))] == [
        "causal",
        "window 8",
        "chunk 4",
    ]
    positions = torch.tensor([0, 3, 7, 8, 20])
    assert Visibility().first(positions).tolist() == [0] * 5
    assert Visibility(window=8).first(positions).tolist() == [0, 0, 0, 1, 13]
    assert Visibility(chunk=4).first(positions).tolist() == [0, 0, 4, 8, 20]
