"""Servers for the tests: one with the demo model for the whole run, and toys that may be broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import short_directory
from waiting import HANGS
from wire import Process

import hybridgen
from hybridgen.serving.client import async_client, link


@pytest.fixture(scope="session", autouse=True)
def _clients_are_patient() -> Iterator[None]:
    """With servers that share the cores with other programs."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (link, async_client):
            patch.setattr(module, "HELLO_SECONDS", HANGS)
        yield


@pytest.fixture(scope="session")
def demo() -> Iterator[Process]:
    """A server with the demo model; tests leave it as they found it."""
    process = Process(short_directory(), "--metrics", "0", "--limit-queue", "400", "--limit-n", "8")
    yield process
    status = process.end()
    assert status == 0, process.log()
    assert "Traceback" not in process.log()


@pytest.fixture(scope="session")
def engine() -> Iterator[hybridgen.Engine]:
    """The same model in this process, with as many threads, which sums depend on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with hybridgen.Engine.load(mode="eager", dtype="float32", kv_memory="32MiB", max_batch=8) as loaded:
        yield loaded
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def plain() -> Iterator[Process]:
    """A toy server without options; tests leave it as they found it."""
    process = Process(short_directory(), fake=True)
    yield process
    process.kill()


@pytest.fixture
def toy() -> Iterator[Callable[..., Process]]:
    """Starts toy servers; call it with options of `fake_server.py`. `at=` takes the directory of another."""
    started: list[Process] = []

    def start(*options: Any, at: Path | None = None, wait: bool = True) -> Process:
        directory = at or short_directory()
        process = Process(directory, *map(str, options), fake=True, wait=wait)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
