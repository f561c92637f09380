"""Draws the plots of the docs from the result files, as SVG.

    python benchmarks/plots.py [--check]

`--check` writes nothing, and ends with 1 where a plot is not what its file says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

COLOURS = ("#2f6db3", "#d07f1c", "#8a8f98")
"""Of series: told apart by colour-blind readers too, and read on light and dark pages."""
BAR, GAP, LABELS, PANEL, VALUE = 15, 16, 172, 240, 52
"""Pixels: a bar's height, between groups, of the names, of a panel's bars, of a bar's number."""


class Panel(NamedTuple):
    """Bars of one measure."""

    title: str
    most: float
    """What the longest possible bar stands for."""
    shown: Callable[[float], str]


def bars(groups: Sequence[str], series: Sequence[str], panels: Sequence[Panel], values: Any) -> str:
    """Horizontal bars in groups, one panel beside the other.

    Args:
        values: by panel, group and series (their places); None: no bar.
    """
    head, group_height = 54, len(series) * BAR + GAP
    width, height = LABELS + len(panels) * (PANEL + VALUE), head + len(groups) * group_height
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="system-ui, sans-serif" font-size="12">',
        "<style>text { fill: #24292f } @media (prefers-color-scheme: dark) { text { fill: #d8dee4 } }</style>",
    ]
    x = 0
    for name, colour in zip(series, COLOURS, strict=False):
        lines.append(f'<rect x="{x}" y="4" width="11" height="11" rx="2" fill="{colour}"/>')
        lines.append(f'<text x="{x + 16}" y="14">{escape(name)}</text>')
        x += 44 + 7 * len(name)
    for p, panel in enumerate(panels):
        left = LABELS + p * (PANEL + VALUE)
        lines.append(f'<text x="{left}" y="42" font-weight="600">{escape(panel.title)}</text>')
        for g in range(len(groups)):
            for s in range(len(series)):
                value = values[p][g][s]
                if value is None:
                    continue
                top, long = head + g * group_height + s * BAR, PANEL * min(value / panel.most, 1)
                lines.append(
                    f'<rect x="{left}" y="{top}" width="{long:.1f}" height="{BAR - 3}" rx="2" fill="{COLOURS[s]}"/>'
                )
                lines.append(
                    f'<text x="{left + long + 5:.1f}" y="{top + 10}" font-size="11">{panel.shown(value)}</text>'
                )
    for g, name in enumerate(groups):
        y = head + g * group_height + len(series) * BAR / 2 + 3
        lines.append(f'<text x="{LABELS - 10}" y="{y:g}" text-anchor="end">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def speculation(results: Path = RESULTS) -> str:
    """Tokens a step and accepted drafts, by prompts and drafter."""
    rows = json.loads((results / "speculation-text-cpu.json").read_text())["rows"]
    found = {(_prompts(row), row["drafter"]): row for row in rows}
    groups, series = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    panels = (
        Panel("tokens a step", 5.0, lambda value: f"{value:.2f}"),
        Panel("drafts accepted", 1.0, lambda value: f"{value:.0%}"),
    )
    fields = "tokens_per_step", "accepted"
    values = [
        [[found[group, name][field] if (group, name) in found else None for name in series] for group in groups]
        for field in fields
    ]
    return bars(groups, series, panels, values)


def _prompts(row: dict[str, Any]) -> str:
    how = [f"penalty {row['repetition_penalty']:g}"] if row["repetition_penalty"] != 1 else []
    how += [f"temperature {row['temperature']:g}"] if row["temperature"] else []
    return ", ".join([{"held-out files": "files"}.get(row["what"], row["what"]), *how])


PLOTS: dict[str, Callable[[], str]] = {"speculation.svg": speculation}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 when a plot is not up to date"
    )
    arguments = parser.parse_args()
    stale = []
    for name, draw in PLOTS.items():
        path, drawn = DOCS / name, draw()
        if not path.exists() or path.read_text() != drawn:
            stale.append(name)
            if not arguments.check:
                path.write_text(drawn)
    if stale:
        print(f"{'not up to date' if arguments.check else 'drawn'}: {', '.join(stale)}")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
