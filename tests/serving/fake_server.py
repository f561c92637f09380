"""A server whose model is a toy, so that it can hang, break and be slow on demand; it needs no torch.

A prompt is a list of ids; it generates `max_new_tokens` ids that count up from the last one. Special first ids make
it misbehave. What hangs does so until there is a file, which `Process.go_on` makes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from hybridgen.core import Completion, FinishReason, Timing, TokenEvent
from hybridgen.errors import EngineError, HybridgenError, LoadError, PromptError
from hybridgen.params import SamplingParams
from hybridgen.serving.lifecycle import endpoint, lifecycle
from hybridgen.serving.process import ServeOptions, serve_model
from hybridgen.serving.service.limits import Limits

HANG, BREAK, BUG, REFUSE, FATAL_BUG = 9001, 9002, 9003, 9004, 9005
SLOTS = 4
LONG = 600.0
"""Seconds of every limit of time that a test does not give."""


class Run:
    """One completion."""

    def __init__(self, prompt: list[int], params: SamplingParams, index: int, choice: int, events: bool) -> None:
        self.prompt, self.params, self.index, self.choice, self.keep = tuple(prompt), params, index, choice, events
        self.tokens: list[int] = []
        self.queue: list[TokenEvent] = []
        self.ended = False

    def push(self) -> None:
        token = self.prompt[-1] + len(self.tokens) + 1
        self.tokens.append(token)
        last = len(self.tokens) == (self.params.max_new_tokens or 4)
        self.emit(token, FinishReason.LENGTH if last else None)

    def emit(self, token: int | None, reason: FinishReason | None, error: HybridgenError | None = None) -> None:
        completion = None
        if reason is not None:
            self.ended = True
            completion = Completion(
                text=" ".join(map(str, self.tokens)),
                token_ids=tuple(self.tokens),
                prompt_token_ids=self.prompt,
                finish_reason=reason,
                seed=self.params.seed or 0,
                timing=Timing(queue=None, ttft=0.5, total=1.0, token_times=tuple(map(float, self.tokens))),
                error=error,
            )
        if self.keep or completion is not None:
            text = "" if token is None else f"{token} "
            event = TokenEvent(token_id=token, text=text, index=self.index, choice=self.choice, completion=completion)
            self.queue.append(event)


class ToyModel:
    """A `hybridgen.serving.service.adapter.Model`."""

    description: ClassVar[dict[str, Any]] = {"model": "toy", "mode": "toy", "max_batch": SLOTS, "max_context": 100_000}

    def __init__(self, step_seconds: float, notes: str, hangs: bool) -> None:
        """
        Args:
            notes: how files begin by which the test and the toy tell each other something.
            hangs: at its end.
        """
        self.step_seconds = step_seconds
        self.notes = notes
        self.hangs = hangs
        self.runs: list[Run] = []
        self.told: list[Run] = []
        """Those that may have something to tell."""

    def read_grammar(self, params: Any) -> None:
        """Nothing: no grammar is asked for."""

    def encode(self, prompt: Any, index: int) -> Any:
        if isinstance(prompt, list):
            raise PromptError("this chat is refused")
        text, _, place = str(prompt).partition(" for ")
        if text == "wait":
            wait_for(Path(place))
        return [len(text)]

    def submit(self, prompts: list[Any], sampling: list[SamplingParams], *, events: bool) -> list[Run]:
        if prompts[0] == [REFUSE] or isinstance(prompts[0][0], dict):
            raise PromptError("this prompt is refused, says /secret/place/of/a/file.py")
        if prompts[0] == [BUG]:
            raise ZeroDivisionError("a bug at /secret/place/of/a/file.py")
        runs = [
            Run(prompt, params, index, choice, events)
            for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
            for choice in range(params.n)
        ]
        self.runs += runs
        self.told += runs
        return runs

    def prompt_ids(self, handle: Run) -> tuple[int, ...]:
        return handle.prompt

    def events(self) -> Iterator[tuple[Run, TokenEvent]]:
        told, self.told = self.told, [run for run in self.told if not run.ended]
        for run in told:
            while run.queue:
                yield run, run.queue.pop(0)

    def step(self) -> None:
        time.sleep(self.step_seconds)
        for run in list(self.runs):
            if run.prompt[0] == HANG:
                wait_for(Path(f"{self.notes}.go-on"))
            if run.prompt[0] == FATAL_BUG:
                raise ZeroDivisionError("a bug at /secret/place/of/a/file.py")
            if run.prompt[0] == BREAK:
                error = EngineError("the device failed: it is at /secret/place/of/a/file.py; load a new engine")
                for other in self.runs:
                    other.emit(None, FinishReason.ERROR, error)
                self.runs = []
                raise error
        for run in self.runs[:SLOTS]:
            run.push()
        self.runs = [run for run in self.runs if not run.ended]

    def cancel(self, handles: list[Run]) -> None:
        for run in handles:
            if not run.ended:
                run.emit(None, FinishReason.CANCELLED)
        self.runs = [run for run in self.runs if not run.ended]

    def busy(self) -> bool:
        return bool(self.runs)

    def idle(self) -> bool:
        return False

    def stats(self) -> dict[str, Any]:
        return {"running": len(self.runs), "pages": 10, "free_pages": 10 - len(self.runs[:SLOTS]), "graphs": {}}

    def close(self) -> None:
        if self.hangs:
            Path(f"{self.notes}.closing").touch()
            wait_for(Path(f"{self.notes}.go-on"))
        Path(f"{self.notes}.unloaded").touch()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def note(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket")
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--step", type=float, default=0.001)
    parser.add_argument("--step-timeout", type=float, default=LONG)
    parser.add_argument("--drain-timeout", type=float, default=LONG)
    parser.add_argument("--idle-exit", type=float)
    parser.add_argument("--metrics", type=int)
    parser.add_argument("--scrape-seconds", type=float, default=endpoint.SECONDS)
    parser.add_argument("--load", type=float, default=0.0)
    parser.add_argument("--close-seconds", type=float, default=lifecycle.CLOSE_SECONDS)
    parser.add_argument("--close-hangs", action="store_true")
    parser.add_argument("--load-error", action="store_true")
    parser.add_argument("--limit", action="append", default=[])
    arguments = parser.parse_args()
    endpoint.SECONDS = arguments.scrape_seconds
    lifecycle.CLOSE_SECONDS = arguments.close_seconds
    logging.basicConfig(level=logging.INFO)
    limits = dict.fromkeys(("encode_seconds", "frame_seconds", "write_seconds"), LONG)
    limits |= dict(item.split("=") for item in arguments.limit)
    options = ServeOptions(
        socket=arguments.socket,
        ready_file=arguments.ready_file,
        step_seconds=arguments.step_timeout,
        drain_seconds=arguments.drain_timeout,
        idle_exit=arguments.idle_exit,
        metrics=arguments.metrics,
        limits=Limits(**{name: float(value) if "seconds" in name else int(value) for name, value in limits.items()}),
    )

    def load() -> ToyModel:
        if arguments.ready_file is not None:
            Path(f"{arguments.ready_file}.loading").touch()
        time.sleep(arguments.load)
        if arguments.load_error:
            raise LoadError("there is no toy")
        return ToyModel(arguments.step, str(arguments.ready_file), arguments.close_hangs)

    try:
        return serve_model(load, options, note)
    except HybridgenError as error:
        note(f"refused: {error}")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
