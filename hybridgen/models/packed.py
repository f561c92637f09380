"""Prefill of gated delta nets: all runs of a call at once, whatever their lengths.

A mixer's own code runs, on [1, T, hidden], with two functions in the place of those that it names: a convolution for
which each run's last inputs of before stand in front of its tokens, and the rule of `kernels.delta_rule`, which is told
where runs begin. It needs no more than the names of these two, by which transformers' gated delta nets are known.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybridgen.kernels import delta_rule
from hybridgen.models.torch_functions import replaced, with_functions

_CONVOLUTION, _RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
_WRONG = 3e-2
"""A difference that 16 bits do not explain."""


class Runs(NamedTuple):
    """Where packed runs lie. Laid out, a run is what its convolution keeps from before, then its tokens."""

    starts: Tensor
    """int64 [runs + 1]"""
    chunks: Tensor
    """int64 [chunks, 2]: see `delta_rule`."""
    laid_out: Tensor
    """int64: of what was kept of all runs and then all tokens, the one in each place."""
    tokens: Tensor
    """int64 [T]: the place of each token."""
    last: Tensor
    """int64 [runs * kernel]: the places that each run keeps."""


def runs_of(lengths: Sequence[int], kernel: int, device: torch.device) -> Runs:
    """`kernel`: how many inputs a convolution keeps of each run."""
    count, each = len(lengths), np.asarray(lengths)
    rows, starts = np.arange(count), np.concatenate(([0], np.cumsum(each)))
    pieces = -(-each // delta_rule.CHUNK)
    chunks = np.repeat(rows, pieces), np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    tokens = np.arange(starts[-1]) + np.repeat((rows + 1) * kernel, each)
    kept = (starts[:-1] + rows * kernel)[:, None] + np.arange(kernel)
    laid_out = np.empty(len(tokens) + kept.size, dtype=np.int64)
    laid_out[tokens] = kept.size + np.arange(len(tokens))
    laid_out[kept.ravel()] = np.arange(kept.size)
    last = (kept + each[:, None]).ravel()
    parts = starts, np.stack(chunks, axis=1).ravel(), laid_out, tokens, last
    numbers = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    found = numbers.split([len(part) for part in parts])
    return Runs(found[0], found[1].view(-1, 2), *found[2:])


class PackedCache:
    """What a mixer takes for its cache in one call for all runs; see `mixers.SlotCache`."""

    record_past = False

    def __init__(self, convolution: Tensor, recurrent: Tensor, runs: Runs) -> None:
        """`convolution`: [runs, channels, kernel], `recurrent` [runs, ...], zeros of runs without a token before."""
        self.conv_states: list[Any] = [convolution]
        self.recurrent_states: list[Any] = [recurrent]
        self._runs = runs

    @property
    def layers(self) -> Any:
        """The same whatever the layer."""
        return _Everywhere(self)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Yes, if only of zeros."""
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        """No: nothing is taken back."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """[runs, channels, kernel]"""
        return self.conv_states[0]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """[runs, ...]"""
        return self.recurrent_states[0]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the last inputs of each run; returns runs laid out, [1, channels, places]."""
        before = self.conv_states[0]
        rows, channels, kernel = before.shape
        kept = before.transpose(1, 2).reshape(rows * kernel, channels).to(conv_states.dtype)
        laid_out = torch.cat((kept, conv_states[0].T)).index_select(0, self._runs.laid_out)
        last = laid_out.index_select(0, self._runs.last)
        self.conv_states[0] = last.view(rows, kernel, channels).transpose(1, 2)
        return laid_out.T[None]

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep new states."""
        self.recurrent_states[0] = recurrent_states
        return recurrent_states


class _Everywhere:
    def __init__(self, layer: PackedCache) -> None:
        self._layer = layer

    def __getitem__(self, index: int) -> PackedCache:
        return self._layer


@functools.cache
def packed_forward(kind: Any) -> Callable[..., Any] | None:
    """The forward of a mixer's class for packed runs, which takes them as `runs` and its rule as `rule`; None where its
    code is no gated delta net's."""
    own: Any = inspect.unwrap(kind.forward)
    names = own.__globals__
    hands_on = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(own).parameters.values())
    if not hands_on or any(name not in own.__code__.co_names or name not in names for name in (_CONVOLUTION, _RULE)):
        return None
    convolve = inspect.unwrap(names[_CONVOLUTION])

    def convolution(laid_out: Tensor, *args: Any, runs: Runs, rule: Any, **kwargs: Any) -> Tensor:
        return convolve(laid_out, *args, **kwargs).index_select(-1, runs.tokens)

    def rule_of_runs(
        q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, initial_state: Tensor, runs: Runs, **more: Any
    ) -> tuple[Tensor, Tensor]:
        return delta_rule.delta_rule(more["rule"], q, k, v, g, beta, initial_state, runs.starts, runs.chunks)

    return with_functions(own, {**replaced(own), _CONVOLUTION: convolution, _RULE: rule_of_runs})


def rule_for(kind: Any, hidden: Tensor, recurrent: Tensor) -> delta_rule.Rule | None:
    """The rule by which a mixer of this class runs packed; None: it does not, and runs of one length go together.

    On CUDA and in 16 bits alone: the kernels multiply float32 in fewer bits.

    Args:
        recurrent: states of its layer, [slots, value heads, size, value size].
    """
    if not hidden.is_cuda or hidden.dtype not in (torch.bfloat16, torch.float16):
        return None
    return _tried(kind, hidden.dtype, hidden.device, tuple(recurrent.shape[1:]))


@functools.cache
def _tried(kind: Any, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> delta_rule.Rule | None:
    """The rule, if what it computes for heads of these sizes is what transformers' torch function does."""
    rule = delta_rule.load()
    if rule is None:
        return None
    own = inspect.unwrap(inspect.unwrap(kind.forward).__globals__[_RULE])
    try:
        wrong = difference(rule, own, dtype, device, shape)
    except Exception as error:  # of another library's code, for instance its compiler's
        wrong = f"{type(error).__name__}: {error}"
    if wrong is None:
        return rule
    warnings.warn(
        f"prompts go through {kind.__name__} one length at a time, because fla-core's rule is not usable here: {wrong}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def difference(
    rule: delta_rule.Rule, own: Callable[..., Any], dtype: torch.dtype, device: torch.device, shape: Sequence[int]
) -> str | None:
    """How a rule of packed runs differs from the torch function over each of them; None where it does not.

    Args:
        shape: value heads, size, value size.
    """
    heads, size, value_size = shape
    lengths = [70, 3, 1, 64]
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device)

    total = sum(lengths)
    q, k, v = (random(1, total, heads, each).to(dtype) for each in (size, size, value_size))
    g, beta = -random(1, total, heads).square() * 0.1, random(1, total, heads).sigmoid().to(dtype)
    states = random(len(lengths), heads, size, value_size) * 0.1
    runs = runs_of(lengths, 1, device)
    found, after = delta_rule.delta_rule(rule, q, k, v, g, beta, states, runs.starts, runs.chunks)
    asked = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for row, (begin, end) in enumerate(itertools.pairwise(itertools.accumulate(lengths, initial=0))):
        each = (tensor[:, begin:end] for tensor in (q, k, v, g, beta))
        wanted = own(*each, initial_state=states[row : row + 1], **asked)
        for what, ours, theirs in zip(
            ("output", "state"), (found[:, begin:end], after[row : row + 1]), wanted, strict=True
        ):
            error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            if not error <= _WRONG:
                return f"the {what} of a run of {lengths[row]} tokens differs by {error:.1e} of the largest"
    return None
