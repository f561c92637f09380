"""Modules that run as a class made of their own and a mark, until their own is given back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def made_class(kind: Any, mark: type[nn.Module], members: Mapping[str, Any], namespace: dict[str, Any]) -> Any:
    """A class of a module's own class and a mark, with other members. The mark tells it from the module's own.

    Args:
        namespace: the `globals()` of the caller, which keeps the class: what is compiled is kept with its classes'
            names, by which another process finds them there, once it has bound.
    """
    title = f"{kind.__module__}.{kind.__qualname__}".replace(".", "_")
    made = type(title, (kind, mark), {**members, "__module__": namespace["__name__"]})
    namespace[title] = made
    return made


def give_back(module: nn.Module, mark: type[nn.Module]) -> None:
    """Let a module have its own class again, if it runs as one with this mark."""
    if isinstance(module, mark):
        module.__class__ = type(module).__bases__[0]
