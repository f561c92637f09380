"""The engine: requests, schedule, the loop of steps, output, and how all of it is built."""

from hybridgen.engine.engine import Engine

__all__ = ["Engine"]
