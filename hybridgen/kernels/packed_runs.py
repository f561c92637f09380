"""Recurrences over packed prompts, by the Triton kernels of `fla-core` (MIT license; extra `hybrid`).

- The gated delta rule (Gated Delta Networks, arXiv:2412.06464): a matrix for each head, which every token fades and
  corrects.
- The scan of Mamba-2 (arXiv:2405.21060): a matrix for each head, which every token fades and adds to. It is gated
  linear attention with one gate a head, of which `fla-core` has kernels.

transformers' own torch functions compute prompts of one length at a time. `fla-core` takes all of a call, and is told
where each begins.

It is imported when it is first needed. At a kernel's first call it tries up to 48 launch options, which takes more than
a minute for all kernels; so each gets one of its options here, see `_OPTIONS`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 64
"""Tokens that the kernels take at once."""

Rule = Callable[..., tuple[Tensor, Tensor]]


class Rules(NamedTuple):
    """Functions of `fla-core`."""

    delta: Rule
    """`chunk_gated_delta_rule`"""
    linear: Rule
    """`chunk_simple_gla`"""


_OPTIONS: dict[tuple[str, str], dict[str, int]] = {
    ("fla.modules.norm.l2norm", "l2norm_fwd_kernel"): {"BT": 16, "num_warps": 4},
    ("fla.ops.utils.cumsum", "chunk_local_cumsum_scalar_kernel"): {"num_warps": 2},
    ("fla.ops.gated_delta_rule.chunk_fwd", "chunk_gated_delta_rule_fwd_kkt_solve_kernel"): {"BK": 64, "num_warps": 2},
    ("fla.ops.gated_delta_rule.wy_fast", "recompute_w_u_fwd_kernel"): {"num_warps": 4, "num_stages": 3},
    ("fla.ops.common.chunk_delta_h", "chunk_gated_delta_rule_fwd_kernel_h_blockdim64"): {
        "BV": 32, "num_warps": 4, "num_stages": 3,
    },
    ("fla.ops.common.chunk_o", "chunk_fwd_kernel_o"): {"BK": 64, "BV": 64, "num_warps": 4},
    ("fla.ops.common.chunk_h", "chunk_fwd_kernel_h"): {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 3},
}  # fmt: skip
"""Of a kernel's launch options those that are used, by module and name."""


@functools.cache
def load() -> Rules | None:
    """What `fla-core` has; None, and once a warning that says what to install, where it cannot be had."""
    try:
        delta: Rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        linear: Rule = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    except Exception as error:  # ImportError, or what its own check of the device raised
        warnings.warn(
            f"prompts go through layers with a recurrence one length at a time, because fla-core cannot be loaded "
            f'({error}); pip install "hybridgen[hybrid]"',
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for (module, name), options in _OPTIONS.items():
        _settle(module, name, options)
    return Rules(delta, linear)


def _settle(module: str, name: str, options: dict[str, int]) -> None:
    """Leave a kernel the launch options that agree with these. Another release, where there are none, searches."""
    try:
        kernel: Any = getattr(importlib.import_module(module), name)
        while not hasattr(kernel, "configs"):
            kernel = kernel.fn
    except (ImportError, AttributeError):
        return
    fitting = [each for each in kernel.configs if options.items() <= {**vars(each), **each.kwargs}.items()]
    if fitting:
        kernel.configs = fitting[:1]


def delta_rule(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    starts: Tensor,
    chunks: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs [1, T, value heads, value size] and the states behind each run, float32 as `states`.

    Args:
        rule: `Rules.delta`.
        q: [1, T, heads, size], which is normalised here, as `k`.
        v: [1, T, value heads, value size]; `g` and `beta` [1, T, value heads].
        g: logarithms of what is left of a state, float32.
        states: [runs, value heads, size, value size], of before.
        starts: int64 [runs + 1], where runs begin and the last one ends.
        chunks: int64 [chunks, 2], the run of each piece of CHUNK tokens and its number in that.
    """
    return rule(
        q, k, v, g=g, beta=beta, initial_state=states.to(torch.float32), output_final_state=True,
        use_qk_l2norm_in_kernel=True, cu_seqlens=starts, chunk_indices=chunks,
    )  # fmt: skip


def scan(
    rule: Rule,
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    states: Tensor,
    starts: Tensor,
    starts_on_host: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs [1, T, heads, size] in float32 and the states behind each run, float32 as `states`.

    Args:
        rule: `Rules.linear`.
        x: [1, T, heads, size]; `dt` [1, T, heads], the time steps, as they are used.
        decay: [heads], below 0, of a state in a unit of time; `skip` [heads], by which inputs are added.
        b: [1, T, groups, state size], as `c`.
        states: [runs, heads, size, state size], of before.
        starts: as in `delta_rule`, here and on the host.
    """
    heads = x.shape[2]
    b, c = (each.repeat_interleave(heads // each.shape[2], dim=2, output_size=heads).to(x.dtype) for each in (b, c))
    dt = dt.float()
    found, after = rule(
        c, b, (x.float() * dt[..., None]).to(x.dtype), g=dt * decay.float(), scale=1.0,
        initial_state=states.to(torch.float32), output_final_state=True, state_v_first=True, cu_seqlens=starts,
        cu_seqlens_cpu=starts_on_host,
    )  # fmt: skip
    found = found.float()
    return (found if skip is None else found + skip.float()[:, None] * x.float()), after
