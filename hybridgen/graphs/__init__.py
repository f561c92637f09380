"""Recorded steps: which are kept, which one runs a step, and who records them."""

from hybridgen.graphs.buckets import checked_ladder, decode_ladder, prefill_ladder
from hybridgen.graphs.recorder import Recorded, Recorder
from hybridgen.graphs.stand_in import StandInRecorder
from hybridgen.graphs.store import GraphSettings, GraphStore, Recording, Route, describe

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
