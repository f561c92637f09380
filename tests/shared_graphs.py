"""Compiled layers that engines of one test process hand on, where what Inductor makes of them is not the subject.

Every engine gives its layers' functions code objects of their own, and Dynamo takes seconds of the processor to fill
them. With the backend `eager`, which is for tests, an engine here takes the code objects of one that was closed and had
layers of the same classes and sizes, as many rows, and no fewer tokens to a call. Dynamo's guards decide as ever
whether what hangs on them is right for a call, and what is missing is compiled and counted.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from hybridgen.compilation import layers
from hybridgen.compilation.layers import CompiledLayers

BACKEND = "eager"
MOST_USES = 3
"""Engines that may have compiled something into the same code objects: Dynamo limits what one can have."""


@dataclass
class Functions:
    """Of one engine at a time."""

    key: Any
    """Classes and sizes of the layers, and rows; None: nothing is handed on."""
    budget: int = 0
    """Tokens that a call may have."""
    made: dict[str, types.FunctionType] = field(default_factory=dict)
    uses: int = 0
    """Engines that compiled something into them."""


_free: list[Functions] = []


def forget() -> None:
    """The next engine compiles all that it needs."""
    _free.clear()


@contextmanager
def shared() -> Iterator[None]:
    """Meanwhile engines take functions of earlier ones, and leave theirs when they are closed."""
    begin, end, own = CompiledLayers.__init__, CompiledLayers.remove, layers._own_code
    beginning: list[Functions] = []

    def own_code(name: str) -> types.FunctionType:
        made = beginning[-1].made if beginning else {}
        if name not in made:
            made[name] = own(name)
        return made[name]

    def init(self: CompiledLayers, decoder: Sequence[nn.Module], *args: Any, **options: Any) -> None:
        taken = _taken(*_key(decoder, **options))
        beginning.append(taken)
        try:
            begin(self, decoder, *args, **options)
        finally:
            beginning.pop()
        vars(self)["_taken"] = taken

    def remove(self: CompiledLayers) -> None:
        end(self)
        taken = vars(self).pop("_taken", Functions(None))
        taken.uses += self.compiles > 0
        if taken.key is not None and taken.uses <= MOST_USES and not self.late_compiles:
            _free.append(taken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_own_code", own_code)
        patch.setattr(CompiledLayers, "__init__", init)
        patch.setattr(CompiledLayers, "remove", remove)
        yield


def without_paths(config: str) -> str:
    """A config as JSON without the folder that it was read from."""
    return re.sub(r'"_name_or_path": ".*?",?', "", config)


def _key(decoder: Sequence[nn.Module], *, backend: str, max_batch: int, token_budget: int, **_: Any) -> Any:
    """What must be the same, and how many tokens it must take at least."""
    if backend != BACKEND:
        return None, 0
    kinds = (tuple((type(module), *map(_shape, _tensors(module))) for module in layer.modules()) for layer in decoder)
    return (max_batch, frozenset(kinds)), token_budget


def _taken(key: Any, budget: int) -> Functions:
    """Those that were left last of the ones that will do, or new ones."""
    for place in reversed(range(len(_free))):
        if _free[place].key == key and _free[place].budget >= budget:
            return _free.pop(place)
    return Functions(key, budget)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
