"""How many pages the pool gets."""

import pytest
import torch
from layer_states import PerSlot

from hybridgen.cache import LayerShape, LayerState, PagedKV, pages_for_tokens, plan_pages, total_bytes
from hybridgen.cache.sizing import CPU_DEFAULT_BYTES
from hybridgen.errors import OutOfMemoryError

STATES = tuple(PagedKV(shape, 16, torch.float32) for shape in (LayerShape(2, 16, 16), LayerShape(2, 16, 8)))
PAGE = (2 * 32 + 2 * 24) * 16 * 4
CPU = torch.device("cpu")


def test_bytes_are_those_of_all_layers() -> None:
    assert total_bytes(STATES, 1, 5) == PAGE
    assert total_bytes((*STATES, PerSlot(100), PerSlot(20)), 3, 5) == 3 * PAGE + 5 * 120


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_for_tokens_rounds_up(tokens: int, pages: int) -> None:
    assert pages_for_tokens(tokens, 16) == pages


def plan(
    kv_memory: int | None, max_batch: int = 4, max_context: int = 100, states: tuple[LayerState, ...] = STATES
) -> int:
    return plan_pages(
        states, page_size=16, max_batch=max_batch, max_context=max_context, kv_memory=kv_memory, device=CPU
    )


def test_never_more_than_the_batch_can_use() -> None:
    assert plan(10**12) == 4 * 7 + 1
    assert plan(None) == 4 * 7 + 1


def test_no_more_than_the_memory_given() -> None:
    assert plan(5 * PAGE + 1) == 5
    assert plan(None, max_batch=4096, max_context=10**6) == CPU_DEFAULT_BYTES // PAGE


def test_slots_come_first_the_padding_slot_included() -> None:
    states = (*STATES, PerSlot(1000))
    assert plan(5 * PAGE + 5 * 1000, states=states) == 5
    assert plan(5 * PAGE + 5 * 1000 - 1, states=states) == 4


def test_a_model_without_pages_needs_only_its_slots() -> None:
    assert plan(5 * 1000, states=(PerSlot(1000),)) == 4 * 7 + 1
    with pytest.raises(OutOfMemoryError) as caught:
        plan(5 * 1000 - 1, states=(PerSlot(1000),))
    assert str(caught.value).startswith(
        "kv_memory=4,999 holds fewer than 5,000 bytes for the states of 4 requests, and at least 5,000 bytes are "
        "needed; raise kv_memory, lower max_batch, "
    )


def test_a_pool_of_states_that_does_not_fit_says_how_much_it_needs() -> None:
    states, needed = (*STATES, PerSlot(1000)), 2 * PAGE + 5 * 1000
    with pytest.raises(OutOfMemoryError, match=rf"beside 5,000 bytes for the states of 4 .*at least {needed:,} bytes"):
        plan(needed - 1, states=states)
    assert plan(needed, states=states) == 2


def test_too_little_memory_says_what_to_do() -> None:
    with pytest.raises(OutOfMemoryError, match="raise kv_memory, lower page_size"):
        plan(2 * PAGE - 1)
