"""A second module on the same weights, so that several engines can have one model at a time.

An engine changes the module that it runs (attention, rotary modules, layer calls, projections) and so takes it for
itself. What it changes is the module tree; the weights it only reads. A twin is a tree of its own whose parameters are
the very tensors of the first.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from hybridgen.models.projections import FusedHead

M = TypeVar("M", bound=nn.Module)


def twin(model: M) -> M:
    """A copy of a module tree that shares the parameters, joined projections' weights included.

    Buffers and configs are copied: rotary modules write to theirs. Moving, casting or training one of the two is not
    for a shared tensor; what is written into a parameter in place is seen by both.

    Args:
        model: any module; not while an engine has it, or the copy would have parts of that engine.
    """
    shared: list[Any] = list(model.parameters())
    for module in model.modules():
        if isinstance(module, FusedHead):  # its weights are no registered parameters
            shared += [weight for weight in (module.fused_weight, module.fused_bias) if weight is not None]
    # deepcopy takes what its memo holds as copied already.
    return copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
