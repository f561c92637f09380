"""Which pages a slot has."""

import torch

from hybridgen.cache import BlockTable


def test_assigning_a_slot_replaces_its_whole_row() -> None:
    table = BlockTable(2, 4, torch.device("cpu"))
    table.assign(1, [5, 6, 7])
    table.assign(1, [8])
    assert table.tensor.tolist() == [[0, 0, 0, 0], [8, 0, 0, 0]]
