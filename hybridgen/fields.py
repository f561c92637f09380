"""What the fields of dataclasses are for.

A description is kept with its field, as metadata: `help()` shows it, the docs and the command line are made from it.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

Kind = TypeVar("Kind", bound=type)

_ABOUT = "about"
_WIDTH = 100


class Described(NamedTuple):
    """One field, as a reader needs it."""

    name: str
    type: str
    """As it is written in the source."""
    default: str | None
    """As it is written in the source; None where it has to be given."""
    about: str


def about(text: str) -> dict[str, Any]:
    """Metadata of a field: what it is for."""
    return {_ABOUT: text}


def described(kind: Kind) -> Kind:
    """A decorator above `@dataclass`: add the fields to the docstring of the class, which `help()` shows.

    Raises:
        TypeError: a field has no description.
    """
    lines = [inspect.cleandoc(kind.__doc__ or ""), "", "Fields:"]
    for each in fields_of(kind):
        given = "" if each.default is None else f", default {each.default}"
        text = f"{each.name} ({each.type}{given}): {each.about}"
        lines += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent="    ",
            subsequent_indent="        ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    kind.__doc__ = "\n".join(lines)
    if "__new__" in vars(kind):  # else help() shows its arguments, not the fields
        _, *rest = inspect.signature(vars(kind)["__init__"]).parameters.values()
        setattr(kind, "__signature__", inspect.Signature(rest))  # noqa: B010 - type checkers know no such attribute
    return kind


def fields_of(kind: type) -> Iterator[Described]:
    """The fields of a dataclass, in order.

    Raises:
        TypeError: one has no description.
    """
    for each in dataclasses.fields(kind):
        if _ABOUT not in each.metadata:
            raise TypeError(f"{kind.__name__}.{each.name} has no description; give it metadata=about(...)")
        yield Described(each.name, str(each.type), _default(each), each.metadata[_ABOUT])


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        text = str(field.default)
        # A member of a StrEnum is what it says.
        return repr(text) if isinstance(field.default, str) else text
    return None if field.default_factory is dataclasses.MISSING else repr(field.default_factory())
