"""One token per row from its logits: the ops `hybridgen::choose_greedy` and `hybridgen::choose_sampled`.

| tensor | shape | dtype |
|---|---|---|
| logits | [B, V] | bfloat16, float16 or float32 on CUDA, any floating type on a CPU |
| reals | [slots, 3 or more] | float32: temperature (0: greedy), top-p (1: off), logarithm of min-p (-inf: off) |
| integers | [slots, 2 or more] | int64: seed, top-k (0: off) |
| slots | [B] | int64: each row's line in the two tables |
| positions | [B] | int64: the position that the new token will have in its sequence |
| the result | [B] | int64: -1 where there was nothing to choose |

The CPU implementations are torch functions (`processors`), which sort; they define the result. The CUDA
implementations are Triton kernels that do not sort (`kernels.sampling`). There, a tempered logit has the same bits, and
so has what greedy rows, top-k and min-p decide. Two things can differ in a last bit:

- The noise: its logarithms are within a few units in the last place of the reference's.
- Top-p's edge: the reference adds float32 probabilities in float64; the kernels add multiples of 2^-44 of the most
  likely token's probability, each within 2^-19 of its value or half a multiple, without rounding the sums. So the kept
  set can differ by the tokens at the edge if the reference's running sum is within 2^-18 of p there.

What a row gets on CUDA depends on the row alone, bit for bit: not on other rows, their number, or the run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridgen.sampling.processors import best_of, truncated, with_noise
from hybridgen.sampling.random import gumbel_noise

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define("choose_greedy(Tensor logits) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "choose_sampled(Tensor logits, Tensor reals, Tensor integers, Tensor slots, Tensor positions, bool top_k, "
    "bool nucleus, bool min_p) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def choose_greedy(logits: Tensor) -> Tensor:
    """The largest logit's id in each row, the lowest of equal ones; int64 [B].

    -1 where a logit is NaN or all are -inf.

    Raises:
        TypeError: on CUDA, the logits are of another type than the kernels take.
        ValueError: on CUDA, V is 2^19 or more.
    """
    return torch.ops.hybridgen.choose_greedy.default(logits)


def choose_sampled(
    logits: Tensor,
    reals: Tensor,
    integers: Tensor,
    slots: Tensor,
    positions: Tensor,
    top_k: bool,
    nucleus: bool,
    min_p: bool,
) -> Tensor:
    """A token for each row, drawn or (temperature 0) greedy, as `sampler.sample` describes; int64 [B].

    Args:
        top_k: some row may have top-k. Where False, nobody looks at it.
        nucleus: some row may have top-p. Where False, nobody looks at it.
        min_p: some row may have min-p.

    Raises:
        TypeError: on CUDA, the logits are of another type than the kernels take.
        ValueError: on CUDA, V is 2^19 or more.
    """
    return torch.ops.hybridgen.choose_sampled.default(logits, reals, integers, slots, positions, top_k, nucleus, min_p)


def reference_greedy(logits: Tensor) -> Tensor:
    """`choose_greedy` in torch operators, on any device."""
    return best_of(logits.float())


def reference_sampled(
    logits: Tensor,
    reals: Tensor,
    integers: Tensor,
    slots: Tensor,
    positions: Tensor,
    top_k: bool,
    nucleus: bool,
    min_p: bool,
) -> Tensor:
    """`choose_sampled` in torch operators, on any device."""
    scores = logits.float()
    ranked = logits.shape[-1] if top_k or nucleus else 0
    if not top_k:
        integers = torch.stack((integers[:, 0], torch.zeros_like(integers[:, 1])), 1)
    scaled = truncated(scores, reals, integers, slots, ranked, nucleus, min_p)
    return best_of(with_noise(scores, scaled, reals, integers, slots, positions, gumbel_noise))


def _greedy_cuda(logits: Tensor) -> Tensor:
    from hybridgen.kernels.sampling.ops import launch_greedy

    return launch_greedy(logits)


def _sampled_cuda(*arguments: Any) -> Tensor:
    from hybridgen.kernels.sampling.ops import launch_sampled

    return launch_sampled(*arguments)


def _tokens_like(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_library.impl("choose_greedy", reference_greedy, "CPU")
_library.impl("choose_greedy", _greedy_cuda, "CUDA")
_library.impl("choose_sampled", reference_sampled, "CPU")
_library.impl("choose_sampled", _sampled_cuda, "CUDA")
torch.library.register_fake("hybridgen::choose_greedy", _tokens_like, lib=_library)
torch.library.register_fake("hybridgen::choose_sampled", _tokens_like, lib=_library)
