"""Prompts in Parquet files (extra `data`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridgen.errors import PromptError, first_line


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file with their numbers from 1, without the columns in which they have no value.

    Raises:
        PromptError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PromptError(
            f"--input {path} is Parquet, which pyarrow reads; pip install 'hybridgen[data]', or give JSONL"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
    except (OSError, pyarrow.ArrowException) as error:
        raise PromptError(f"--input {path} cannot be read as Parquet: {first_line(error)}") from error
