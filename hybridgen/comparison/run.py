"""A comparison from start to end: measured, then written."""

from __future__ import annotations

import os
from typing import Any

from hybridgen.comparison.data.config import CompareConfig
from hybridgen.comparison.measuring.run import measure
from hybridgen.comparison.render.files import check_output
from hybridgen.comparison.results import Comparison


def run_comparison(
    model: Any,
    config: CompareConfig,
    *,
    tokenizer: Any = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Run a comparison; see `hybridgen.compare`, which is this with keywords."""
    if output is not None:
        check_output(output)  # before hours are spent on what cannot be written
    comparison = Comparison(**vars(measure(model, config, tokenizer=tokenizer, progress=progress)))
    if output is not None:
        comparison.save(output)
    return comparison
