"""`publish` and `advance` on the CPU: the line they write, the state they leave, and in compiled code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hybridgen.kernels.step.advance import advance, publish

LINES, SLOTS = 4, 6  # the last slot is padding


def state(counter: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A table, a ring and a counter, filled so that every change shows."""
    table = torch.arange(100, 100 + 3 * SLOTS).view(3, SLOTS)
    ring = torch.arange(-1000, -1000 + LINES * SLOTS).view(LINES, SLOTS)
    return table, ring, torch.tensor([counter])


def step(tokens: list[int], rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, rows, lengths and generated: each row's length is 10 and its count 20 above its place."""
    place = torch.arange(len(rows))
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64), place + 10, place + 20


def naive(
    tokens: list[int], rows: list[int], table: Tensor, ring: Tensor, counter: int
) -> tuple[list[list[int]], list[list[int]]]:
    """What `advance` is to leave, in plain Python."""
    table, ring = table.tolist(), ring.tolist()
    for place, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        ring[counter % LINES][place] = token
        if row != SLOTS - 1:
            table[0][row], table[1][row], table[2][row] = max(token, 0), 10 + place, 20 + place + 1
    return table, ring


@pytest.mark.parametrize("counter", [0, 1, LINES - 1, LINES, 5 * LINES + 2, 2**40 + 3])
@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        ([7], [0]),
        ([7, 8, 9], [4, 0, 2]),
        ([-1, 8], [1, 3]),
        ([7, 8, 9, 3], [2, 5, 5, 5]),
        ([1, 2, 3], [5, 5, 5]),
        ([-1, -1], [5, 0]),
        ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]),
        ([], []),
    ],
)
def test_advance(tokens: list[int], rows: list[int], counter: int) -> None:
    table, ring, count = state(counter)
    wanted = naive(tokens, rows, table, ring, counter)
    inputs = step(tokens, rows)
    before = [tensor.clone() for tensor in inputs]
    advance(*inputs, table, ring, count)
    assert (table.tolist(), ring.tolist()) == wanted
    assert count.tolist() == [counter + 1]
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_padding_rows_change_no_state_whatever_they_hold() -> None:
    table, ring, counter = state()
    before = table.clone()
    far = torch.full((3,), 2**62)
    advance(torch.tensor([-1, 2**62, 0]), torch.full((3,), SLOTS - 1), far, far, table, ring, counter)
    assert torch.equal(table, before)


def test_lines_are_used_in_turn() -> None:
    table, ring, counter = state()
    for turn in range(3 * LINES):
        advance(*step([turn, 50 + turn], [0, 1]), table, ring, counter)
        assert ring[turn % LINES, :2].tolist() == [turn, 50 + turn]
    assert ring[:, 0].tolist() == [8, 9, 10, 11]
    assert ring[0, 2:].tolist() == list(range(-998, -994))
    assert counter.item() == 3 * LINES


@pytest.mark.parametrize("counter", [0, 3, 4, 11])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_publish(dtype: torch.dtype, counter: int) -> None:
    for shape, values in (
        ((LINES, 5), torch.arange(1, 4)),
        ((LINES, 5), torch.arange(1, 6)),
        ((LINES, 5, 8), torch.arange(1, 10).view(3, 3)),
        ((LINES, 5, 8), torch.arange(1, 41).view(5, 8)),
        ((LINES, 5, 8), torch.zeros(2, 0)),
        ((LINES, 5), torch.zeros(0)),
    ):
        values = values.to(dtype)
        ring = torch.full(shape, -7, dtype=dtype)
        wanted = ring.clone()
        for place in range(values.shape[0]):
            for column in range(values.shape[1]) if values.dim() == 2 else [()]:
                index = (place,) if column == () else (place, column)
                wanted[(counter % LINES, *index)] = values[index]
        count = torch.tensor([counter])
        publish(values, ring, count)
        assert torch.equal(ring, wanted)
        assert count.item() == counter


def test_publish_does_not_move_on() -> None:
    """What a step publishes first and `advance` last go to the same line."""
    table, ring, counter = state(6)
    logprobs = torch.zeros(LINES, SLOTS)
    publish(torch.tensor([0.5]), logprobs, counter)
    advance(*step([3], [1]), table, ring, counter)
    assert logprobs[2, 0] == 0.5
    assert ring[2, 0] == 3


def test_op_registration() -> None:
    table, ring, counter = state()
    torch.library.opcheck(torch.ops.hybridgen.advance.default, (*step([7, -1, 3], [0, 2, 5]), table, ring, counter))
    for values, into in (
        (torch.arange(3), ring),
        (torch.rand(3), torch.zeros(LINES, SLOTS)),
        (torch.rand(3, 2), torch.zeros(LINES, SLOTS, 4)),
    ):
        torch.library.opcheck(torch.ops.hybridgen.publish.default, (values, into, counter))


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        table, ring, counter = (mode.from_tensor(tensor) for tensor in state())
        inputs = [mode.from_tensor(tensor) for tensor in step([7, 8], [0, 1])]
        assert publish(inputs[0], ring, counter) is None
        assert advance(*inputs, table, ring, counter) is None
        assert table.shape == (3, SLOTS)


def test_compiled_for_any_number_of_rows() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def end(tokens: Tensor, rows: Tensor, lengths: Tensor, generated: Tensor, *state: Tensor) -> None:
        table, ring, counter = state
        publish(tokens * 2, ring, counter)
        advance(tokens + 1, rows, lengths, generated, table, ring, counter)

    compiled = torch.compile(end, fullgraph=True, backend=backend, dynamic=True)
    actual, wanted = state(2), state(2)
    for count in (2, 3, 5, 4):
        inputs = step(list(range(3, 3 + count)), list(range(count)))
        compiled(*inputs, *actual)
        end(*inputs, *wanted)
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))
    assert len(graphs) == 1
