"""States of other kinds than the package has, to try the contract with."""

from __future__ import annotations

import torch


class PerSlot:
    """A running sum by slot, as a recurrent layer has one: not rerunnable, so an update counts once committed."""

    bytes_per_page = 0
    rerunnable = False

    def __init__(self, bytes_per_slot: int = 4) -> None:
        self.bytes_per_slot = bytes_per_slot
        self.committed: list[tuple[list[int], list[int]]] = []

    def allocate(self, pages: int, slots: int, device: torch.device) -> None:
        self.sums = torch.zeros(slots, self.bytes_per_slot // 4, device=device)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"sums": self.sums}

    def reset(self, slot: int) -> None:
        self.sums[slot] = 0

    def marks(self) -> tuple[torch.Tensor, ...]:
        return ()

    def commit(self, slots: torch.Tensor, accepted: torch.Tensor) -> None:
        self.committed.append((slots.tolist(), accepted.tolist()))
