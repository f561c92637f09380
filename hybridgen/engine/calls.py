"""Calls: requests are handed to the loop, and its steps taken until they have ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

from hybridgen.core import Completion, TokenEvent
from hybridgen.engine.loop import StepLoop
from hybridgen.engine.requests import Request, collect
from hybridgen.errors import EngineError, Interrupted


def run_requests(
    loop: StepLoop, requests: list[Request], streamer: Any, end_call: Callable[[], None], no_bar: bool | None
) -> None:
    """Run requests to their end.

    Args:
        streamer: a Hugging Face streamer for the one request, or None.
        end_call: called when all have ended.
        no_bar: tqdm's `disable`.

    Raises:
        Interrupted: Ctrl-C; holds what was finished.
        EngineError: the engine was closed, or its device failed, before all had ended.
    """
    bar = tqdm(total=len(requests), desc="generate", unit="request", delay=1, disable=no_bar)
    try:
        with bar:
            loop.submit(requests, patient=len(requests) > 1)
            if streamer is not None:
                _attach_streamer(requests[0], streamer)
            active = list(requests)
            while active:
                if not bar.disable:
                    bar.update(_complete(requests) - bar.n)
                loop.step()
                while active and active[-1].completion is not None:
                    active.pop()
            bar.update(len(requests) - bar.n)
        end_call()
    except KeyboardInterrupt:
        done = _complete(requests)
        loop.cancel(requests)
        raise Interrupted(
            f"interrupted with {done} of {len(requests)} requests finished; they are in .completions",
            collect(request for request in requests if request.completion is not None),
        ) from None
    except EngineError:
        if _complete(requests) < len(requests):
            raise  # else every request has ended, and its completion has the error
    finally:
        loop.cancel(requests)


def stream_requests(
    loop: StepLoop, requests: list[Request], refused: Mapping[int, Completion], end_call: Callable[[], None]
) -> Iterator[TokenEvent]:
    """Run requests, and yield each token as the host reads it. They are cancelled when the iterator is closed.

    Args:
        refused: completions of prompts that were refused, by their index.
        end_call: called when all have ended.
    """
    for index, completion in refused.items():
        yield TokenEvent(token_id=None, text="", index=index, completion=completion)
    try:
        loop.submit(requests, keep_events=True)
        active = list(requests)
        while active:
            for request in list(active):
                events = request.output.events
                while events:
                    event = events.popleft()
                    if event.completion is not None:
                        active.remove(request)
                    yield event
            # Other calls step the loop too, so that events may be there already.
            if active and not any(request.output.events for request in active):
                loop.step()
        end_call()
    finally:
        loop.cancel(requests)


def _complete(requests: list[Request]) -> int:
    return sum(request.completion is not None for request in requests)


def _attach_streamer(request: Request, streamer: Any) -> None:
    """Feed a Hugging Face streamer: the prompt's ids [1, P] first, then each token's id [1], on the CPU."""
    streamer.put(torch.tensor([request.prompt_ids], device="cpu"))
    request.output.listen(lambda token: streamer.put(torch.tensor([token], device="cpu")))
