"""How the kernel for several columns serves more rows than a launch holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridgen.fused.executors import RowsExecutor
from hybridgen.graphs import GraphKey


class Step:
    """Leaves what tells a column apart, in a buffer that each launch overwrites."""

    def __init__(self) -> None:
        self.logits = torch.zeros(8, 3, dtype=torch.int64)
        self.launched: list[int] = []

    def __call__(self, ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        self.launched.append(len(ids))
        self.logits[: len(ids)] = torch.stack((ids, positions, slots.long()), -1)
        return self.logits[: len(ids)]

    def tensors(self) -> dict[str, Tensor]:
        return {"logits": self.logits}


def inputs(rows: int) -> Any:
    ids = torch.arange(rows) + 100
    return SimpleNamespace(ids=ids, positions=2 * ids, slots=torch.arange(rows, dtype=torch.int32).flip(0))


@pytest.mark.parametrize(("rows", "launches"), [(3, [3]), (8, [8]), (9, [8, 1]), (16, [8, 8])])
def test_more_rows_take_several_launches(rows: int, launches: list[int]) -> None:
    step, wide = Step(), torch.zeros(16, 3, dtype=torch.int64)
    executor: Any = RowsExecutor(step, 8, 1, wide=wide)  # type: ignore[arg-type]
    given = inputs(rows)
    found = executor.logits(given, None)
    assert torch.equal(found, torch.stack((given.ids, given.positions, given.slots.long()), -1))
    assert step.launched == launches
    assert any(tensor is wide for tensor in executor.tensors().values())


def test_they_are_served_where_they_were_found_faster() -> None:
    executor: Any = RowsExecutor(Step(), 8, 1, wide=torch.zeros(16, 3))  # type: ignore[arg-type]
    assert (executor.most, executor.widest) == (8, 16)
    key = GraphKey.decode(16, None)
    assert "1 to 8 rows" in executor.refuses(key)
    executor.most = 16
    assert executor.refuses(key) is None
    assert executor.refuses(GraphKey.decode(4, None, query_len=4)) is not None  # drafts: one launch


def test_without_room_for_logits_a_launch_is_all() -> None:
    executor: Any = RowsExecutor(Step(), 4, 1)  # type: ignore[arg-type]
    assert executor.widest == 4
    with pytest.raises(ValueError, match="5 tokens in launches of 4"):
        executor.logits(inputs(5), None)
