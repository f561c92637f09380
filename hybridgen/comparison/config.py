"""`CompareConfig` under its documented name; it is made in `data.config`."""

from hybridgen.comparison.data.config import CompareConfig

__all__ = ["CompareConfig"]
