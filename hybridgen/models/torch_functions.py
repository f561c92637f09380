"""transformers' own torch functions, where other libraries' stand in their place.

Where `fla-core`, `causal-conv1d` or `mamba-ssm` can be imported, transformers calls them instead of its torch
functions: in decode, on a CPU and on tensors without memory too. Mixers run by the torch functions here, which compile,
can be recorded and run anywhere; what is faster on a GPU is called by name (`models.packed`).
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def replaced(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """transformers' torch functions that a function's code names and that it would not reach, by name."""
    function = inspect.unwrap(function)
    names, found = getattr(function, "__globals__", {}), {}
    for name in function.__code__.co_names if inspect.isfunction(function) else ():
        value = names.get(name)
        if not inspect.isfunction(value) or not hasattr(value, "__wrapped__"):
            continue
        own = inspect.unwrap(value)
        within = inspect.getclosurevars(value).nonlocals
        if own.__module__ == function.__module__ and within.get("implementation", own) is not own:
            found[name] = own
    return found


def with_functions(function: Callable[..., Any], functions: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a function, unwrapped, whose code finds these by their names."""
    own: Any = inspect.unwrap(function)
    names = {**own.__globals__, **functions}
    # By its module's name Dynamo would look names up in the module again, where others stand.
    del names["__name__"]
    made = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    made.__kwdefaults__ = own.__kwdefaults__
    made.__module__ = own.__module__
    return made


def by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, or where other libraries' stand in place of torch functions, a copy that calls those."""
    functions = replaced(function)
    return with_functions(function, functions) if functions else function


@contextmanager
def torch_alone(model: nn.Module) -> Iterator[None]:
    """Inside, the code of a model's modules calls transformers' torch functions."""
    put_back = []
    for kind in {type(module) for module in model.modules()}:
        function: Any = inspect.unwrap(kind.forward)
        for name, own in replaced(function).items():
            names = function.__globals__
            put_back.append((names, name, names[name]))
            names[name] = own
    try:
        yield
    finally:
        for names, name, value in reversed(put_back):
            names[name] = value
