"""Whether the kernels of experts compute on this device what the reference does: tried before an engine uses them.

A probe tells how a module computes on a copy of it on the CPU; this is about the kernel that the device runs. Random
states go through the first module of each kind, with its own weights, and the results are compared with
`kernels.linear.experts.reference` in float32. Where they are not equal up to rounding, a module of 16 bits keeps its
own code, and one with packed weights is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hybridgen.device.failures import is_fatal
from hybridgen.device.timing import graph_seconds
from hybridgen.errors import EngineError, described
from hybridgen.kernels.hopper import OF_ONE_TOKEN, prefer, refuse, serves
from hybridgen.kernels.linear.experts import experts, reference
from hybridgen.kernels.linear.experts_form import DENSE, FEW_ROWS, Form, Projection, sizes_of
from hybridgen.kernels.linear.layout import Block
from hybridgen.kernels.linear.route import reference as route_reference
from hybridgen.kernels.linear.route import route
from hybridgen.models.experts import ExpertsSite, projections_of
from hybridgen.models.packed_experts import PackedExperts
from hybridgen.models.routers import RouterSite

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 5e-3, torch.float16: 5e-3}
_OF_BFLOAT16 = 2e-2
"""Of the norm of the results. In bfloat16 rounding what is between the projections gives a third of a percent; of
float32 the reference may be in TF32, if the user has asked torch for that."""
_REPEATS, _CALLS = 20, 8
"""Of the kernel for one token: calls that have to give the same bits, and calls of a timed graph."""
_TRIED = 4
"""Experts that are chosen from, at both ends of the list: the reference dequantises each of them."""


def wants_check(device: torch.device) -> bool:
    """Whether the op has kernels on a device; on others it is the reference."""
    return device.type == "cuda"


class ExpertsCheck:
    """Tries modules of experts; those of one kind once.

    Args:
        chosen: experts of a token.
        dtype: of the states.
        fall_back: told what takes a slower kernel.
    """

    def __init__(self, chosen: int, dtype: torch.dtype, fall_back: Callable[[str], None] | None = None) -> None:
        self._chosen, self._dtype, self._fall_back = chosen, dtype, fall_back
        self._known: dict[Any, str | None] = {}

    def problem_of_site(self, site: ExpertsSite) -> str | None:
        """Why a module of 16 bits is not to decode by the op, or None."""
        return self._problem(*projections_of(site.module), site.form, DENSE, None, (1, 8))

    def problem_of_packed(self, module: PackedExperts) -> str | None:
        """Why a module with packed weights cannot run by the op, or None."""
        gate_up, down, kind, block = module.weights_stored
        # Prefill runs by the op as well.
        rows = (1, 8, FEW_ROWS + 1)
        problem = self._problem(gate_up, down, module.form, kind, block, rows)
        if problem is not None and kind == "mxfp4" and refuse(OF_ONE_TOKEN, gate_up.data.device):
            self._known.clear()
            with_others = self._problem(gate_up, down, module.form, kind, block, rows)
            if with_others is None and self._fall_back is not None:
                self._fall_back(f"experts of one token take a slower kernel: {problem}")
            return with_others
        used = kind == "mxfp4" and self._dtype == torch.bfloat16 and serves(OF_ONE_TOKEN, gate_up.data.device)
        if problem is None and used:
            key = "one token", module.form, sizes_of(gate_up, down)
            slower = self._tried(
                key, gate_up.data.device, lambda: self._choose_one_token(gate_up, down, module.form, block)
            )
            if slower is not None and refuse(OF_ONE_TOKEN, gate_up.data.device) and self._fall_back is not None:
                self._fall_back(f"experts of one token take a slower kernel: {slower}")
        return problem

    @torch.inference_mode()
    def _choose_one_token(self, gate_up: Projection, down: Projection, form: Form, block: Block | None) -> str | None:
        """Leave one token of these sizes to the kernels for few where those are faster. What is wrong with the other
        one; None if nothing is."""
        device, sizes = gate_up.data.device, sizes_of(gate_up, down)
        hidden, count = down.data.shape[1], gate_up.data.shape[0]
        g = torch.Generator().manual_seed(0)
        x = torch.randn(1, hidden, generator=g).to(device, self._dtype)
        ids = torch.randperm(count, generator=g)[None, : min(self._chosen, count)].to(device)
        weights = torch.ones(ids.shape, device=device, dtype=self._dtype)

        def call() -> torch.Tensor:
            return experts(x, ids, weights, gate_up, down, form, "mxfp4", block)

        prefer(OF_ONE_TOKEN, device, sizes, True)
        first = call()
        for _ in range(_REPEATS):
            poison = torch.full((4, max(hidden, 4096)), torch.nan, device=device)
            del poison
            if not torch.equal(call(), first):
                return "the other one gives other bits again"
        took = graph_seconds(call, calls=_CALLS)
        prefer(OF_ONE_TOKEN, device, sizes, False)
        others = graph_seconds(call, calls=_CALLS)
        if took < others:
            prefer(OF_ONE_TOKEN, device, sizes, True)
        else:  # a choice, as good as the other one
            logger.info("experts of one token: %.1f us, and %.1f by the kernels for few", took * 1e6, others * 1e6)
        return None

    def problem_of_router(self, site: RouterSite) -> str | None:
        """Why a router is not to choose by the op in decode, or None."""
        own: Any = site.module
        weight, bias = own.weight, own._parameters.get("bias")
        if not wants_check(weight.device):
            return None
        key = weight.device, site.form, site.chosen, weight.shape, weight.stride(), weight.dtype, bias is None
        return self._tried(key, weight.device, lambda: _wrong_choice(weight, bias, site))

    def _problem(
        self, gate_up: Projection, down: Projection, form: Form, kind: str, block: Block | None, rows: tuple[int, ...]
    ) -> str | None:
        device = gate_up.data.device
        if not wants_check(device):
            return None
        tensors = [tensor for tensor in (*gate_up, *down) if tensor is not None]
        key = device, form, kind, block, rows, tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        return self._tried(key, device, lambda: self._difference(gate_up, down, form, kind, block, rows))

    def _tried(self, key: Any, device: torch.device, difference: Callable[[], str | None]) -> str | None:
        """What a trial found, which is made once for each key."""
        if key not in self._known:
            try:
                with _on(device):
                    self._known[key] = difference()
            except Exception as error:  # whatever Triton raises
                if is_fatal(error):
                    raise
                self._known[key] = f"its kernel failed: {described(error)}"
            if device.type == "cuda":  # the memory is counted next
                torch.cuda.empty_cache()
        return self._known[key]

    @torch.inference_mode()
    def _difference(
        self, gate_up: Projection, down: Projection, form: Form, kind: str, block: Block | None, rows: tuple[int, ...]
    ) -> str | None:
        """How far the op is from the reference at some numbers of tokens, if further than rounding; else None."""
        dtype = gate_up.data.dtype if kind == DENSE else self._dtype
        hidden = down.data.shape[2] if form.transposed else down.data.shape[1]
        count, device = gate_up.data.shape[0], gate_up.data.device
        chosen = min(self._chosen, count)
        tried = max(chosen, min(_TRIED, count))
        ends = torch.cat((torch.arange(tried // 2), torch.arange(count - tried + tried // 2, count)))
        limit = _TOLERANCE.get(dtype, _OF_BFLOAT16)
        outputs, inputs = block or Block(0, 0)
        for number in rows:
            g = torch.Generator().manual_seed(number)
            x = torch.randn(number, hidden, generator=g).to(device, dtype)
            ids = torch.stack([ends[torch.randperm(tried, generator=g)[:chosen]] for _ in range(number)]).to(device)
            weights = torch.rand(number, chosen, generator=g).to(device, dtype)
            out = experts(x, ids, weights, gate_up, down, form, kind, block).float()
            wanted = reference(
                x.float(), ids, weights.float(), *gate_up, *down, kind, outputs, inputs,
                form.transposed, form.interleaved, form.activation, form.alpha, form.limit,
            )  # fmt: skip
            size, error = float(wanted.norm()), float((out - wanted).norm())
            if not error <= limit * size:
                off = error / size if size else error
                return f"of {number} random tokens its kernel's results are off by {off:.3g}; rounding is {limit:.3g}"
        return None


@torch.inference_mode()
def _wrong_choice(weight: torch.Tensor, bias: torch.Tensor | None, site: RouterSite) -> str | None:
    """How the op's logits, or what it chooses by them, differ from the reference by more than rounding; else None."""
    for number in (1, 8):
        g = torch.Generator().manual_seed(number)
        x = torch.randn(number, weight.shape[1], generator=g).to(weight.device, weight.dtype)
        logits, scores, ids = route(x, weight, bias, site.chosen, site.form)
        wanted = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        limit = _TOLERANCE.get(weight.dtype, _OF_BFLOAT16)
        if not float((logits.float() - wanted).norm()) <= limit * float(wanted.norm()):
            return f"the logits of {number} random tokens are off by more than {limit:.3g}"
        # Of its own logits, since rounding may put two experts into another order.
        eye = torch.eye(weight.shape[0], device=weight.device, dtype=weight.dtype)
        _, wanted_scores, _ = route_reference(logits, eye, None, site.chosen, *site.form)
        largest = torch.topk(logits, site.chosen, dim=-1).values
        if not torch.equal(logits.gather(1, ids), largest) or not torch.allclose(
            scores.float(), wanted_scores.float(), atol=limit
        ):
            return f"of {number} random tokens it does not choose the largest logits"
    return None


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def chosen_of(model: nn.Module) -> int:
    """How many experts a token chooses, by the names that configs have for it; 2 where none is there."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 2)


def checked_sites(check: ExpertsCheck, fall_back: Callable[[str], None] | None) -> Callable[[ExpertsSite], bool]:
    """A test of sites, which tells `fall_back` of each that is not to use the op."""

    def serves(site: ExpertsSite) -> bool:
        problem = check.problem_of_site(site)
        if problem is not None and fall_back is not None:
            fall_back(f"experts decode by the model's own code: {problem}")
        return problem is None

    return serves


def checked_routers(check: ExpertsCheck, fall_back: Callable[[str], None] | None) -> Callable[[RouterSite], bool]:
    """A test of routers, which tells `fall_back` of each that is not to use the op."""

    def serves(site: RouterSite) -> bool:
        problem = check.problem_of_router(site)
        if problem is not None and fall_back is not None:
            fall_back(f"experts are chosen by the model's own code: {problem}")
        return problem is None

    return serves


def check_packed(check: ExpertsCheck, modules: list[PackedExperts]) -> None:
    """Raise unless packed experts compute what they should.

    Raises:
        EngineError: the kernel's results are others than the reference's.
    """
    for module in modules:
        problem = check.problem_of_packed(module)
        if problem is not None:
            raise EngineError(
                f"experts in {module.kind} do not run on {module.weights_stored.gate_up.data.device}: {problem}; use "
                "mode='eager', which dequantises them"
            )
