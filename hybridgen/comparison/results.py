"""The public result of a comparison, and reading it from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from hybridgen.comparison.data.results import OK, CellResult, ComparisonData, SubjectResult
from hybridgen.comparison.render.files import save
from hybridgen.comparison.render.html import body
from hybridgen.comparison.render.report import terminal
from hybridgen.errors import ConfigError
from hybridgen.fields import described

__all__ = ["CellResult", "Comparison", "SubjectResult", "read"]


@described
class Comparison(ComparisonData):
    """The result of `hybridgen.compare()`; `str()` of it is a table, `save()` writes it to files."""

    def __repr__(self) -> str:
        bad = sum(cell.status != OK for cell in self.cells)
        subjects = ", ".join(subject.name for subject in self.subjects)
        return (
            f"Comparison({self.model!r}, {subjects}: {len(self.cells)} cells{f', {bad} not measured' if bad else ''})"
        )

    def __str__(self) -> str:
        return terminal(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the tables of the page."""
        return body(self)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write tables (Markdown, CSV), the whole result (JSON), plots (PNG) and a page (HTML) into a directory.

        Returns:
            The files.

        Raises:
            ConfigError: the directory cannot be written, or matplotlib is not installed.
        """
        return save(self, Path(folder))


def read(path: str | os.PathLike[str]) -> Comparison:
    """A comparison from its JSON file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); give the comparison.json of a run") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} holds no comparison; give the comparison.json of a run")
    return Comparison.of(values)
