"""The result as one HTML page that needs nothing else: no network, no script, pictures inside."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape

from hybridgen.comparison.data.results import ComparisonData
from hybridgen.comparison.render.report import Table, summary, tables, warnings

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 82rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
div.wide { overflow-x: auto; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th { border-bottom: 2px solid #888; background: #f5f5f5; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""

CAPTIONS = {
    "ttft": "Time to first token by prompt length",
    "throughput": "Generated tokens per second by batch size",
    "latency": "Distribution of latencies",
    "startup": "Start-up by part",
}


def page(comparison: ComparisonData, pictures: Mapping[str, bytes]) -> str:
    """The page, with these PNG pictures."""
    title = f"Comparison: {comparison.model}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p><strong>{escape(line)}</strong></p>" for line in warnings(comparison)),
        "<ul>",
        *(f"<li>{escape(line)}</li>" for line in summary(comparison)),
        "</ul>",
    ]
    for name, data in pictures.items():
        source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
        caption = escape(CAPTIONS.get(name, name))
        parts.append(f'<h2>{caption}</h2><img alt="{caption}" src="{source}">')
    parts += [_table(table) for table in tables(comparison)]
    for name, values in (("Provenance", comparison.provenance), ("Config", comparison.config.as_dict())):
        parts.append(f"<h2>{name}</h2><pre>{escape(json.dumps(values, indent=1, default=str))}</pre>")
    return "\n".join([*parts, "</body></html>", ""])


def body(comparison: ComparisonData) -> str:
    """The summary and the tables, to stand in another page."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in summary(comparison))
    careful = [f"<p><strong>{escape(line)}</strong></p>" for line in warnings(comparison)]
    return "\n".join([*careful, f"<ul>{lines}</ul>", *(_table(table) for table in tables(comparison))])


def _table(table: Table) -> str:
    words = {index for index, name in enumerate(table.head) if name in ("phase, kind: reason", "compile cache")}

    def cell(tag: str, index: int, text: str) -> str:
        kind = ' class="text"' if index in words else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", index, name) for index, name in enumerate(table.head))
    rows = ["".join(cell("td", index, text) for index, text in enumerate(row)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
