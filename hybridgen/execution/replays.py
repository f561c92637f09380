"""Runs recorded steps: the replay, or the step itself where the recording has moved, raises or is wrong."""

from __future__ import annotations

import functools

import torch

from hybridgen.device.failures import is_fatal
from hybridgen.errors import described
from hybridgen.execution.ring import TokenRing
from hybridgen.execution.step import ModelSteps
from hybridgen.execution.validation import distrust
from hybridgen.graphs import GraphStore, Recording, Route, Router
from hybridgen.models import BoundModel


class Replays:
    """Replays the recordings of one runner, while its router stays."""

    def __init__(
        self,
        bound: BoundModel,
        steps: ModelSteps,
        ring: TokenRing,
        graphs: GraphStore,
        router: Router,
    ) -> None:
        """
        Args:
            graphs, router: where recordings are, and who says what runs instead of one.
        """
        self._bound, self._steps, self._ring = bound, steps, ring
        self._graphs, self._router = graphs, router

    def run(self, route: Route, recording: Recording) -> Route:
        """Run a step by its recording; returns how it ran in the end."""
        if recording.addresses is not None and (moved := self._moved(recording.addresses)):
            return self._instead(
                route, f"moved since the capture: {', '.join(moved[:3])}", "a tensor of its graph moved"
            )
        if not recording.checked:
            return self._validated(route, recording)
        try:
            route.run()
        except Exception as error:
            if not _may_be_its_fault(error):
                raise
            # The step's last op is what moves state on, so that it can run again.
            self._ring.resynchronize()
            return self._instead(route, f"its replay raised {described(error)}", "its replay raised")
        return route

    def _instead(self, route: Route, why: str, reason: str) -> Route:
        """Forget the route's recording, and run the step without it."""
        if route.recording is not None:
            self._graphs.drop(route.recording, why)
        plain = self._router.without_recording(route, reason)
        with torch.inference_mode():  # a launch of nothing but a graph's needs none
            plain.run()
        return plain

    def _moved(self, addresses: dict[str, int]) -> list[str]:
        """What lies elsewhere now. Tensors that were allocated since do not concern a recording."""
        now = self.addresses()
        return [name for name, address in addresses.items() if now.get(name) != address]

    def _validated(self, route: Route, recording: Recording) -> Route:
        """Run a step whose recording was never replayed for anybody, and compare."""
        run = functools.partial(self._steps.run, recording.key)
        wrong = distrust(recording, run, self._steps.mutable(), self._bound.model.dtype)
        if route.finish is not None:
            route.finish()
        if wrong is None:
            return route
        self._graphs.drop(recording, wrong)
        return self._router.without_recording(route, "its graph was found wrong")

    def addresses(self) -> dict[str, int]:
        """Where everything lies that a recorded step reads or writes."""
        model = self._bound.model
        parts = (dict(model.named_parameters()), dict(model.named_buffers()), self._steps.tensors())
        return {name: tensor.data_ptr() for part in parts for name, tensor in part.items()}


def _may_be_its_fault(error: BaseException) -> bool:
    """Whether a replay that raised this is not to be tried again. A replay allocates nothing: where memory ran out,
    something else took it."""
    return isinstance(error, Exception) and not is_fatal(error) and not isinstance(error, torch.OutOfMemoryError)
