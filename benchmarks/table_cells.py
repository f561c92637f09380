"""What tables are made of: lines of Markdown, and figures as cells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Result = dict[str, Any]


def table(head: list[str], rows: Iterable[list[str]], words: int = 1) -> list[str]:
    """Lines of a Markdown table; all but the first columns, which hold words, are aligned to the right."""
    line = ["---"] * words + ["---:"] * (len(head) - words)
    return [f"| {' | '.join(cells)} |" for cells in (head, line, *rows)]


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def spread(times: dict[str, float]) -> str:
    return f"{times['p50_us']:,.1f} / {times['p99_us']:,.1f}"
