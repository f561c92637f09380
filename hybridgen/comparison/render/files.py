"""Writing a result into a directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hybridgen.comparison.data.results import ComparisonData
from hybridgen.comparison.render.html import page
from hybridgen.comparison.render.plots import check_matplotlib, draw
from hybridgen.comparison.render.report import comma_separated, markdown
from hybridgen.errors import ConfigError, shown

JSON = "comparison.json"


def check_output(folder: str | os.PathLike[str]) -> Path:
    """Make the directory and see that everything is installed, before anything is measured for it.

    Raises:
        ConfigError: it cannot be made or written to, or matplotlib is not installed.
    """
    check_matplotlib()
    if not isinstance(folder, (str, os.PathLike)):
        raise ConfigError(f"output={shown(folder)} is no directory; give a path")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={str(path)!r} cannot be made: {error.strerror}; give another directory") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"output={str(path)!r} cannot be written to; give another directory")
    return path


def save(comparison: ComparisonData, folder: Path) -> list[Path]:
    """Write everything; the JSON first, which the rest can be made from again.

    Raises:
        ConfigError: the directory cannot be written, or matplotlib is not installed.
    """
    check_output(folder)
    written = [_write(folder / JSON, json.dumps(comparison.as_dict(), indent=1) + "\n")]
    written.append(_write(folder / "comparison.csv", comma_separated(comparison)))
    written.append(_write(folder / "comparison.md", markdown(comparison)))
    pictures = draw(comparison)
    written += [_write(folder / f"{name}.png", data) for name, data in pictures.items()]
    written.append(_write(folder / "comparison.html", page(comparison, pictures)))
    return written


def _write(path: Path, content: str | bytes) -> Path:
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; give another output directory") from error
    return path
