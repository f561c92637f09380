"""Copies a tree of modules so that the copy has modules and configs of its own, and nothing else of its own."""

from __future__ import annotations

import copy
import functools
import operator
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hybridgen.models.projections import Slot

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
BACKWARD_TABLES = ("_backward_hooks", "_backward_pre_hooks")
"""Steps run without gradients, so that these are never called; a copy has empty ones."""


class TreeCopy:
    """Copies modules, each once, and what refers to them.

    Parameters, buffers and all other values are shared. What is a module or a config, or holds one (containers, bound
    methods, partial functions, closures, weak references), is made anew with the copies. An object of any other class
    that holds a module keeps the original's.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Any, Any]] = {}
        """By identity of the original, which is held: (original, copy)."""
        self._open: set[int] = set()
        """Containers and functions that are being looked into."""

    @property
    def modules(self) -> list[tuple[nn.Module, Any]]:
        """(original, copy) of each module."""
        return [pair for pair in self._copies.values() if isinstance(pair[0], nn.Module)]

    @property
    def configs(self) -> list[tuple[Any, Any]]:
        """(original, copy) of each config."""
        return [pair for pair in self._copies.values() if isinstance(pair[0], PreTrainedConfig)]

    def module(self, original: Any) -> Any:
        """The copy of a module, in evaluation mode and without hooks."""
        known = self._copies.get(id(original))
        if known is not None:
            return known[1]
        if isinstance(original, torch.jit.ScriptModule):  # it is its code; nothing in it can be exchanged
            return original
        if isinstance(original, torch._dynamo.eval_frame.OptimizedModule):
            # What torch.compile() returned calls the module that it was given, and no copy of it.
            made = self.module(original._orig_mod)
            self._copies[id(original)] = (original, made)
            return made
        made = object.__new__(type(original))
        self._copies[id(original)] = (original, made)
        state = vars(made)
        for name, value in vars(original).items():
            if name in HOOK_TABLES or name in BACKWARD_TABLES:
                state[name] = OrderedDict()
            elif name in ("_parameters", "_buffers"):
                state[name] = value.copy()
            elif name == "_modules":
                children = [(key, None if child is None else self.module(child)) for key, child in value.items()]
                state[name] = type(value)(children)
            else:
                state[name] = self.value(value)
        state["training"] = False
        state["_compiled_call_impl"] = None
        return made

    def value(self, value: Any) -> Any:
        """What a copy has where an original has this."""
        if isinstance(value, (torch.Tensor, str, int, float, bool, type(None), torch.dtype, torch.device, type)):
            return value
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, PreTrainedConfig):
            return self._once(value, _own_config)
        if isinstance(value, Slot):
            return self._once(value, lambda _: Slot())
        if id(value) in self._open:
            return value
        self._open.add(id(value))
        try:
            return self._holder(value)
        finally:
            self._open.discard(id(value))

    def _once(self, original: Any, make: Callable[[Any], Any]) -> Any:
        known = self._copies.get(id(original))
        if known is None:
            known = self._copies[id(original)] = (original, make(original))
        return known[1]

    def _holder(self, value: Any) -> Any:
        """A container or a function with copies in place of the modules and configs that it holds; itself, if none."""
        kind = type(value)
        if isinstance(value, weakref.ref):
            target = value()
            made = self.value(target) if isinstance(target, nn.Module) else target
            return value if made is target else weakref.ref(made)
        if isinstance(value, types.MethodType):
            owner, function = self.value(value.__self__), self.value(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if isinstance(value, functools.partial):
            return self._partial(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if kind in (dict, OrderedDict):
            made = {key: self.value(inner) for key, inner in value.items()}
            return value if _same(made.values(), value.values()) else kind(made)
        if isinstance(value, (list, tuple, set, frozenset)):
            items = [self.value(inner) for inner in value]
            if _same(items, value):
                return value
            return kind(*items) if hasattr(value, "_fields") else kind(items)
        return value

    def _partial(self, value: functools.partial[Any]) -> Any:
        function, arguments, keywords = self.value(value.func), self.value(value.args), self.value(value.keywords)
        if function is value.func and arguments is value.args and keywords is value.keywords:
            return value
        made = functools.partial(function, *arguments, **keywords)
        vars(made).update({name: self.value(inner) for name, inner in vars(value).items()})
        return made

    def _function(self, value: types.FunctionType) -> Any:
        """A closure over modules is one over their copies; what else it closes over is shared."""
        cells = value.__closure__ or ()
        before = [cell.cell_contents for cell in cells if _is_filled(cell)]
        after = iter([self.value(inner) for inner in before])
        defaults, keywords = self.value(value.__defaults__), self.value(value.__kwdefaults__)
        renewed = [types.CellType(next(after)) if _is_filled(cell) else cell for cell in cells]
        changed = [
            _is_filled(old) and old.cell_contents is not new.cell_contents
            for old, new in zip(cells, renewed, strict=True)
        ]
        if not any(changed) and defaults is value.__defaults__ and keywords is value.__kwdefaults__:
            return value
        # A cell that stays is shared: what the function assigns there is seen by whoever else closes over it.
        kept = tuple(new if differs else old for old, new, differs in zip(cells, renewed, changed, strict=True))
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, kept)
        made.__kwdefaults__ = keywords
        made.__qualname__, made.__module__ = value.__qualname__, value.__module__
        vars(made).update(vars(value))
        return made


def _own_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy whose model returns logits, as an object, and nothing that costs time or hooks."""
    made = copy.deepcopy(config)
    for name, value in vars(made).items():
        if name.lstrip("_").startswith("output_") and value:
            vars(made)[name] = False
    vars(made)["return_dict"] = True
    return made


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _same(values: Any, others: Any) -> bool:
    """Whether both have the same objects, in order."""
    return all(map(operator.is_, values, others))
