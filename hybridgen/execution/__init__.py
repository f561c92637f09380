"""How a step runs: its plan, the step on static buffers, its staging and state, the launch and its result."""

from hybridgen.execution.plan import Admission, PrefillChunk, StepOutput, StepPlan
from hybridgen.execution.ring import LaunchedStep
from hybridgen.execution.runner import ModelRunner
from hybridgen.execution.state import DeviceState

__all__ = [
    "Admission",
    "DeviceState",
    "LaunchedStep",
    "ModelRunner",
    "PrefillChunk",
    "StepOutput",
    "StepPlan",
]
