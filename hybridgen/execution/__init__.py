"""How a step runs: the compiled layer, the state that lives on the device, the launch and its result."""

from hybridgen.execution.compiled import CompiledLayers
from hybridgen.execution.launch import LaunchedStep, StepOutput
from hybridgen.execution.runner import ModelRunner, PrefillChunk
from hybridgen.execution.state import DeviceState
from hybridgen.execution.statistics import Counters

__all__ = ["CompiledLayers", "Counters", "DeviceState", "LaunchedStep", "ModelRunner", "PrefillChunk", "StepOutput"]
