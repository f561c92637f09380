"""States by slot: where steps read and write, and when what they wrote counts."""

import pytest
import torch

from hybridgen.cache import MixerShapes, SlotShape, SlotState, allocate, plan_pages, total_bytes
from hybridgen.errors import OutOfMemoryError

CPU = torch.device("cpu")
SLOTS = 4
"""The last one is the padding slot."""


def make() -> SlotState:
    convolution, recurrent = SlotShape((6, 3), torch.bfloat16), SlotShape((2, 4, 4), torch.float32)
    state = SlotState([MixerShapes(convolution, None), MixerShapes(convolution, recurrent)])
    allocate([state], 5, SLOTS, CPU)
    return state


def write(state: SlotState, slots: list[int], value: float) -> None:
    """What a step does: write where these slots are not read."""
    _, places = state.places(torch.tensor(slots))
    for mixer in state.mixers:
        for tensor in mixer:
            if tensor is not None:
                tensor[places] = value


def read(state: SlotState, slot: int) -> set[float]:
    places, _ = state.places(torch.tensor([slot]))
    return {float(x) for mixer in state.mixers for t in mixer if t is not None for x in t[places].unique()}


def commit(state: SlotState, slots: list[int]) -> None:
    state.commit(torch.tensor(slots), torch.ones(len(slots), dtype=torch.int64))


def test_bytes_are_what_is_allocated() -> None:
    state = make()
    assert sum(t.numel() * t.element_size() for t in state.tensors().values()) == total_bytes([state], 5, SLOTS)
    assert list(state.tensors()) == ["turns", "convolution 0", "convolution 1", "recurrent 1"]
    first = state.mixers[1]
    assert (first.convolution.dtype, first.recurrent.dtype) == (torch.bfloat16, torch.float32)


def test_what_a_step_wrote_counts_once_committed() -> None:
    state = make()
    write(state, [0, 2], 1.0)
    assert read(state, 0) == read(state, 2) == {0.0}
    write(state, [0, 2], 2.0)  # the step runs again
    commit(state, [0, 2])
    assert (read(state, 0), read(state, 1), read(state, 2)) == ({2.0}, {0.0}, {2.0})
    write(state, [0], 3.0)
    assert read(state, 0) == {2.0}
    commit(state, [0])
    assert (read(state, 0), read(state, 2)) == ({3.0}, {2.0})


def test_a_step_can_run_again_once_its_marks_are_put_back() -> None:
    state = make()
    before = [mark.clone() for mark in state.marks()]
    write(state, [1], 1.0)
    commit(state, [1])
    for mark, value in zip(state.marks(), before, strict=True):
        mark.copy_(value)
    assert read(state, 1) == {0.0}


def test_padding_reads_zeros_whatever_it_writes() -> None:
    state = make()
    for value in (float("nan"), 5.0):
        write(state, [1, 3, 3], value)
        commit(state, [1, 3, 3])
        assert read(state, 3) == {0.0}
    assert read(state, 1) == {5.0}


def test_a_reset_slot_is_zero_and_its_neighbours_are_not() -> None:
    state = make()
    for value in (1.0, 2.0):  # both places
        write(state, [0, 1], value)
        commit(state, [0, 1])
    state.reset(1)
    assert (read(state, 0), read(state, 1)) == ({2.0}, {0.0})
    commit(state, [1])
    assert read(state, 1) == {0.0}


def test_before_allocation_there_is_nothing() -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        SlotState([]).tensors()


def test_a_pool_that_does_not_fit_says_how_much_it_needs() -> None:
    state = make()
    needed = 4 * state.bytes_per_slot
    with pytest.raises(OutOfMemoryError, match=f"{needed:,} bytes for the states of 3 requests"):
        plan_pages([state], page_size=16, max_batch=3, max_context=64, kv_memory=needed - 1, device=CPU)
    assert plan_pages([state], page_size=16, max_batch=3, max_context=64, kv_memory=needed, device=CPU) == 13
