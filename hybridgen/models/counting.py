"""Attention modules that number a call's tokens themselves, behind what their cache holds.

Llama 4 scales queries of layers without rotary embeddings by their positions (`attn_temperature_tuning`), which are
`arange(tokens) + past_key_values.get_seq_length()` to it. Here a call has tokens of several requests and no such cache.
So the module gets an object in the cache's place that says for each token how far its position lies from its place in
the call; their sum is the token's position. That a module counts so is read off its code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hybridgen.models.swapped import give_back, made_class


class CountingAttention(nn.Module):
    """What the class of such a module is also, once its numbers are the step's positions."""


class Positions:
    """What such a module takes for its cache, in one call."""

    def __init__(self, positions: Tensor) -> None:
        """`positions`: int64 [T], of the call's tokens."""
        self._apart = positions - torch.arange(positions.shape[0], device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        """int64 [T]: what to add to a token's place in the call."""
        return self._apart

    def update(self, key: Tensor, value: Tensor, layer_idx: int = 0, **_: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone; those from before are in pages."""
        return key, value


def counts_tokens(module: nn.Module) -> bool:
    """Whether a module attends, and numbers tokens behind its cache's."""
    kind: Any = type(module)
    return _names_them(kind)


@functools.cache
def _names_them(kind: Any) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if code is None or _cache_keyword(kind) is None:
        return False
    return {"arange", "get_seq_length", "ALL_ATTENTION_FUNCTIONS"} <= set(code.co_names)


def _cache_keyword(kind: Any) -> str | None:
    """What its forward calls the cache: `cache` from transformers 5.24 on."""
    code = inspect.unwrap(kind.forward).__code__
    names = code.co_varnames[: code.co_argcount]
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def use_positions(module: nn.Module) -> None:
    """From now on the module's numbers are the positions of the step in its `_hybridgen` attribute."""
    if not isinstance(module, CountingAttention):
        kind: Any = type(module)
        module.__class__ = _with_positions(kind)


def use_own_numbers(module: nn.Module) -> None:
    """Undo `use_positions()`."""
    give_back(module, CountingAttention)


@functools.cache
def _with_positions(kind: Any) -> Any:
    own: Callable[..., Any] = kind.forward
    keyword = _cache_keyword(kind) or "past_key_values"

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs | {keyword: Positions(self._hybridgen.step.positions)})

    return made_class(kind, CountingAttention, {"forward": forward}, globals())
