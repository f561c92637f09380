"""The gated delta rule over packed prompts, by the Triton kernels of `fla-core` (MIT license; extra `hybrid`).

Gated Delta Networks (arXiv:2412.06464) keep a matrix for each head, which every token fades and corrects. transformers'
own torch function computes prompts of one length at a time. `fla-core` takes all of a call, and is told where each
begins.

It is imported when it is first needed. At a kernel's first call it tries up to 25 launch options, which takes more than
a minute for all kernels; so each gets one of its options here, see `_OPTIONS`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 64
"""Tokens that the kernels take at once."""

Rule = Callable[..., tuple[Tensor, Tensor]]

_OPTIONS: dict[tuple[str, str], dict[str, int]] = {
    ("fla.modules.norm.l2norm", "l2norm_fwd_kernel"): {"BT": 16, "num_warps": 4},
    ("fla.ops.utils.cumsum", "chunk_local_cumsum_scalar_kernel"): {"num_warps": 2},
    ("fla.ops.gated_delta_rule.chunk_fwd", "chunk_gated_delta_rule_fwd_kkt_solve_kernel"): {"BK": 64, "num_warps": 2},
    ("fla.ops.gated_delta_rule.wy_fast", "recompute_w_u_fwd_kernel"): {"num_warps": 4, "num_stages": 3},
    ("fla.ops.common.chunk_delta_h", "chunk_gated_delta_rule_fwd_kernel_h_blockdim64"): {
        "BV": 32, "num_warps": 4, "num_stages": 3,
    },
    ("fla.ops.common.chunk_o", "chunk_fwd_kernel_o"): {"BK": 64, "BV": 64, "num_warps": 4},
}  # fmt: skip
"""Of a kernel's launch options those that are used, by module and name."""


@functools.cache
def load() -> Rule | None:
    """`chunk_gated_delta_rule`; None, and once a warning that says what to install, where it cannot be had."""
    try:
        rule: Rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except Exception as error:  # ImportError, or what its own check of the device raised
        warnings.warn(
            f"prompts go through gated delta nets one length at a time, because fla-core cannot be loaded ({error}); "
            'pip install "hybridgen[hybrid]"',
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for (module, name), options in _OPTIONS.items():
        _settle(module, name, options)
    return rule


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
        rule: what `load()` gave.
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
