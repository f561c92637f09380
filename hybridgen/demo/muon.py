"""Muon: momentum whose update is made nearly orthogonal, for matrices.

After K. Jordan and others, "Muon: An optimizer for hidden layers in neural networks" (2024), with the scale of
J. Liu and others, "Muon is scalable for LLM training" (2025), so that AdamW's learning rate and weight decay fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the fifth-degree polynomial that pulls singular values towards 1."""
ROUNDS = 5


def orthogonalised(update: torch.Tensor) -> torch.Tensor:
    """A batch of matrices (n, rows, columns) with all singular values taken to about 1, in their dtype.

    The products are in bfloat16 on a GPU: Newton and Schulz's iteration does not need more.
    """
    x = update.bfloat16() if update.is_cuda else update
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; equal shapes are stepped together.

    `torch.optim.Muon` steps one matrix after another, which for matrices as small as these takes longer than
    the rest of a training step.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every matrix that has a gradient. A closure is not taken."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, matrices in shapes.items():
                self._step_equal(shape, matrices, group)

    def _step_equal(self, shape: torch.Size, matrices: list[torch.Tensor], group: dict[str, Any]) -> None:
        gradients = torch.stack([m.grad for m in matrices if m.grad is not None])
        state = self.state[matrices[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        average = state["momentum"].lerp_(gradients, 1 - group["momentum"])
        update = orthogonalised(gradients.lerp(average, group["momentum"]))
        # An orthogonal matrix's entries have this root mean square; AdamW's updates have one of about 0.2.
        rate = group["lr"] * 0.2 * max(shape) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(update.unbind()), alpha=-rate)
