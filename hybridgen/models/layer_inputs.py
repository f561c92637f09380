"""What goes into some of a model's layers, kept while it runs: the hidden states that a drafter reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


class LayerInputs:
    """Keeps the inputs of layers, compiled or not.

    A call of a module goes to `_compiled_call_impl` first, which is what `nn.Module.compile()` sets and what compiled
    layers are put in; so both kinds are seen there, and there is no hook, for which layers would not be compiled nor
    steps recorded. It is there only while the model runs: nobody else sees it.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """`layers` may have one twice."""
        self._layers = tuple(layers)
        self._found: dict[nn.Module, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the model runs once."""
        self._found.clear()
        before = {layer: vars(layer).get("_compiled_call_impl") for layer in self._layers}
        for layer, compiled in before.items():
            call = layer._call_impl if compiled is None else compiled
            layer._compiled_call_impl = partial(self._call, layer, call)  # type: ignore[assignment]
        try:
            yield
        finally:
            for layer, compiled in before.items():
                if compiled is None:
                    vars(layer).pop("_compiled_call_impl", None)
                else:
                    layer._compiled_call_impl = compiled

    def _call(self, layer: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        value = args[0] if args else kwargs.get("hidden_states")
        if isinstance(value, Tensor):
            self._found[layer] = value[0]
        return call(*args, **kwargs)

    def take(self) -> tuple[Tensor | None, ...]:
        """What went into each of the layers, [T, hidden]; None: it was not called. Nothing is kept behind it."""
        found = tuple(self._found.get(layer) for layer in self._layers)
        self._found.clear()
        return found
