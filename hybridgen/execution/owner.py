"""What a runner keeps of the model's owner, who may train it, hook it and replace its tensors while it generates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hybridgen.device.watched import has_forward_hooks
from hybridgen.fused.decode import FusedDecode
from hybridgen.graphs import GraphKey
from hybridgen.models import BoundModel
from hybridgen.models.twin import Changes, Twin


class Following:
    """The state of `following.begin_call`."""

    def __init__(self, bound: BoundModel, twin: Twin[Any] | None) -> None:
        """`twin`: whose tree the bound model is, where its owner can change it; None: nobody can."""
        self.twin = twin
        self.drafters_twin: Twin[Any] | None = None
        """The same of a live module that drafts."""
        own = () if twin is not None else tuple(filter(has_forward_hooks, bound.model.modules()))
        self.own_hooks = Changes(hooked=own)
        """Of a model without an owner: the hooks that its own code put there."""
        self.hooks: tuple[bool, tuple[nn.Module, ...]] = (False, ())
        """Hooks on all modules or not, and modules with hooks, at the last call."""
        self.unused: FusedDecode | None = None
        """The fused kernels, while hooks keep them from being used."""
        self.stale = False
        """Whether they were made for tensors or settings that are not the model's any more."""
        self.again: list[GraphKey] = []
        """What to record at once when hooks are gone, because nothing is recorded while idle."""
        self.released: list[tuple[torch.UntypedStorage, int, int]] = []
        """Storages of layers' states that have no memory now, their sizes in bytes and where they lay."""
        self.fuse_again: Callable[[], None] | None = None
        """Makes the fused kernels anew."""

    def forget(self) -> None:
        """The runner is closed."""
        self.unused = self.fuse_again = None
