"""Fills `benchmarks/targets.json` from the results, and writes its table into docs/performance.md.

A target is an object: `group` and `name`, the `unit`, whether `lower` or `higher` is `better`, what it `must` reach and
what is the `aim` (null: none), and `measured`: what the result `file` has at `key` (see `lookup.py`), or null while
nothing has measured it. A new result counts once its file and key are named here; the script fills the number.

    python benchmarks/targets.py            # fill the file, rewrite the page
    python benchmarks/targets.py --check    # exit status 1 when the file, the page and the results disagree
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from lookup import RESULTS, ROOT, figure
from table_cells import table
from tables import NOT_MEASURED

TARGETS = ROOT / "benchmarks" / "targets.json"
PAGE = ROOT / "docs" / "performance.md"
FIELDS = ("group", "name", "unit", "better", "must", "aim", "measured", "file", "key")
BETTER = ("lower", "higher")
_MARKED = re.compile(r"(<!-- targets -->\n).*?(<!-- end -->)", re.DOTALL)

Target = dict[str, Any]


def filled(targets: list[Target], results: Path = RESULTS) -> list[Target]:
    """The targets with what their files have now.

    Raises:
        KeyError: a file has nothing at its key.
    """
    return [
        {**target, "measured": None if target["file"] is None else figure(target["file"], target["key"], results)}
        for target in targets
    ]


def reached(target: Target, limit: str) -> bool | None:
    """Whether the measured value is as good as `must` or `aim`; None where one of the two is not known."""
    measured, wanted = target["measured"], target[limit]
    if measured is None or wanted is None:
        return None
    return bool(measured <= wanted if target["better"] == "lower" else measured >= wanted)


def lines(targets: list[Target]) -> str:
    """The table of the page."""
    rows = []
    for target in targets:
        must, aim = reached(target, "must"), reached(target, "aim")
        state = "open" if must is None else "missed" if not must else "aim reached" if aim else "reached"
        limits = [_number(target[name]) for name in ("must", "aim")]
        measured = NOT_MEASURED if target["measured"] is None else _number(target["measured"])
        file = "" if target["file"] is None else f"`{target['file']}`"
        bound = "at most" if target["better"] == "lower" else "at least"
        rows.append([target["group"], target["name"], file, target["unit"], bound, *limits, measured, state])
    head = ["", "target", "result", "unit", "", "must", "aim", "measured", "state"]
    return "\n".join(table(head, rows, 5)) + "\n"


def _number(value: float | None) -> str:
    """Enough digits to see on which side of a limit it is."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}" if abs(value) >= 10 else f"{value:.3f}"


def rewritten(text: str, targets: list[Target]) -> str:
    """The page with the table of these targets.

    Raises:
        SystemExit: it has no place for the table.
    """
    new, count = _MARKED.subn(lambda match: match[1] + lines(targets) + match[2], text)
    if count != 1:
        raise SystemExit(f"{count} places for the targets in the page; one was expected, between markers")
    return new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when something is stale")
    arguments = parser.parse_args()
    targets = filled(json.loads(TARGETS.read_text()))
    stale = []
    texts = {TARGETS: json.dumps(targets, indent=1) + "\n", PAGE: rewritten(PAGE.read_text(), targets)}
    for path, text in texts.items():
        if path.read_text() != text:
            stale.append(path.name)
            if not arguments.check:
                path.write_text(text)
    if stale:
        print(f"{'not up to date' if arguments.check else 'rewritten'}: {', '.join(stale)}")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
