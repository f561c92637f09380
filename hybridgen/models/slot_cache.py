"""What a mixer takes for transformers' cache: the states of its layer in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SlotCache:
    """What a mixer takes for its cache, in one call.

    It has what transformers' `Cache` offers mixers from 5.17 on: `has_previous_state()` and `layers[i].conv_states`
    there, `get_conv_state()` and `get_recurrent_state()` later.
    """

    record_past = False

    def __init__(self, convolution: Tensor | None, recurrent: Tensor | None, kernel: int, previous: bool) -> None:
        """
        Args:
            convolution: [B, channels, kernel], which the mixer may change in place; `recurrent` alike.
            previous: whether tokens came before.
        """
        self.conv_states: list[Any] = [convolution]
        self.recurrent_states: list[Any] = [recurrent]
        self._kernel = kernel
        self._previous = previous

    @property
    def layers(self) -> _Everywhere:
        """The same whatever the layer."""
        return _Everywhere(self)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether tokens came before."""
        return self._previous

    def is_recording_past(self, layer_idx: int) -> bool:
        """No: nothing is taken back."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """[B, channels, kernel], or None before the first token."""
        return self.conv_states[0] if self._previous else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """[B, ...], or None before the first token."""
        return self.recurrent_states[0] if self._previous else None

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the last inputs; returns those that were kept and the new ones, [B, channels, at least kernel]."""
        if self._previous:
            conv_states = torch.cat([self.conv_states[0].to(conv_states.dtype), conv_states], dim=-1)
        elif conv_states.shape[-1] < self._kernel:
            conv_states = nn.functional.pad(conv_states, (self._kernel - conv_states.shape[-1], 0))
        self.conv_states[0] = conv_states[..., -self._kernel :]
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep a new state."""
        self.recurrent_states[0] = recurrent_states
        return recurrent_states


class _Everywhere:
    def __init__(self, layer: SlotCache) -> None:
        self._layer = layer

    def __getitem__(self, index: int) -> SlotCache:
        return self._layer
