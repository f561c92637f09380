"""Rotary tables that depend on a request's length, per token.

Hugging Face's `dynamic` and `longrope` rotary modules take the longest position of the whole batch, so that one long
request changes the others' output, and rewrite their own buffers. `PerTokenRope` takes the length of each token's
own request instead: `rope_lengths` is the prompt's length for a prompt token and position + 1 for a generated one,
which is what Hugging Face computes when the request is alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybridgen.errors import UnsupportedModelError
from hybridgen.models.attention import StepMetadata

LENGTH_DEPENDENT = ("dynamic", "longrope")


class PerTokenRope(nn.Module):
    """cos and sin [1, T, dim] for T packed tokens whose requests have different lengths."""

    short: torch.Tensor
    long: torch.Tensor
    exponents: torch.Tensor

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        config: Any = original.config
        self.kind = str(original.rope_type)
        self.scaling = float(original.attention_scaling)  # type: ignore[arg-type]
        self.step: StepMetadata | None = None
        parameters = config.rope_parameters
        device = _device(original)
        if self.kind == "longrope":
            self.limit = int(parameters["original_max_position_embeddings"])
            short, _ = ROPE_INIT_FUNCTIONS["longrope"](config, device, seq_len=None)
            long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, device, seq_len=self.limit + 1)
            self.register_buffer("long", long.float(), persistent=False)
        else:
            self.limit = int(config.max_position_embeddings)
            short, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, device, seq_len=None)
            self.factor = float(parameters["factor"])
            self.base = float(parameters["rope_theta"])
            self.dim = 2 * short.shape[0]
            exponents = torch.arange(0, self.dim, 2, device=device).float() / self.dim
            self.register_buffer("exponents", exponents, persistent=False)
        self.register_buffer("short", short.float(), persistent=False)
        self.interleaved = _is_interleaved(original, self)

    @property
    def switch_length(self) -> int | None:
        """The length at which cached keys go stale and the request is prefilled again (longrope only)."""
        return self.limit + 1 if self.kind == "longrope" else None

    def frequencies(self, lengths: torch.Tensor) -> torch.Tensor:
        """Inverse frequencies [..., dim / 2] for requests of these lengths."""
        if self.kind == "longrope":
            return torch.where((lengths > self.limit)[..., None], self.long, self.short)
        scaled = lengths.clamp(min=self.limit).float()
        growth = self.factor * scaled / self.limit - (self.factor - 1)
        base = self.base * growth ** (self.dim / (self.dim - 2))
        return 1.0 / base[..., None] ** self.exponents

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin in x's dtype for `position_ids` [1, T]."""
        if self.step is None:
            raise RuntimeError("PerTokenRope ran outside a hybridgen step")
        return self.table(position_ids, self.step.rope_lengths[None], x.dtype)

    def table(
        self, positions: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for positions and lengths of equal shape."""
        angles = positions[..., None].float() * self.frequencies(lengths)
        angles = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat((angles, angles), -1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


def _device(rope: nn.Module) -> torch.device:
    return cast(torch.Tensor, rope.inv_freq).device


def _is_interleaved(original: nn.Module, ours: PerTokenRope) -> bool:
    """Whether the original repeats each frequency in place rather than in two halves; found by comparing.

    Raises:
        UnsupportedModelError: neither layout reproduces the original module.
    """
    device = _device(original)
    x = torch.zeros(1, dtype=torch.float32, device=device)
    for interleaved in (False, True):
        ours.interleaved = interleaved
        # A long and then a short sequence: both tables, and the original's buffers end as they began.
        if all(_agree(original, ours, x, length) for length in (ours.limit + 3, ours.limit - 1)):
            return interleaved
    raise UnsupportedModelError(
        f"{type(original).__name__} scales rotary positions in a way that hybridgen does not know (rope_type "
        f"{ours.kind!r}); remove the scaling from the config or use another model"
    )


@torch.no_grad()
def _agree(original: nn.Module, ours: PerTokenRope, x: torch.Tensor, length: int) -> bool:
    positions = torch.arange(max(0, length - 4), length, device=x.device)[None]
    expected = original(x, positions)
    if not isinstance(expected, tuple):  # DeepSeek-V2's are complex numbers
        return False
    actual = ours.table(positions, torch.full_like(positions, length), x.dtype)
    return all(a.shape == e.shape and torch.allclose(a, e, atol=1e-4) for a, e in zip(actual, expected, strict=True))


def replace_length_dependent_rope(model: nn.Module, replaced: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Swap `dynamic` and `longrope` modules for `PerTokenRope`.

    Args:
        replaced: gets (parent, name, original) of each, for `restore_rope`, also when a later one fails.

    Raises:
        UnsupportedModelError: a module scales positions in a way that is not known.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kinds = getattr(child, "rope_type", None)
            if isinstance(kinds, dict) and any(kind in LENGTH_DEPENDENT for kind in kinds.values()):
                raise UnsupportedModelError(
                    f"{type(child).__name__} has rope types {kinds} by layer type; hybridgen runs "
                    f"{' and '.join(LENGTH_DEPENDENT)} only where all layers share one"
                )
            if kinds in LENGTH_DEPENDENT:
                setattr(parent, name, PerTokenRope(child))
                replaced.append((parent, name, child))


def restore_rope(replaced: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Undo `replace_length_dependent_rope`."""
    for parent, name, original in replaced:
        setattr(parent, name, original)
