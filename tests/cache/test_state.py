"""Layers' states: what they allocate, and what happens when it does not fit."""

import pytest
import torch
from layer_states import PerSlot

from hybridgen.cache import LatentShape, LayerShape, LayerState, PagedKV, PagedLatent, allocate, total_bytes
from hybridgen.errors import OutOfMemoryError

CPU = torch.device("cpu")


def paged(dtype: torch.dtype = torch.bfloat16) -> tuple[PagedKV, PagedKV]:
    first, second = (PagedKV(shape, 16, dtype) for shape in (LayerShape(2, 16, 8), LayerShape(1, 8, 8)))
    return first, second


def bytes_of(states: tuple[LayerState, ...]) -> int:
    return sum(t.numel() * t.element_size() for state in states for t in state.tensors().values())


def test_pages_have_the_shapes_of_their_layers() -> None:
    first, second = paged()
    allocate((first, second), 3, 5, CPU)
    assert first.pages.keys.shape == (3, 2, 16, 16)
    assert first.pages.values.shape == (3, 2, 16, 8)
    assert second.pages.keys.shape == (3, 1, 16, 8)
    assert first.pages.keys.dtype == torch.bfloat16
    assert not any(t.any() for t in first.tensors().values())


def test_bytes_are_what_is_allocated() -> None:
    states: tuple[LayerState, ...] = (*paged(), PerSlot(12))
    allocate(states, 3, 5, CPU)
    assert bytes_of(states) == total_bytes(states, 3, 5) == 3 * 16 * 2 * (2 * 24 + 16) + 5 * 12


def test_latents_are_stored_once_for_all_heads() -> None:
    state = PagedLatent(LatentShape(16, 8), 8, torch.bfloat16)
    with pytest.raises(RuntimeError, match="allocate"):
        state.tensors()
    allocate((state,), 3, 5, CPU)
    assert state.latents.shape == (3, 1, 8, 24)
    assert bytes_of((state,)) == total_bytes((state,), 3, 5) == 3 * state.bytes_per_page == 3 * 8 * 24 * 2
    assert state.bytes_per_position == 24 * 2


def test_a_position_is_its_share_of_a_page() -> None:
    state = paged()[0]
    assert state.bytes_per_position == 2 * 24 * 2
    assert state.bytes_per_page == 16 * state.bytes_per_position


def test_allocating_again_replaces_the_tensors() -> None:
    states = paged()
    allocate(states, 1, 5, CPU)
    allocate(states, 4, 5, CPU)
    assert {len(t) for state in states for t in state.tensors().values()} == {4}


def test_the_named_tensors_are_the_pages() -> None:
    (state, _) = paged()
    with pytest.raises(RuntimeError, match="allocate"):
        state.tensors()
    allocate((state,), 2, 2, CPU)
    assert state.tensors()["keys"] is state.pages.keys
    assert state.tensors()["values"] is state.pages.values


def test_paged_writes_stay_when_a_slot_starts_anew_or_a_step_is_committed() -> None:
    (state, _) = paged()
    allocate((state,), 2, 2, CPU)
    state.pages.keys.fill_(1)
    state.reset(0)
    state.commit(torch.tensor([0]), torch.tensor([1]))
    assert state.rerunnable
    assert bool((state.pages.keys == 1).all())


class Full(PagedKV):
    """A layer that the device has no room for."""

    def __init__(self, error: Exception) -> None:
        super().__init__(LayerShape(1, 8, 8), 16, torch.float32)
        self.error = error

    def allocate(self, pages: int, slots: int, device: torch.device) -> None:
        if pages:
            raise self.error
        super().allocate(pages, slots, device)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't allocate memory: you tried to allocate"),
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_what_does_not_fit_says_so_and_keeps_nothing(error: Exception) -> None:
    states = (paged()[0], Full(error))
    with pytest.raises(OutOfMemoryError, match=rf"{total_bytes(states, 7, 3):,} bytes \(7 pages\).*lower kv_memory"):
        allocate(states, 7, 3, CPU)
    assert bytes_of(states) == 0


def test_another_error_is_not_taken_for_a_full_device() -> None:
    with pytest.raises(RuntimeError, match="no kernel"):
        allocate((Full(RuntimeError("no kernel")),), 7, 3, CPU)
