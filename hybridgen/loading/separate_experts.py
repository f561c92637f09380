"""Quantised experts that a checkpoint stores one by one, as compressed-tensors, fine-grained FP8, AWQ and GPTQ do.

They are `<module>.experts.<number>.gate_proj`, `up_proj` and `down_proj`. The op for experts reads all of a layer from
one tensor, so they are copied into one while they are read, one expert at a time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.errors import CheckpointError
from hybridgen.kernels.linear.experts import problem
from hybridgen.kernels.linear.experts_form import Projection
from hybridgen.kernels.linear.layout import Block
from hybridgen.loading.assembly import ExpertsReader
from hybridgen.loading.stored import Stored, TensorFiles
from hybridgen.models.experts import Sizes
from hybridgen.models.packed_experts import PackedWeights, pad_rows
from hybridgen.models.quantised import QuantisedWeight, stack, why_not_stacked

_NAME = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj")
_PARTS = ("gate", "up", "down")
_STEP = 32
"""Inputs of the kernels' shortest step, which blocks have to be multiples of."""


class Expert(NamedTuple):
    """The projections of one, as they are stored."""

    gate: Stored
    up: Stored
    down: Stored


def find_experts(stored: Mapping[str, Stored]) -> dict[str, list[Expert]]:
    """Modules of experts of which all that are stored, numbered from 0 on, are run as they are stored.

    Args:
        stored: by the files' names; so are the modules.
    """
    found: dict[str, dict[int, dict[str, Stored]]] = defaultdict(lambda: defaultdict(dict))
    for name, each in stored.items():
        matched = _NAME.fullmatch(name)
        if matched is not None:
            found[matched[1]][int(matched[2])][matched[3]] = each
    return {
        owner: [Expert(**numbered[number]) for number in range(len(numbered))]
        for owner, numbered in found.items()
        if all(set(numbered.get(number, {})) == set(_PARTS) for number in range(len(numbered)))
        and all(each.dequantised is None for one in numbered.values() for each in one.values())
    }


class _Read(NamedTuple):
    gate_up: QuantisedWeight
    down: QuantisedWeight
    block: Block


def _read(expert: Expert, files: TensorFiles, device: torch.device, dtype: torch.dtype) -> _Read | str:
    """An expert's weights, or why the op does not take them."""
    weights = [each.read(files, device, dtype) for each in expert]
    gate, up, down = (each for each in weights if isinstance(each, QuantisedWeight))
    reason = why_not_stacked([gate, up])
    if reason is not None:
        return reason
    both = stack([gate, up])
    if both.block.outputs != down.block.outputs or (down.scales.shape[0] == 1 and down.block.outputs > 1):
        both, down = both.with_row_scales(), down.with_row_scales()
    blocks = {Block(each.block.outputs, each.block.inputs if each.scales.shape[1] > 1 else 0) for each in (both, down)}
    formats = {(each.kind, each.zeros is None, each.scales.dtype) for each in (both, down)}
    if len(blocks) > 1 or len(formats) > 1:
        return "gate, up and down differ in their formats"
    block = blocks.pop()
    if block.inputs % _STEP:
        return f"blocks of {block.inputs} inputs do not go into the kernels' steps"
    return _Read(both, down, block)


def experts_reader(
    experts: Sequence[Expert], sizes: Sizes, files: TensorFiles, dtype: torch.dtype
) -> ExpertsReader | str:
    """What reads a module's experts into one tensor for each projection, or why they are not run as they are stored.

    Args:
        sizes: of the module.

    Raises:
        CheckpointError: codes of the first expert are out of their range.
    """
    wanted = (sizes.width, sizes.hidden), (sizes.width, sizes.hidden), (sizes.hidden, sizes.width)
    if len(experts) != sizes.experts:
        return f"the files have {len(experts)} of {sizes.experts} experts"
    if any((each.outputs, each.inputs) != size for one in experts for each, size in zip(one, wanted, strict=True)):
        return "sizes differ from the config's"
    if len({repr(each.scheme) for one in experts for each in one}) > 1:
        return "experts differ in their formats"
    first = _read(experts[0], files, torch.device("cpu"), dtype)
    if isinstance(first, str):
        return first
    gate_up, down = (_projection([None if t is None else t[None] for t in _tensors(each)]) for each in first[:2])
    reason = problem(gate_up, down, sizes.hidden, first.gate_up.kind, first.block)
    if reason is not None:
        return reason

    def read(device: torch.device) -> PackedWeights:
        places: list[list[Tensor | None]] = []
        for number, expert in enumerate(experts):
            found = _read(expert, files, device, dtype)
            if isinstance(found, str) or found.block != first.block or found.gate_up.kind != first.gate_up.kind:
                raise CheckpointError(f"{expert.gate.name} has another format than the experts before it")
            weights = [_tensors(each) for each in found[:2]]
            if not places:
                places = [[None if t is None else t.new_empty(len(experts), *t.shape) for t in w] for w in weights]
            for targets, tensors in zip(places, weights, strict=True):
                for target, tensor in zip(targets, tensors, strict=True):
                    if target is not None and tensor is not None:
                        target[number] = tensor
        gate_up, down = (_projection(each) for each in places)
        return PackedWeights(gate_up, down, first.gate_up.kind, first.block)

    return read


def _tensors(weight: QuantisedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    return weight.data, weight.scales, weight.zeros


def _projection(tensors: Sequence[Tensor | None]) -> Projection:
    data, scales, zeros = tensors
    assert data is not None
    assert scales is not None
    return Projection(data, pad_rows(scales) if scales.dtype == torch.uint8 else scales, zeros)
