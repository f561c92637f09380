"""The demo model: a small Llama-architecture checkpoint, trained on Python's standard library and on packages' source.

It ships inside the package, so that everything that hybridgen does can be tried and tested without a network.
`hybridgen.demo.train` is the program that made it; `README.md` beside this file says what went into it.
"""

from __future__ import annotations

from pathlib import Path

from hybridgen.errors import ModelNotFoundError

__all__ = ["model_path"]


def model_path() -> Path:
    """The directory of the demo checkpoint, in Hugging Face's layout.

    Raises:
        ModelNotFoundError: this install of hybridgen holds no demo checkpoint.
    """
    path = Path(__file__).resolve().parent / "model"
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"the demo model is not in this install of hybridgen ({path} has no config.json); install the "
            "released package, or make the model with: python -m hybridgen.demo.train --output DIR"
        )
    return path
