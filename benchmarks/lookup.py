"""Finds one figure in a result file: what the docs, `requirements.py` and `targets.py` quote, they quote by a key.

A key goes from the outside in: `rows[model=tiny;batch=1].step_us`. In brackets are fields that tell one item
of a list from all others. Two keys with ` / ` between them are a ratio of two figures of the same file, or, where the
second is written `other.json: key`, of two files: of runs that could not be one.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PART = re.compile(r"(?P<name>[^.\[\]]+)(?:\[(?P<fields>[^\]]*)\])?(?:\.|$)")


@cache
def result(file: str, results: Path = RESULTS) -> dict[str, Any]:
    """A result file's content."""
    found: dict[str, Any] = json.loads((results / file).read_text())
    return found


def value(file: str, key: str, results: Path = RESULTS) -> Any:
    """What a result file has at a key.

    Raises:
        KeyError: it has nothing there, or several items that the key does not tell apart.
    """
    over = []
    for part in key.split(" / "):
        other, between, rest = part.rpartition(": ")
        over.append(_value(result(other if between else file, results), rest))
    return over[0] if len(over) == 1 else over[0] / over[1]


def figure(file: str, key: str, results: Path = RESULTS) -> float:
    """The number at a key, or the ratio of two.

    Raises:
        KeyError: as `value()`, or what is there is no number.
    """
    found = value(file, key, results)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise KeyError(f"{file}: {key} is {found!r}, no number")
    return float(found)


def _value(found: Any, key: str) -> Any:
    position = 0
    while position < len(key):
        part = _PART.match(key, position)
        if part is None or not isinstance(found, dict) or part["name"] not in found:
            raise KeyError(f"nothing at {key!r} from character {position} on")
        found = found[part["name"]]
        if part["fields"] is not None:
            found = _item(found, part["fields"], key)
        position = part.end()
    return found


def _item(items: Any, fields: str, key: str) -> Any:
    """The one item of a list that has these fields: `name=value`, `;` between several."""
    wanted = dict(field.split("=", 1) for field in fields.split(";"))
    found = [item for item in items if all(str(item.get(name)) == text for name, text in wanted.items())]
    if len(found) != 1:
        raise KeyError(f"{len(found)} items have {fields!r} in {key!r}; one is needed")
    return found[0]


def rewrite_pages(description: str | None, folder: Path, rewritten: Callable[[str], str]) -> int:
    """What a script does that writes figures into pages: `--check` says whether they agree, else they are written.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 when a page is not up to date"
    )
    arguments = parser.parse_args()
    stale = []
    for page in sorted(folder.glob("*.md")):
        text = page.read_text()
        new = rewritten(text)
        if new != text:
            stale.append(page.name)
            if not arguments.check:
                page.write_text(new)
    if stale:
        print(f"{'not up to date' if arguments.check else 'rewritten'}: {', '.join(stale)}")
    return int(arguments.check and bool(stale))
