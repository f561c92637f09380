"""How a step runs: the step on static buffers, the compiled layer, recorded steps, the launch and its result."""

from hybridgen.execution.compiled import CompiledLayers
from hybridgen.execution.ring import LaunchedStep, StepOutput
from hybridgen.execution.runner import ModelRunner
from hybridgen.execution.state import DeviceState
from hybridgen.execution.statistics import Counters
from hybridgen.execution.steps import PrefillChunk, StepKey

__all__ = [
    "CompiledLayers",
    "Counters",
    "DeviceState",
    "LaunchedStep",
    "ModelRunner",
    "PrefillChunk",
    "StepKey",
    "StepOutput",
]
