"""Recorded steps: which are kept, which one runs a step, and who records them."""

from hybridgen.execution.graphs.ladder import checked_ladder, decode_ladder, prefill_ladder
from hybridgen.execution.graphs.recorder import Recorded, Recorder
from hybridgen.execution.graphs.standin import StandInRecorder
from hybridgen.execution.graphs.store import GraphSettings, GraphStore, Recording, Route, describe

__all__ = [
    "GraphSettings",
    "GraphStore",
    "Recorded",
    "Recorder",
    "Recording",
    "Route",
    "StandInRecorder",
    "checked_ladder",
    "decode_ladder",
    "describe",
    "prefill_ladder",
]
