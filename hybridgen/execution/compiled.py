"""One compiled decoder layer that serves all layers.

`torch.compile` of a whole model unrolls its layers, so that compile time grows with depth. Here the compile unit is a
free function of the layer: Dynamo's cache hangs on a function's code, so layers of the same structure share one
graph. Prefill, decode of one row (which Dynamo specialises) and decode of several rows are separate code objects,
because entries of one code object share a recompile limit and are searched in turn.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters as dynamo_counters

from hybridgen.errors import ConfigError
from hybridgen.models.attention import Phase, StepMetadata


def run_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The compile unit: a decoder layer's own forward."""
    return type(layer).forward(layer, *args, **kwargs)


def _compile(name: str, backend: str) -> Callable[..., Any]:
    """`run_layer` with a code object of its own, so that its compiled entries are its own too."""
    code = run_layer.__code__.replace(co_name=name)
    function = types.FunctionType(code, run_layer.__globals__, name)
    try:
        # Not dynamic=True: only the number of tokens is (see `mark_tokens_dynamic`).
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    except torch._dynamo.exc.InvalidBackend as error:
        known = ", ".join(torch._dynamo.list_backends(exclude_tags=None))
        raise ConfigError(f"compile_backend={backend!r} is unknown; choose one of: {known}") from error


def graph_count() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return int(dynamo_counters["stats"]["unique_graphs"])


class CompiledLayers:
    """Routes each call of a decoder layer to its compiled form, once `install()` ran and until `remove()`."""

    def __init__(
        self, layers: Sequence[nn.Module], step: StepMetadata, *, backend: str, max_batch: int, token_budget: int
    ) -> None:
        self._layers = layers
        self._step = step
        self._most_tokens = {Phase.PREFILL: token_budget, Phase.DECODE: max_batch}
        self._prefill = _compile("prefill_layer", backend)
        self._decode = _compile("decode_layer", backend)
        self._decode_one = _compile("decode_one_layer", backend)
        self._warming = False
        self.graphs = 0
        """Graphs compiled while warming up."""
        self.late_graphs = 0
        """Graphs compiled after it: each one is a stall that a user saw."""

    def install(self) -> None:
        """From now on `layer(...)` runs compiled."""
        for layer in self._layers:
            # The hook that nn.Module.compile() sets; hooks of the layer do not run behind it.
            layer._compiled_call_impl = functools.partial(self._call, layer)

    def remove(self) -> None:
        """`layer(...)` runs as it did before."""
        for layer in self._layers:
            vars(layer).pop("_compiled_call_impl", None)

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Compile here, with the number of tokens marked dynamic."""
        before = graph_count()
        self._warming = True
        try:
            # One graph for each kind of layer; the default limit of 8 is below what some models have.
            with torch._dynamo.config.patch(recompile_limit=max(64, len(self._layers))):
                yield
        finally:
            self._warming = False
            self.graphs += graph_count() - before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count compilations that a step causes."""
        before = graph_count()
        try:
            yield
        finally:
            late = graph_count() - before
            if late:
                if not self.late_graphs:
                    warnings.warn(
                        f"a step compiled {late} more graph(s) after warm-up; see EngineStats.late_graphs",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                self.late_graphs += late

    def _call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tokens = self._step.slots.shape[0]
        if self._warming and tokens > 1:
            mark_tokens_dynamic((args, kwargs, self._step), tokens, self._most_tokens[self._step.phase])
        if self._step.phase is Phase.PREFILL:
            return self._prefill(layer, *args, **kwargs)
        return (self._decode_one if tokens == 1 else self._decode)(layer, *args, **kwargs)


def mark_tokens_dynamic(values: Any, tokens: int, most: int) -> None:
    """Mark the token dimension of every tensor in nested containers as any number from 2 to `most`.

    It is dim 1 of [1, T, ...] and dim 0 of [T].
    """
    if isinstance(values, torch.Tensor):
        dim = 1 if values.dim() > 1 and values.shape[0] == 1 else 0
        if most > 2 and values.dim() > dim and values.shape[dim] == tokens and (dim or values.dim() == 1):
            torch._dynamo.mark_dynamic(values, dim, min=2, max=most)
    elif isinstance(values, StepMetadata):
        mark_tokens_dynamic([values.slots, values.positions, values.rope_lengths], tokens, most)
    elif isinstance(values, dict):
        mark_tokens_dynamic(list(values.values()), tokens, most)
    elif isinstance(values, (tuple, list)):
        for value in values:
            mark_tokens_dynamic(value, tokens, most)
