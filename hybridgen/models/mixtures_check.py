"""Whether the kernels of `hybridgen::mixture` are right on this device, and faster than several ops: tried before use.

Random states go through them with a layer's own experts, with memory that held NaN before, and the results are compared
with the reference in float32; some more calls have to give the same bits. Then both ways are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.device.failures import is_fatal
from hybridgen.device.timing import graph_seconds
from hybridgen.errors import described
from hybridgen.kernels.linear import experts as experts_op
from hybridgen.kernels.linear import mixture as op
from hybridgen.kernels.linear import route as route_op
from hybridgen.kernels.linear.experts_form import Form, Normed, Projection, Routed, RouteForm
from hybridgen.kernels.linear.mixture import normalised

_TOLERANCE = 2e-2
"""Of the norm of the results; rounding what is between the projections gives a third of a percent."""
_SMALL = 0.01
"""Size of the random states: the sum is mostly what experts give then."""
_STATES, _REPEATS = 3, 20
_CALLS = 8
"""Of a timed graph."""


Once = Callable[[Callable[[], "str | None"]], "str | None"]
"""Calls a function, or says what it said before: `Measured.slower` for one kind of layer."""


class Verdict(NamedTuple):
    """What a trial found; in words, or None."""

    wrong: str | None = None
    slower: str | None = None

    @property
    def is_used(self) -> bool:
        """Whether the kernels are."""
        return self.wrong is None and self.slower is None


class Given(NamedTuple):
    """A call of the op."""

    x: Tensor
    added: Tensor
    norm: Normed
    routed: Routed
    gate_up: Projection
    down: Projection
    form: Form


def by_kernels(given: Given) -> Tensor | None:
    """What the kernels give; None where they are not for a call or cannot be had."""
    from hybridgen.kernels.linear.mixture_kernels import mixture_on_cuda

    return mixture_on_cuda(*given)


def by_parts(given: Given) -> Tensor:
    """What the kernels have to beat: router and experts alone, since norm and sum are compiled with the layer."""
    states = given.x + given.added
    routed = given.routed
    _, scores, ids = route_op.route(states, routed.weight, routed.bias, routed.chosen, routed.form)
    return experts_op.experts(states, ids, scores, given.gate_up, given.down, given.form, op.KIND, op.BLOCK)


def seconds(call: Callable[[], object]) -> float:
    """Device time of a call."""
    return graph_seconds(call, calls=_CALLS)


def has_kernels(device: torch.device) -> bool:
    """Whether there are any for a device."""
    return device.type == "cuda"


def tried_on(
    device: torch.device, norm: Normed, routed: Routed, gate_up: Projection, down: Projection, form: Form, once: Once
) -> Verdict:
    """Try the kernels with a layer's weights.

    Args:
        once: says why several ops are taken, or None: what timing them says, or said at an earlier start.
    """
    if not has_kernels(device):
        return Verdict(slower="there are no kernels for its device")
    try:
        with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return _tried(norm, routed, gate_up, down, form, once)
    except Exception as error:  # whatever Triton and the driver raise
        if is_fatal(error):
            raise
        return Verdict(wrong=f"their kernels failed: {described(error)}")
    finally:
        if device.type == "cuda":  # the memory is counted next
            torch.cuda.empty_cache()


def _tried(norm: Normed, routed: Routed, gate_up: Projection, down: Projection, form: Form, once: Once) -> Verdict:
    experts, hidden = routed.weight.shape
    device, dtype = routed.weight.device, routed.weight.dtype
    for number in range(_STATES):
        g = torch.Generator().manual_seed(number)
        x, added = ((_SMALL * torch.randn(1, hidden, generator=g)).to(device, dtype) for _ in range(2))
        states = x + added
        normed = normalised(states, norm)
        # Logits that are well apart, whatever is rounded.
        counts = torch.linspace(-2, 2, experts)[torch.randperm(experts, generator=g)].to(device)
        along = normed.float() / normed.float().square().sum()
        bias = None if routed.bias is None else torch.zeros_like(routed.bias)
        apart = routed._replace(weight=(counts[:, None] * along).to(dtype), bias=bias)
        given = Given(x, added, norm, apart, gate_up, down, form)
        _poison(given)
        out = by_kernels(given)
        if out is None:
            return Verdict(slower="their kernels cannot be had")
        ids = counts.topk(routed.chosen).indices[None]
        scores = _scores(normed.float() @ apart.weight.float().t(), ids, routed.form)
        wanted = states.float() + experts_op.reference(
            normed.float(), ids, scores, *gate_up, *down, op.KIND, op.BLOCK.outputs, op.BLOCK.inputs,
            False, form.interleaved, form.activation, form.alpha, form.limit,
        )  # fmt: skip
        size, error = float(wanted.norm()), float((out.float() - wanted).norm())
        if not error <= _TOLERANCE * size:
            return Verdict(wrong=f"of a random token their kernels are off by {error / size if size else error:.3g}")
    for _ in range(_REPEATS):
        _poison(given)
        again = by_kernels(given)
        if again is None or out is None or not torch.equal(again, out):
            return Verdict(wrong="their kernels give other bits again")
    return Verdict(slower=once(partial(_slower, given)))


def _slower(given: Given) -> str | None:
    ours, others = seconds(lambda: by_kernels(given)), seconds(lambda: by_parts(given))
    if ours < others:
        return None
    return f"one op takes {ours * 1e6:.1f} us, and its router and experts {others * 1e6:.1f}"


def _poison(given: Given) -> None:
    """Leave NaN where the kernels' memory is likely to be."""
    rows, width = given.routed.chosen, max(given.x.shape[1], given.gate_up.data.shape[1] // 2)
    dtypes = torch.float16, torch.float32, given.x.dtype
    held = [torch.full((n, width), torch.nan, device=given.x.device, dtype=d) for n in (1, rows) for d in dtypes]
    del held


def _scores(logits: Tensor, ids: Tensor, form: RouteForm) -> Tensor:
    """What chosen experts count."""
    if form.chosen_only:
        return logits.gather(1, ids).softmax(-1)
    scores = logits.softmax(-1).gather(1, ids)
    return scores / scores.sum(-1, keepdim=True) if form.normalised else scores
