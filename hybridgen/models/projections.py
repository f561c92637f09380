"""Joins the weights of projections that read the same input, so that they cost one matrix product.

The modules stay where they are and keep their names, parameters and state dict. A group such as q/k/v gets
one weight, stacked along the output dimension, and each member's parameter becomes a view of its rows. The
member that the model calls first (the head) multiplies by the whole weight and leaves the other slices for
their members (the tails).

Which projections may be joined is not read from the model's code but observed: one small forward records the
calls, and a group qualifies if its members are called once each, one after the other, with the very same
input tensor.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from hybridgen.device.watched import has_hooks
from hybridgen.errors import EngineError, described
from hybridgen.kernels.step.linear import few_rows
from hybridgen.models.quantised import QuantisedHead, QuantisedLinear, QuantisedTail, stack, why_not_stacked

logger = logging.getLogger(__name__)

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Attribute names that are looked at; the probe decides."""


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_MOST_ROWS = 32
_LEAST = 2**19
"""Elements of a weight for which finding oneDNN's kernel, tens of microseconds each time, is worth it."""
_WIDE = 2
"""Outputs for each input from which on a weight lies by columns."""
_PAGE, _FEW_IN = 1024, 256
"""Floats in 4 KiB: columns that far apart meet in the same lines of the processor's first cache, which up to so many
inputs does no harm."""


@dataclass(frozen=True, slots=True)
class FusedGroup:
    """One set of projections that now share a weight."""

    module: str
    """Qualified name of the module that holds them; empty for the model itself."""
    names: tuple[str, ...]
    """Their attribute names, head first."""
    parameters: int
    """Elements of the shared weight and bias."""


@dataclass(frozen=True, slots=True)
class SkippedGroup:
    """One set of projections that stay apart, and why."""

    module: str
    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class FusionReport:
    """What `fuse_projections` did."""

    groups: tuple[FusedGroup, ...] = ()
    skipped: tuple[SkippedGroup, ...] = ()

    @property
    def parameters(self) -> int:
        """Elements of all shared weights and biases."""
        return sum(group.parameters for group in self.groups)

    @property
    def by_names(self) -> dict[str, int]:
        """Groups per set of attribute names, for example `{"q_proj+k_proj+v_proj": 32}`."""
        return dict(Counter("+".join(group.names) for group in self.groups))


class Slot:
    """Carries one slice from the head to a tail; empty between forwards, also inside a compiled graph."""

    def __init__(self) -> None:
        self.item: tuple[torch.Tensor, torch.Tensor] | None = None


class Decoding(Protocol):
    """What hangs on a projection that has an op for decode steps (`models.few_rows`)."""

    @property
    def decodes(self) -> bool:
        """Whether the step is one of decode."""


def product(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, decoding: Decoding | None = None
) -> torch.Tensor:
    """`F.linear` of rows [..., in], by oneDNN where that takes less on most processors. Compilers see `F.linear`, or in
    decode steps of what has an op for them that op."""
    if decoding is not None and decoding.decodes:
        flat = few_rows(rows.reshape(-1, rows.shape[-1]), weight, bias)
        return flat.view(*rows.shape[:-1], weight.shape[0])
    # The compiler is asked first: what is asked of a size while a graph is traced would bind the graph to it.
    if torch.compiler.is_compiling() or not rows.is_cpu or weight.numel() < _LEAST or not _is_for_onednn(rows, weight):
        return F.linear(rows, weight, bias)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    return found


