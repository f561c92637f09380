"""The package's version; the compile cache's key has it."""

__version__ = "0.1.0"
