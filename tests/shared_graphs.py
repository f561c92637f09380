"""Compiled layers that engines of one test process hand on, where what Inductor makes of them is not the subject.

Every engine gives its layers' functions code objects of their own, and Dynamo takes seconds of the processor to fill
them. With the backend `eager`, which is for tests, an engine here takes the code objects of one that was closed and had
layers of the same classes and config, and the same limits. Dynamo's guards decide as ever whether what hangs on them is
right for a call, and what is missing is compiled and counted.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
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
    made: dict[str, types.FunctionType] = field(default_factory=dict)
    uses: int = 0
    """Engines that compiled something into them."""


_free: dict[Any, Functions] = {}


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
        key = _key(decoder, **options)
        taken = Functions(None) if key is None else _free.pop(key, Functions(key))
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
            _free[taken.key] = taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_own_code", own_code)
        patch.setattr(CompiledLayers, "__init__", init)
        patch.setattr(CompiledLayers, "remove", remove)
        yield


def _key(decoder: Sequence[nn.Module], *, backend: str, max_batch: int, token_budget: int, **_: Any) -> Any:
    """What must be the same; None: nothing is handed on."""
    if backend != BACKEND:
        return None
    modules = [module for layer in decoder for module in layer.modules()]
    config = next((str(module.config) for module in modules if hasattr(module, "config")), "")
    return max_batch, token_budget, config, *map(type, modules)
