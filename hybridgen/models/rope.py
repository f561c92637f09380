"""Rotary tables that depend on a request's length, per token.

Hugging Face's `dynamic` and `longrope` rotary modules take the longest position of the whole batch, so that one long
request changes the others' output, and rewrite their own buffers. `PerTokenRope` takes the length of each token's
own request instead: `rope_lengths` is the prompt's length for a prompt token and position + 1 for a generated one,
which is what Hugging Face computes when the request is alone.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybridgen.errors import UnsupportedModelError
from hybridgen.models.attention import StepMetadata

LENGTH_DEPENDENT = ("dynamic", "longrope")


class PerTokenRope(nn.Module):
    """cos and sin [1, T, dim] for T packed tokens whose requests have different lengths.

    Args:
        original: Hugging Face's module.

    Raises:
        UnsupportedModelError: it computes something else.
    """

    short: torch.Tensor
    long: torch.Tensor
    exponents: torch.Tensor

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        config: Any = original.config
        self.kind = str(original.rope_type)
        self.step: StepMetadata | None = None
        self.switch_length: int | None = None
        """The length at which the request is prefilled again, if generate() does that to the model; whoever puts this
        module into one says so."""
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
        self.scalings = _scalings(original, self)
        """Up to the limit, and beyond."""
        self.interleaved = False
        _fit(original, self)

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
        scaling: Any = self.scalings[0]
        if scaling != self.scalings[1]:
            scaling = torch.where((lengths > self.limit)[..., None], self.scalings[1], scaling)
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def _device(rope: nn.Module) -> torch.device:
    return cast(torch.Tensor, rope.inv_freq).device


def _unknown(original: nn.Module, ours: PerTokenRope) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(original).__name__} scales rotary positions in a way that hybridgen does not know (rope_type "
        f"{ours.kind!r}); remove the scaling from the config or use another model"
    )


def _around(ours: PerTokenRope) -> tuple[int, int]:
    """A long and then a short length: both tables, and the original's buffers end as they began."""
    return ours.limit + 3, ours.limit - 1


@torch.no_grad()
def _scalings(original: nn.Module, ours: PerTokenRope) -> tuple[float, float]:
    """By what the original multiplies cos and sin of a short text and of a long one: PhiMoE has two numbers."""
    found = []
    for length in _around(ours):
        positions = torch.tensor([[0, length - 1]], device=_device(original))
        table = original(torch.zeros(1, device=positions.device), positions)
        if not isinstance(table, tuple):  # DeepSeek-V2's are complex numbers
            raise _unknown(original, ours)
        found.append(float(table[0][0, 0, 0]))  # cos(0) times it
    return found[1], found[0]


def _fit(original: nn.Module, ours: PerTokenRope) -> None:
    """Find how the original lays its frequencies out, by comparing: each twice in place, or in two halves; and whether
    it has a table for long texts at all, which PhiMoE's does not use.

    Raises:
        UnsupportedModelError: nothing reproduces the original module.
    """
    tables = [ours.long, ours.short] if ours.kind == "longrope" else [None]
    for table in tables:
        if table is not None:
            ours.long = table.clone()
        for ours.interleaved in (False, True):
            if all(_agree(original, ours, length) for length in _around(ours)):
                return
    raise _unknown(original, ours)


@torch.no_grad()
def _agree(original: nn.Module, ours: PerTokenRope, length: int) -> bool:
    x = torch.zeros(1, dtype=torch.float32, device=_device(original))
    positions = torch.arange(max(0, length - 4), length, device=x.device)[None]
    expected = original(x, positions)
    actual = ours.table(positions, torch.full_like(positions, length), x.dtype)
    return all(a.shape == e.shape and torch.allclose(a, e, atol=1e-4) for a, e in zip(actual, expected, strict=True))


def _length_dependent(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of those that look at the length.

    Raises:
        UnsupportedModelError: one has a kind for each type of layers.
    """
    found = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kinds = getattr(child, "rope_type", None)
            if isinstance(kinds, dict) and any(kind in LENGTH_DEPENDENT for kind in kinds.values()):
                raise UnsupportedModelError(
                    f"{type(child).__name__} has rope types {kinds} by layer type; hybridgen runs "
                    f"{' and '.join(LENGTH_DEPENDENT)} only where all layers share one"
                )
            if isinstance(kinds, str) and kinds in LENGTH_DEPENDENT:
                found.append((parent, name, child))
    return found


def check_ropes(model: nn.Module) -> None:
    """What `replace_length_dependent_rope` raises, of a model on the meta device.

    Raises:
        UnsupportedModelError: a module scales positions in a way that is not known.
    """
    for _, _, module in _length_dependent(model):
        with torch.device("cpu"):
            real = cast(Any, type(module))(module.config)
        PerTokenRope(real)


def prefilled_again(model: Any, limit: int) -> int | None:
    """The length of a text at which generate() drops the model's cache, because its rotary table changes there; None:
    it goes on with the keys that it has, as all models do but Phi-3 and PhiMoE.

    Args:
        limit: the longest text of the first table.
    """
    whole = getattr(model, "whole", model)
    if type(whole).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return None
    stated = getattr(model.config, "original_max_position_embeddings", None)
    lengths = {limit + 1} | ({stated + 1} if isinstance(stated, int) else set())
    return next((length for length in sorted(lengths) if _drops_cache(whole, length)), None)


def _drops_cache(model: Any, length: int) -> bool:
    cache, kept = DynamicCache(), torch.zeros(1, 1, length - 1, 1)
    cache.update(kept, kept, 0)
    ids = torch.zeros(1, length, dtype=torch.long)
    mask = torch.ones_like(ids)
    inputs = model.prepare_inputs_for_generation(ids, **{_CACHE: cache}, attention_mask=mask, use_cache=True)
    return inputs.get(_CACHE) is None


_OWN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if "cache" in _OWN else "past_key_values"
"""What generate() calls it; the second name is from before transformers 5.24."""


def replace_length_dependent_rope(model: nn.Module, replaced: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Swap `dynamic` and `longrope` modules for `PerTokenRope`.

    Args:
        replaced: gets (parent, name, original) of each, for `restore_rope`, also when a later one fails.

    Raises:
        UnsupportedModelError: a module scales positions in a way that is not known.
    """
    for parent, name, child in _length_dependent(model):
        ours = PerTokenRope(child)
        if ours.kind == "longrope":
            ours.switch_length = prefilled_again(model, ours.limit)
        setattr(parent, name, ours)
        replaced.append((parent, name, child))


def restore_rope(replaced: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Undo `replace_length_dependent_rope`."""
    for parent, name, original in replaced:
        setattr(parent, name, original)
