"""A comparison with made-up figures, and subjects that do as they are told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from hybridgen.comparison.data.config import CompareConfig
from hybridgen.comparison.data.results import CellResult, SubjectResult
from hybridgen.comparison.data.schedule import cells
from hybridgen.comparison.data.statistics import Agreement, summarise
from hybridgen.comparison.measuring.measure import Measurement
from hybridgen.comparison.measuring.subjects import Output
from hybridgen.comparison.measuring.utilisation import Clocks
from hybridgen.comparison.results import Comparison

SMALL = CompareConfig(
    modes=("eager", "hybrid"),
    prompt_lengths=(4, 8),
    batch_sizes=(1, 2),
    new_tokens=3,
    baselines=("hf-dynamic",),
    budget=5.0,
    repeats=4,
    warm_up=1,
)


class Scripted:
    """A subject without a model: its tokens count up from the prompt's first one."""

    kind = "mode"

    def __init__(self, name: str, act: Callable[[list[list[int]]], None] = lambda prompts: None) -> None:
        self.name = name
        self.act = act
        self.calls: list[tuple[int, int]] = []

    def call(self, prompts: list[list[int]], new_tokens: int) -> Output:
        self.calls.append((len(prompts[0]), len(prompts)))
        self.act(prompts)
        time.sleep(0.0005)
        tokens = [[prompt[0] + i for i in range(new_tokens)] for prompt in prompts]
        return Output(tokens, None, [[0.001 * (i + 1) for i in range(new_tokens)] for _ in prompts])

    def settle(self) -> None:
        pass

    def stats(self) -> None:
        return None

    def close(self) -> None:
        pass


class SyntheticTime:
    """Clocks that move when they are told to."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def pass_by(self, wall: float, cpu: float) -> None:
        self.wall += wall
        self.cpu += cpu

    @property
    def clocks(self) -> Clocks:
        return Clocks(lambda: self.wall, lambda: self.cpu)


def measurement(config: CompareConfig, clocks: Clocks | None = None) -> Measurement:
    return Measurement(config, torch.device("cpu"), 100, lambda what, done, total: None, clocks or Clocks())


def figures(scale: float, count: int = 20) -> list[float]:
    """Times in seconds that spread a little."""
    return [scale * (1 + 0.001 * ((7 * i) % 11)) for i in range(count)]


def comparison(**changes: Any) -> Comparison:
    """A whole result: eager, hybrid three times as fast, and a baseline whose largest cell ran out of memory."""
    config = SMALL
    speed = {"eager": 1.0, "hybrid": 1 / 3, "hf-dynamic": 1.25}
    found = []
    for cell in cells(config, list(speed)):
        if cell == ("hf-dynamic", 8, 2):
            found.append(CellResult(**cell._asdict(), status="out of memory", error="OutOfMemoryError: 3 GiB"))
            continue
        step = 0.004 * speed[cell.subject]
        engine = cell.subject != "hf-dynamic"
        graphs = {
            "pre_captured": 40,
            "lazy": 4,
            "padded": 2,
            "none": 1,
            "failed": 1,
            "hit_rate": 44 / 45,
            "capture_failures": 3,
            "phases": {"decode": {"hits": 44, "padded_hits": 2, "misses": 1, "hit_rate": 44 / 45}},
            "reasons": {"decode, cuda graph: bucket 1": 44},
        }
        found.append(
            CellResult(
                **cell._asdict(),
                repeats=20,
                stopped="interval" if engine else "budget",
                wall=summarise(figures(4 * step), 0.95),
                ttft=summarise(figures(step * (1 + cell.prompt_length / 10)), 0.95),
                tpot=summarise(figures(step, 40), 0.95, ()),
                tokens_per_s=cell.batch_size / step,
                cpu_per_step=step / 2,
                cpu_utilisation=1.25,
                gpu_utilisation=0.5 if engine else None,
                memory=2**30 + 2**20 * cell.batch_size,
                mbu=0.8 * speed["hybrid"] / speed[cell.subject],
                graphs=graphs if cell.subject == "hybrid" else None,
                agreement=Agreement(1.0, None) if engine else Agreement(0.5, (1, 2)),
                logit_error=0.0125 if cell.subject == "hybrid" else None,
                walls=figures(4 * step),
                ttfts=figures(step * (1 + cell.prompt_length / 10)),
            )
        )
    subjects = [
        SubjectResult(name="eager", kind="mode", startup={"load weights": 1.0, "other": 0.25, "first calls": 0.5}),
        SubjectResult(
            name="hybrid",
            kind="mode",
            startup={"load weights": 1.0, "compile": 8.0, "capture": 2.0, "other": 0.25, "first calls": 0.25},
            compile_cache="empty",
            captured=11,
            lazy_captures=1,
            graph_bytes=2**26,
            fallbacks={"a layer runs eagerly": 2},
        ),
        SubjectResult(name="hf-dynamic", kind="baseline", startup={"load weights": 1.0, "first calls": 3.0}),
    ]
    values: dict[str, Any] = {
        "config": config,
        "model": "a model",
        "source": "some/model",
        "live": False,
        "dtype": "bfloat16",
        "device": "cuda:0",
        "subjects": subjects,
        "cells": found,
        "provenance": {"gpu": "a GPU", "torch": "2.11.0", "transformers": "5.17.0", "commit": "abc"},
        "read_ceiling": 4.5e12,
        "notes": ["a note"],
        "measured_seconds": 12.0,
    }
    return Comparison(**{**values, **changes})
