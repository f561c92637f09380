"""What the engine knows of each slot: its pages."""

import pytest
import torch

from hybridgen.execution.state import BlockTable


def test_assigning_a_slot_replaces_its_whole_row() -> None:
    table = BlockTable(2, 4, torch.device("cpu"))
    table.assign_all([1], [[5, 6, 7]])
    table.assign_all([1], [[8]])
    assert table.tensor.tolist() == [[0, 0, 0, 0], [8, 0, 0, 0]]


@pytest.mark.parametrize("slots", [[1], [1, 2, 3], [3, 0], [2, 1]])
def test_several_slots_at_once_equal_one_after_the_other(slots: list[int]) -> None:
    pages = [[5, 6, 7], [8], []][: len(slots)]
    one, all_ = (BlockTable(4, 4, torch.device("cpu")) for _ in range(2))
    for table in (one, all_):
        table.assign_all(range(4), [[9] * 4] * 4)
    for slot, its_pages in zip(slots, pages, strict=True):
        one.assign_all([slot], [its_pages])
    all_.assign_all(slots, pages)
    assert torch.equal(one.tensor, all_.tensor)
