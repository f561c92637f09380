"""How a step runs: the step on static buffers, its staging and state, the launch and its result."""

from hybridgen.execution.ring import LaunchedStep, StepOutput
from hybridgen.execution.runner import ModelRunner
from hybridgen.execution.state import DeviceState
from hybridgen.execution.step import PrefillChunk, StepKey

__all__ = [
    "DeviceState",
    "LaunchedStep",
    "ModelRunner",
    "PrefillChunk",
    "StepKey",
    "StepOutput",
]
