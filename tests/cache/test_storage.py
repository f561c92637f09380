"""The cache's tensors."""

import torch

from hybridgen.cache import BlockTable, CacheShape, LayerShape, allocate_pages

CPU = torch.device("cpu")


def test_pages_have_the_shapes_of_their_layers() -> None:
    shape = CacheShape((LayerShape(2, 16, 8), LayerShape(1, 8, 8)), page_size=16, dtype=torch.bfloat16)
    first, second = allocate_pages(shape, 3, CPU)
    assert first.keys.shape == (3, 2, 16, 16)
    assert first.values.shape == (3, 2, 16, 8)
    assert second.keys.shape == (3, 1, 16, 8)
    assert first.keys.dtype == torch.bfloat16
    total = sum(t.numel() * t.element_size() for pages in (first, second) for t in pages)
    assert total == 3 * shape.page_bytes


def test_assigning_a_slot_replaces_its_whole_row() -> None:
    table = BlockTable(2, 4, CPU)
    table.assign(1, [5, 6, 7])
    table.assign(1, [8])
    assert table.tensor.tolist() == [[0, 0, 0, 0], [8, 0, 0, 0]]
