"""Writes what the docs say of every public name and of every field, from the docstrings and the fields' metadata.

`python docs/make_reference.py` writes `reference.md` and the tables of fields in the other pages; with `--check` it
writes nothing and ends with status 1 where a page is not up to date. A table stands between the lines
`<!-- fields of NAME -->` and `<!-- end of fields -->`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import hybridgen
from hybridgen.fields import fields_of

DOCS = Path(__file__).parent
_TABLE = re.compile(r"(<!-- fields of (?P<name>\w+) -->\n).*?(?=<!-- end of fields -->)", re.DOTALL)
_SECTIONS = ("Args", "Returns", "Raises", "Yields")
_INTRO = """# Reference

Every public name, as `help()` has it. Made by `docs/make_reference.py` from the docstrings.
"""


def table(kind: type) -> str:
    """A row for each field of a dataclass."""
    rows = [
        f"| `{each.name}` | {'' if each.default is None else f'`{_cell(each.default)}`'} | {_cell(each.about)} |"
        for each in fields_of(kind)
    ]
    return "\n".join(["| field | default | |", "|---|---|---|", *rows, ""])


def reference() -> str:
    """The page of all public names."""
    return "\n".join([_INTRO, *(part for name in hybridgen.__all__ for part in _entry(name))])


def page(text: str) -> str:
    """A page with its tables of fields as they should be."""
    return _TABLE.sub(lambda found: found[1] + "\n" + table(getattr(hybridgen, found["name"])) + "\n", text)


def _entry(name: str) -> Iterator[str]:
    thing = getattr(hybridgen, name)
    yield f"## {name}\n"
    if not inspect.isclass(thing):
        yield f"```text\n{_signature(name, thing)}\n```\n"
    yield _prose(thing)
    if not inspect.isclass(thing) or issubclass(thing, BaseException):
        return
    if dataclasses.is_dataclass(thing):
        yield table(thing)
    if issubclass(thing, Enum):
        yield "\n".join(f"- `{member.value}`" for member in thing) + "\n"
    elif not dataclasses.is_dataclass(thing):
        yield f"```text\n{_signature(name, thing.__init__)}\n```\n"
        yield _prose(thing.__init__)
    for member, value in _members(thing).items():
        call = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        yield f"### {name}.{member}\n"
        if not isinstance(value, property):
            yield f"```text\n{_signature(member, call)}\n```\n"
        yield _prose(call)


def _members(kind: type) -> dict[str, Any]:
    """What a class offers by name: its own calls first, then those that it has from other classes of the package."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("hybridgen")]
    names = dict.fromkeys(name for base in ours for name, value in vars(base).items() if _is_call(value))
    return {name: inspect.getattr_static(kind, name) for name in names if not name.startswith("_")}


def _is_call(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod))


def _signature(name: str, call: Any) -> str:
    parameters = [
        str(each.replace(annotation=each.empty))
        for each in inspect.signature(call).parameters.values()
        if each.name not in ("self", "cls")
    ]
    star = next(
        (i for i, each in enumerate(inspect.signature(call).parameters.values()) if each.kind == each.KEYWORD_ONLY),
        None,
    )
    if star is not None:
        skipped = sum(each in ("self", "cls") for each in inspect.signature(call).parameters)
        parameters.insert(star - skipped, "*")
    return f"{name}({', '.join(parameters)})"


def _prose(thing: Any) -> str:
    """A docstring as Markdown: what its sections list becomes lists. Fields have their table."""
    text = (inspect.getdoc(thing) or "").partition("\nFields:\n")[0]
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        section = line.removesuffix(":")
        if line.endswith(":") and section in _SECTIONS:
            inside = True
            lines += ["", f"**{section}**", ""]
        elif inside and line.startswith("    ") and not line.startswith("     "):
            name, sign, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if sign else f"- {line.strip()}")
        elif inside and not line.startswith(" ") and line:
            inside = False
            lines += ["", line]
        else:
            lines.append(f"  {line.strip()}" if inside and line else line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write or check the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    wanted = {path: page(path.read_text()) for path in sorted(DOCS.glob("*.md"))}
    wanted[DOCS / "reference.md"] = reference()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if not check:
        for path in stale:
            path.write_text(wanted[path])
    if stale:
        sys.stdout.write(f"{'not up to date' if check else 'written'}: {', '.join(path.name for path in stale)}\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
