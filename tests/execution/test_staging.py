"""Blocks on their way to the device."""

from __future__ import annotations

import pytest
import torch

from hybridgen.execution.staging import StagedBlock

FIELDS = {"rows": (torch.int64, (3,)), "slots": (torch.int32, (5,)), "table": (torch.int32, (2, 4))}


@pytest.mark.parametrize("buffers", [1, 2])
def test_what_is_filled_arrives(buffers: int) -> None:
    block = StagedBlock(FIELDS, torch.device("cpu"), buffers=buffers)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in block.device.items()} == FIELDS
    for turn in range(5):
        arrays = block.open()
        arrays["rows"][:] = turn
        arrays["slots"][:] = [turn, 1, 2, 3, 4]
        arrays["table"][1] = 7 + turn
        arrays["table"][0] = 0
        block.send()
        assert block.device["rows"].tolist() == [turn] * 3
        assert block.device["slots"].tolist() == [turn, 1, 2, 3, 4]
        assert block.device["table"].tolist() == [[0] * 4, [7 + turn] * 4]


def test_two_buffers_take_turns() -> None:
    block = StagedBlock(FIELDS, torch.device("cpu"), buffers=2)
    first = block.open()["rows"]
    block.send()
    second = block.open()["rows"]
    second[:] = 9
    assert first.tolist() == [0, 0, 0]
    block.send()
    assert block.open()["rows"] is first


def test_addresses_stay() -> None:
    block = StagedBlock(FIELDS, torch.device("cpu"))
    before = {name: tensor.data_ptr() for name, tensor in block.device.items()}
    for _ in range(3):
        block.open()
        block.send()
    assert {name: tensor.data_ptr() for name, tensor in block.device.items()} == before
    assert all(address % 64 == 0 for address in before.values())
