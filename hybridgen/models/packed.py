"""Prefill of gated delta nets and Mamba-2: all runs of a call at once, whatever their lengths.

A mixer's own code runs, on [1, T, hidden], with two functions in the place of those that it names: a convolution for
which each run's last inputs of before stand in front of its tokens, and a recurrence of `kernels.packed_runs`, which is
told where runs begin. It needs no more than the names of these two, by which transformers' mixers are known.
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
from torch import Tensor, nn

from hybridgen.kernels import packed_runs
from hybridgen.models.slot_cache import SlotCache
from hybridgen.models.torch_functions import replaced, with_functions

_CONVOLUTION, _DELTA, _SCAN = "causal_conv1d_fn", "torch_chunk_gated_delta_rule", "mamba2_chunk_scan"
_WRONG = 3e-2
"""A difference that 16 bits do not explain."""


class Runs(NamedTuple):
    """Where packed runs lie. Laid out, a run is what its convolution keeps from before, then its tokens."""

    starts: Tensor
    """int64 [runs + 1]; `on_host` the same there."""
    on_host: Tensor
    chunks: Tensor
    """int64 [chunks, 2]: see `packed_runs.delta_rule`."""
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
    pieces = -(-each // packed_runs.CHUNK)
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
    return Runs(found[0], torch.from_numpy(starts), found[1].view(-1, 2), *found[2:])


class PackedCache(SlotCache):
    """What a mixer takes for its cache in one call for all runs."""

    def __init__(self, convolution: Tensor, recurrent: Tensor, runs: Runs) -> None:
        """`convolution`: [runs, channels, kernel], `recurrent` [runs, ...], zeros of runs without a token before."""
        super().__init__(convolution, recurrent, convolution.shape[-1], previous=True)
        self._runs = runs

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the last inputs of each run; returns runs laid out, [1, channels, places]."""
        before = self.conv_states[0]
        rows, channels, kernel = before.shape
        kept = before.transpose(1, 2).reshape(rows * kernel, channels).to(conv_states.dtype)
        laid_out = torch.cat((kept, conv_states[0].T)).index_select(0, self._runs.laid_out)
        last = laid_out.index_select(0, self._runs.last)
        self.conv_states[0] = last.view(rows, kernel, channels).transpose(1, 2)
        return laid_out.T[None]


def _recurrence(kind: Any) -> str | None:
    """The name of the recurrence that a mixer's class calls and that there is for packed runs."""
    own: Any = inspect.unwrap(kind.forward)
    hands_on = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(own).parameters.values())
    called = [each for each in own.__code__.co_names if each in own.__globals__] if hands_on else []
    return next((each for each in (_DELTA, _SCAN) if each in called and _CONVOLUTION in called), None)


@functools.cache
def packed_forward(kind: Any) -> Callable[..., Any] | None:
    """The forward of a mixer's class for packed runs, which takes them as `runs` and its rule as `rule`; None where its
    code has no recurrence that there is for them."""
    name = _recurrence(kind)
    if name is None:
        return None
    own: Any = inspect.unwrap(kind.forward)
    convolve = inspect.unwrap(own.__globals__[_CONVOLUTION])

    def convolution(laid_out: Tensor, *args: Any, runs: Runs, rule: Any, **kwargs: Any) -> Tensor:
        return convolve(laid_out, *args, **kwargs).index_select(-1, runs.tokens)

    recurrence = {_DELTA: _delta_rule, _SCAN: _scan}[name]
    return with_functions(own, {**replaced(own), _CONVOLUTION: convolution, name: recurrence})


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, initial_state: Tensor, runs: Runs, **more: Any
) -> tuple[Tensor, Tensor]:
    return packed_runs.delta_rule(more["rule"], q, k, v, g, beta, initial_state, runs.starts, runs.chunks)


def _scan(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_states: Tensor,
    runs: Runs,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Time steps as transformers makes them."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = nn.functional.softplus(dt)
    dt = dt.clamp(*dt_limit)
    skip = more.get("D")
    return packed_runs.scan(more["rule"], x, dt, decay, b, c, skip, initial_states, runs.starts, runs.on_host)


def rule_for(kind: Any, hidden: Tensor, recurrent: Tensor) -> packed_runs.Rule | None:
    """The rule by which a mixer of this class runs packed; None: it does not, and runs of one length go together.

    On CUDA and in 16 bits alone: the kernels multiply float32 in fewer bits.

    Args:
        recurrent: states of its layer, [slots, heads, size, other size].
    """
    if not hidden.is_cuda or hidden.dtype not in (torch.bfloat16, torch.float16):
        return None
    return _tried(kind, hidden.dtype, hidden.device, tuple(recurrent.shape[1:]))


@functools.cache
def _tried(kind: Any, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> packed_runs.Rule | None:
    """The rule, if what it computes for heads of these sizes is what transformers' torch function does."""
    rules, name = packed_runs.load(), _recurrence(kind)
    if rules is None or name is None:
        return None
    rule = rules.delta if name == _DELTA else rules.linear
    own = inspect.unwrap(inspect.unwrap(kind.forward).__globals__[name])
    try:
        wrong = difference(name, rule, own, dtype, device, shape)
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
    name: str,
    rule: packed_runs.Rule,
    own: Callable[..., Any],
    dtype: torch.dtype,
    device: torch.device,
    shape: Sequence[int],
) -> str | None:
    """How a rule of packed runs differs from the torch function over each of them; None where it does not.

    Args:
        name: of the torch function.
        shape: of a state: heads, and the sizes of its matrix.
    """
    lengths = [70, 3, 1, 64]
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device)

    heads, size, other_size = shape
    total = sum(lengths)
    runs, states = runs_of(lengths, 1, device), random(len(lengths), heads, size, other_size) * 0.1
    if name == _DELTA:
        q, k, v = (random(1, total, heads, each).to(dtype) for each in (size, size, other_size))
        g, beta = -random(1, total, heads).square() * 0.1, random(1, total, heads).sigmoid().to(dtype)
        inputs = [q, k, v, g, beta]
        asked: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        found, after = _delta_rule(*inputs[:3], g=g, beta=beta, initial_state=states, runs=runs, rule=rule)
    else:
        x, b, c = (random(1, total, heads, each).to(dtype) for each in (size, other_size, other_size))
        inputs = [x, random(1, total, heads).to(dtype), b, c]
        decay, bias = -random(heads).exp(), random(heads).to(dtype)
        asked = {"D": random(heads).to(dtype), "dt_bias": bias, "dt_softplus": True}
        found, after = _scan(x, inputs[1], decay, b, c, **asked, initial_states=states, runs=runs, rule=rule)
        asked |= {"chunk_size": packed_runs.CHUNK, "return_final_states": True}
    for row, (begin, end) in enumerate(itertools.pairwise(itertools.accumulate(lengths, initial=0))):
        each = [tensor[:, begin:end] for tensor in inputs]
        if name == _DELTA:
            wanted = own(*each, initial_state=states[row : row + 1], **asked)
        else:
            wanted = own(*each[:2], decay, *each[2:], initial_states=states[row : row + 1], **asked)
        for what, ours, theirs in zip(
            ("output", "state"), (found[:, begin:end], after[row : row + 1]), wanted, strict=True
        ):
            error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            if not error <= _WRONG:
                return f"the {what} of a run of {lengths[row]} tokens differs by {error:.1e} of the largest"
    return None