def _is_for_onednn(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    count = rows.numel() // rows.shape[-1]
    if not _HAS_ONEDNN or count > _MOST_ROWS or not rows.is_contiguous():
        return False
    if count == 1 and weight.stride(1) != 1:  # a sum of columns: the BLAS reads those one after another
        return False
    return rows.dtype is torch.float32 and weight.dtype is torch.float32


class FusedHead(nn.Linear):
    """The member that is called first: input `[..., in]` -> its output `[..., out]`, others into slots."""

    fused_weight: nn.Parameter
    """`[sum of out, in]`. Kept out of `_parameters`, so that nothing counts or saves it a second time; a
    `Parameter`, so that Dynamo takes its address as static."""
    fused_bias: nn.Parameter | None
    fused_sizes: tuple[int, ...]
    fused_slots: tuple[Slot, ...]
    fused_members: tuple[nn.Linear, ...]
    """Head and tails, in call order."""
    _hybridgen: Decoding | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = product(input, self.fused_weight, self.fused_bias, self._hybridgen)
        first, *others = output.split(self.fused_sizes, dim=-1)
        for slot, part in zip(self.fused_slots, others, strict=True):
            slot.item = (input, part)
        return first

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedHead:
        # A move or a cast of the model would give each member a storage of its own and leave the joined
        # weight behind, so the joined weight moves and the members become views of the result.
        with torch.no_grad():
            bias = None if self.fused_bias is None else fn(self.fused_bias)
            _adopt(self, fn(self.fused_weight), bias)
        return self


class FusedTail(nn.Linear):
    """A member that is called later: returns the slice that the head left for the same input tensor."""

    fused_slot: Slot

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        item = self.fused_slot.item
        self.fused_slot.item = None
        if item is None or item[0] is not input:
            raise EngineError(
                "a fused projection was called without its head, or with another input than the head got; "
                "load the model with fuse_projections=False"
            )
        return item[1]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedTail:
        return self  # moved by its head


class RowsLinear(nn.Linear):
    """A projection of its own, by the product that is meant for a few rows."""

    _hybridgen: Decoding | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return product(input, self.weight, self.bias, self._hybridgen)


def use_rows(model: nn.Module) -> int:
    """Let every plain `nn.Linear` of a float32 model on a CPU use the product that is meant for a few rows; returns how
    many do. Wide weights are put down by columns (`_by_columns`). Names, shapes and values stay as they are."""
    count = 0
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module.weight.device.type != "cpu":
            continue
        if module.weight.dtype is not torch.float32:
            continue
        if type(module) is FusedHead:
            weight = _by_columns(module.fused_weight)
            if weight is not None:
                _adopt(module, weight, module.fused_bias)
        elif type(module) is nn.Linear:
            module.__class__ = RowsLinear
            count += 1
            weight = _by_columns(module.weight)  # an embedding with the same weight looks up few rows a step
            if weight is not None:
                module.weight.data = weight
    return count


def _by_columns(weight: torch.Tensor) -> torch.Tensor | None:
    """The same weight with its columns next to each other in memory; None where that is no gain.

    The product of one row is then a sum of columns, which the BLAS reads at memory's speed, and takes a third to two
    thirds of the time where there are more outputs than inputs (1408 x 256 on a server's processor: 80 and 170 us).
    oneDNN's product of a few rows gains a fifth.
    """
    outputs, inputs = weight.shape
    wide = outputs >= _WIDE * inputs and (outputs % _PAGE or inputs <= _FEW_IN)
    if not wide or not weight.is_contiguous() or not _HAS_ONEDNN:
        return None
    with torch.inference_mode(False), torch.no_grad():
        return weight.detach().t().contiguous().t()


@dataclass(slots=True)
class _Candidate:
    name: str
    parent: nn.Module
    names: tuple[str, ...]

    @property
    def members(self) -> list[Any]:
        """`nn.Linear` modules, or `QuantisedLinear` ones."""
        return [getattr(self.parent, name) for name in self.names]


def fuse_projections(model: nn.Module) -> FusionReport:
    """Joins the q/k/v and gate/up projections of a Hugging Face causal LM, where observation allows it.

    Runs the model twice on a few tokens without gradients (to observe, and to check the result), and holds
    one group's weights twice while it joins them. Gradients do not reach the members' parameters afterwards,
    and a parameter whose `.data` is replaced no longer takes part; call `unfuse_projections` before either.

    Args:
        model: a causal LM in evaluation mode, on one device, called with `input_ids` and `use_cache=False`.

    Returns:
        The groups joined and the candidates left apart, each with the reason.
    """
    # By modules: one that hangs in the tree twice shows in its calls.
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    fit: list[_Candidate] = []
    skipped: list[SkippedGroup] = []
    for candidate in _candidates(model):
        reason = _static_reason(candidate, uses)
        if reason is None:
            fit.append(candidate)
        else:
            skipped.append(SkippedGroup(candidate.name, candidate.names, reason))
    groups: list[FusedGroup] = []
    if fit:
        try:
            joined, apart = _join(model, fit)
        except Exception as error:  # any model code may run here, and a model that stays as it was still works
            unfuse_projections(model)
            reason = f"the forward on a few tokens failed: {described(error)}"
            logger.warning("projections stay unfused: %s", reason)
            joined, apart = [], [SkippedGroup(c.name, c.names, reason) for c in fit]
        groups += joined
        skipped += apart
    return FusionReport(tuple(groups), tuple(skipped))


def _join(model: nn.Module, candidates: list[_Candidate]) -> tuple[list[FusedGroup], list[SkippedGroup]]:
    """Observes a forward, joins the candidates whose calls allow it, and runs a forward with the result."""
    groups: list[FusedGroup] = []
    skipped: list[SkippedGroup] = []
    calls = _observe(model, candidates)
    for candidate in candidates:
        reason = _order_calls(candidate, calls)
        if reason is None:
            groups.append(_fuse(candidate))
        else:
            skipped.append(SkippedGroup(candidate.name, candidate.names, reason))
    if groups:
        _forward(model)
        if any(parameter.is_cuda for parameter in model.parameters()):
            torch.cuda.empty_cache()  # the members' former storages
    return groups, skipped


def unfuse_projections(model: nn.Module) -> int:
    """Makes every fused projection a plain `nn.Linear` again; weights stay views of the joined storage.

    Returns:
        The number of groups taken apart.
    """
    heads = [module for module in model.modules() if type(module) in (FusedHead, QuantisedHead)]
    for head in heads:
        parts = [member.weight_stored for member in head.fused_members] if isinstance(head, QuantisedHead) else []
        for member in head.__dict__["fused_members"]:
            for name in [name for name in member.__dict__ if name.startswith("fused_")]:
                del member.__dict__[name]
            member._buffers.pop("fused_bias", None)
            member.__class__ = QuantisedLinear if parts else nn.Linear
        if parts:
            head.fill(parts[0])  # type: ignore[operator]
    return len(heads)


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """Modules that have all attributes of a group, as linear layers of any kind, not fused yet."""
    fused = (FusedHead, FusedTail, QuantisedHead, QuantisedTail)
    for name, module in model.named_modules():
        for names in GROUPS:
            members = [getattr(module, n, None) for n in names]
            if all(isinstance(m, (nn.Linear, QuantisedLinear)) and not isinstance(m, fused) for m in members):
                yield _Candidate(name, module, names)


def _static_reason(candidate: _Candidate, uses: Counter[int]) -> str | None:
    """Why a candidate cannot be joined, from its modules alone."""
    members = candidate.members
    head = members[0]
    if len({id(m) for m in members}) < len(members):
        return "two of them are one module"
    quantised = [member for member in members if isinstance(member, QuantisedLinear)]
    if quantised:
        return _quantised_reason(candidate, quantised)
    for name, member in zip(candidate.names, members, strict=True):
        if type(member) is not nn.Linear:
            return f"{name} is a {type(member).__name__}, not a plain nn.Linear"
        if "forward" in member.__dict__ or has_hooks(member):
            return f"{name} has hooks or a replaced forward"
        if any(type(p) is not nn.Parameter for p in member.parameters()):
            return f"{name} has parameters of another class than nn.Parameter"
        if any(uses[id(p)] > 1 for p in member.parameters()):
            return f"{name} shares a parameter with another module"
        if any((p.dtype, p.device) != (head.weight.dtype, head.weight.device) for p in member.parameters()):
            return "dtypes or devices differ"
        if member.weight.shape[1] != head.weight.shape[1]:
            return "input sizes differ"
        if member.weight.device.type == "meta":
            return "the weights are not loaded (meta device)"
    return None


def _quantised_reason(candidate: _Candidate, quantised: list[QuantisedLinear]) -> str | None:
    if len(quantised) < len(candidate.names):
        return "only some of them are quantised"
    if any(has_hooks(member) for member in quantised):
        return "one of them has hooks"
    return why_not_stacked([member.weight_stored for member in quantised])


_Calls = dict[int, list[tuple[int, torch.Tensor, int]]]
"""Module id -> its calls: (running number, input, the input's version counter)."""


def _observe(model: nn.Module, candidates: list[_Candidate]) -> _Calls:
    """Runs the model on a few tokens and records when each candidate's member was called, and with what."""
    calls: _Calls = {}
    counter = iter(range(1 << 62))

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            calls.setdefault(id(module), []).append((next(counter), args[0], args[0]._version))

    handles = [m.register_forward_pre_hook(record) for c in candidates for m in c.members]
    try:
        _forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _forward(model: nn.Module) -> None:
    """One forward of two rows of three tokens."""
    config: Any = model.config
    device = next(model.parameters()).device
    pad = getattr(config, "pad_token_id", None)
    ids = [token for token in range(min(8, config.vocab_size)) if token != pad][:3]
    # Version counters, which tell whether an input changed between two calls, are off in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        model(input_ids=torch.tensor([ids, ids[::-1]], device=device), use_cache=False)


def _order_calls(candidate: _Candidate, calls: _Calls) -> str | None:
    """Puts the candidate's names in call order; returns the reason if its calls do not allow joining."""
    logs = {name: calls.get(id(getattr(candidate.parent, name)), []) for name in candidate.names}
    counts = {name: len(log) for name, log in logs.items()}
    if any(count != 1 for count in counts.values()):
        return "calls in one forward: " + ", ".join(f"{name} {count}" for name, count in counts.items())
    ordered = sorted(candidate.names, key=lambda name: logs[name][0][0])
    _, first, version = logs[ordered[0]][0]
    for name in ordered[1:]:
        _, other, its_version = logs[name][0]
        if other is not first:
            return f"{name} gets another input than {ordered[0]}"
        if its_version != version:
            return f"the input changes in place between {ordered[0]} and {name}"
    candidate.names = tuple(ordered)
    return None


def _fuse(candidate: _Candidate) -> FusedGroup:
    """Joins one group: stacks weight and bias, makes the members views of it, swaps their classes."""
    members = candidate.members
    if isinstance(members[0], QuantisedLinear):
        return _fuse_quantised(candidate, members)
    head, tails = members[0], members[1:]
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.cat([m.weight.detach() for m in members])
        bias = None
        if any(m.bias is not None for m in members):
            zeros = weight.new_zeros
            bias = torch.cat([zeros(m.out_features) if m.bias is None else m.bias.detach() for m in members])
        slots = tuple(Slot() for _ in tails)
        for tail, slot in zip(tails, slots, strict=True):
            tail.__class__ = FusedTail
            tail.__dict__["fused_slot"] = slot
        head.__class__ = FusedHead
        head.__dict__["fused_sizes"] = tuple(m.out_features for m in members)
        head.__dict__["fused_slots"] = slots
        head.__dict__["fused_members"] = tuple(members)
        _adopt(head, weight, bias)
    return FusedGroup(candidate.name, candidate.names, weight.numel() + (0 if bias is None else bias.numel()))


def _fuse_quantised(candidate: _Candidate, members: list[QuantisedLinear]) -> FusedGroup:
    """Joins one group of quantised projections: the head's buffers are the stacked weight's, the tails' views of it."""
    head, tails = members[0], members[1:]
    with torch.inference_mode(False), torch.no_grad():
        weight = stack([member.weight_stored for member in members])
        bias = None
        given = [member.bias for member in members if member.bias is not None]
        if given:
            zeros = given[0].new_zeros
            bias = torch.cat([zeros(m.out_features) if m.bias is None else m.bias.detach() for m in members])
        start = head.out_features
        slots = tuple(Slot() for _ in tails)
        for tail, slot in zip(tails, slots, strict=True):
            tail.fill(weight.rows(start, start + tail.out_features))
            start += tail.out_features
            tail.__class__ = QuantisedTail
            tail.__dict__["fused_slot"] = slot
        head.kind, head.block = weight.kind, weight.block
        head.data, head.scales, head.zeros = weight.data, weight.scales, weight.zeros
        head.__class__ = QuantisedHead
        head.register_buffer("fused_bias", bias, persistent=False)
        head.__dict__["fused_sizes"] = tuple(m.out_features for m in members)
        head.__dict__["fused_slots"] = slots
        head.__dict__["fused_members"] = tuple(members)
    return FusedGroup(candidate.name, candidate.names, weight.data.numel() + (0 if bias is None else bias.numel()))


def _adopt(head: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Makes `weight [sum of out, in]` and `bias` the group's storage; the members' `Parameter` objects stay.

    Written through `__dict__`, because `nn.Module.__setattr__` would register the parameters.
    """
    # A Parameter of an own tensor object: `fn` may have handed back the very Parameter that it got.
    head.__dict__["fused_weight"] = nn.Parameter(weight.detach(), requires_grad=False)
    head.__dict__["fused_bias"] = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    start = 0
    for member in head.__dict__["fused_members"]:
        rows = slice(start, start + member.out_features)
        member.weight.data = weight.detach()[rows]
        if member.bias is not None and bias is not None:
            member.bias.data = bias.detach()[rows]
        start += member.out_features
