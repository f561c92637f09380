"""Masks on their way to the sampler."""

from __future__ import annotations

import torch

from hybridgen.execution.masks import NOBODY, TokenMasks


def test_lines_arrive_with_their_rows_and_the_others_are_for_nobody() -> None:
    masks = TokenMasks(5, 70, torch.device("cpu"))
    places = {name: tensor.data_ptr() for name, tensor in masks.tensors().items()}
    assert masks.rows.tolist() == [NOBODY] * 5
    for rows in ((3, 0), (3, 0), (1,), (0, 1, 2, 3, 4)):
        bits = masks.open(len(rows))
        assert bits.shape == (len(rows), 3)
        bits.copy_(torch.arange(1, len(rows) + 1)[:, None].expand(-1, 3))
        masks.send(rows)
        assert masks.rows.tolist() == [*rows, *[NOBODY] * (5 - len(rows))]
        assert masks.bits[: len(rows), 0].tolist() == list(range(1, len(rows) + 1))
    masks.clear()
    assert masks.rows.tolist() == [NOBODY] * 5
    masks.open(5)
    masks.send((0, 1, 2, 3, 4))  # the same rows as before it was cleared
    assert masks.rows.tolist() == [0, 1, 2, 3, 4]
    assert {name: tensor.data_ptr() for name, tensor in masks.tensors().items()} == places


def test_the_next_lines_are_filled_while_the_last_are_copied() -> None:
    masks = TokenMasks(2, 32, torch.device("cpu"))
    first = masks.open(1)
    masks.send((0,))
    assert masks.open(1).data_ptr() != first.data_ptr()
