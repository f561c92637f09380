"""Hidden states of prompts: what a prefill call's layers hand on, kept for those who asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridgen.execution.plan import PrefillChunk
from hybridgen.models import BoundModel


class CapturedStates:
    """The hidden states of one prefill call's chunks that want some."""

    def __init__(self, chunks: Sequence[PrefillChunk], bound: BoundModel) -> None:
        self._chunks = tuple(chunks)
        self._bound = bound
        self._wanted = sorted({layer for chunk in chunks if chunk.hidden for layer in chunk.hidden.layers})
        self._found: dict[int, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the model runs the call. Layer i's input is state i; what comes behind the last norm is the last."""
        layers = self._bound.layers
        with ExitStack() as undo:
            for index in self._wanted:
                if index == len(layers):
                    undo.callback(_holder(self._bound).register_forward_hook(self._note_output).remove)
                    continue
                layer, note = layers[index], partial(self._note_input, index)
                compiled = layer._compiled_call_impl
                if compiled is None:
                    undo.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
                else:  # a compiled layer's hooks are not called
                    undo.callback(setattr, layer, "_compiled_call_impl", compiled)
                    layer._compiled_call_impl = partial(_noted, note, compiled)  # type: ignore[assignment]
            yield
        missing = [index for index in self._wanted if index not in self._found]
        if missing:
            raise RuntimeError(f"layer {missing[0]} was not called")
        if any(state.dim() != 2 for state in self._found.values()):
            raise RuntimeError("layers of this model hand on several states of each token")
        widths = sorted({state.shape[-1] for state in self._found.values()})
        if len(widths) > 1:
            raise RuntimeError(f"these states have {' and '.join(map(str, widths))} numbers; ask for them apart")

    def _note_input(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs["hidden_states"]
        self._found[layer] = value[0].clone()

    def _note_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        value = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        self._found[len(self._bound.layers)] = value[0].clone()

    def read(self) -> list[Tensor]:
        """Wait for them. For each chunk that wants some: [layers, tokens, hidden] on the CPU; pooled, [layers, 1,
        hidden], for a mean its float32 sum."""
        parts = []
        start = 0
        for chunk in self._chunks:
            run = slice(start, start := start + len(chunk.tokens))
            if chunk.hidden is None:
                continue
            states = torch.stack([self._found[layer][run] for layer in chunk.hidden.layers])
            if chunk.hidden.pool == "last":
                states = states[:, -1:]
            elif chunk.hidden.pool == "mean":
                states = states.float().sum(1, keepdim=True)
            parts.append(states.cpu())
        return parts


def _holder(bound: BoundModel) -> nn.Module:
    """The module that runs the layers, and what comes behind them. Not always the model's `base_model`: OPT's is not
    called, and Llama 4's text model has none of the name that its class says."""
    first = bound.layers[0]
    lists = [module for module in bound.model.modules() if isinstance(module, nn.ModuleList)]
    layers = next(each for each in lists if len(each) and each[0] is first)
    return next(module for module in bound.model.modules() if any(child is layers for child in module.children()))


def _noted(note: Callable[..., None], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    note(None, args, kwargs)
    return call(*args, **kwargs)
