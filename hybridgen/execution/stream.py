"""The device and the stream on which everything of a runner is launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


class OnStream:
    """What launches on one stream."""

    def __init__(self, device: torch.device) -> None:
        """Everything runs on the stream that is current on that device now."""
        self.device = device
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def is_here(self) -> bool:
        """Whether the caller is on that device and stream."""
        stream = self.stream
        if stream is None:
            return True
        index = cast(int, stream.device_index)
        return torch.cuda.current_device() == index and torch._C._cuda_getCurrentRawStream(index) == stream.cuda_stream


S = TypeVar("S", bound=OnStream)


def on_its_stream(function: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Run a method of a runner, or a function of one, in inference mode, on the runner's own device and stream.

    Steps share buffers, and only the order of one stream keeps them apart; callers may be on another device, on a
    stream of their own, or on another thread.
    """

    @functools.wraps(function)
    def run(runner: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode():
            if runner.is_here():
                return function(runner, *args, **kwargs)
            with torch.cuda.stream(cast(torch.cuda.Stream, runner.stream)):
                return function(runner, *args, **kwargs)

    return run
