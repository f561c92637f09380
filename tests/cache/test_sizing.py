"""How many pages the pool gets."""

import pytest
import torch

from hybridgen.cache import CacheShape, LayerShape, pages_for_tokens, plan_pages
from hybridgen.cache.sizing import CPU_DEFAULT_BYTES
from hybridgen.errors import OutOfMemoryError

SHAPE = CacheShape((LayerShape(2, 16, 16), LayerShape(2, 16, 8)), page_size=16, dtype=torch.float32)
CPU = torch.device("cpu")


def test_page_bytes_counts_keys_and_values_of_all_layers() -> None:
    assert SHAPE.page_bytes == (2 * 32 + 2 * 24) * 16 * 4


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_for_tokens_rounds_up(tokens: int, pages: int) -> None:
    assert pages_for_tokens(tokens, 16) == pages


def plan(kv_memory: int | None, max_batch: int = 4, max_context: int = 100) -> int:
    return plan_pages(SHAPE, max_batch=max_batch, max_context=max_context, kv_memory=kv_memory, device=CPU)


def test_never_more_than_the_batch_can_use() -> None:
    assert plan(10**12) == 4 * 7 + 1
    assert plan(None) == 4 * 7 + 1


def test_no_more_than_the_memory_given() -> None:
    assert plan(5 * SHAPE.page_bytes + 1) == 5
    assert plan(None, max_batch=4096, max_context=10**6) == CPU_DEFAULT_BYTES // SHAPE.page_bytes


def test_too_little_memory_says_what_to_do() -> None:
    with pytest.raises(OutOfMemoryError, match="raise kv_memory"):
        plan(2 * SHAPE.page_bytes - 1)
