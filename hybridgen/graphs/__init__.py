"""Recorded steps: their keys, which are kept, which one runs a step, and who records them."""

from hybridgen.graphs.buckets import GraphSettings, decode_buckets, prefill_buckets
from hybridgen.graphs.executor import Executor
from hybridgen.graphs.key import LAYERS, GraphKey, describe
from hybridgen.graphs.recorder import Recorded, Recorder
from hybridgen.graphs.router import Route, Router
from hybridgen.graphs.stand_in import StandInRecorder
from hybridgen.graphs.store import GraphStore, Recording

__all__ = [
    "LAYERS",
    "Executor",
    "GraphKey",
    "GraphSettings",
    "GraphStore",
    "Recorded",
    "Recorder",
    "Recording",
    "Route",
    "Router",
    "StandInRecorder",
    "decode_buckets",
    "describe",
    "prefill_buckets",
]
