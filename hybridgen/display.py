"""How results look in a notebook, and short texts for `repr()`."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_CELL = 'style="text-align: left; vertical-align: top; white-space: pre-wrap"'


def short(text: str, limit: int = 60) -> str:
    """A text, cut where it is longer."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def html_table(rows: Iterable[tuple[object, object]]) -> str:
    """A table of two columns; texts stand as they are, with their spaces and lines."""
    cells = "".join("<tr>" + "".join(f"<td {_CELL}>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tbody>{cells}</tbody></table>"
