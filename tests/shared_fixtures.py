"""Fixtures shared by all tests; conftest.py makes a plugin of this file where tests run."""

from __future__ import annotations

import gc
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import forks
import pytest
import shared_graphs
import torch
import transformers
from hypothesis import HealthCheck, settings
from interpreter import Interpreter
from shared_graphs import without_paths

import hybridgen
from hybridgen.compilation import behind
from hybridgen.loading import checkpoint
from hybridgen.models import probe

# Objects that live are many here, and what only the collector finds is little: it is to look at new ones a thirtieth as
# often, and at all of them next to never within a file.
gc.set_threshold(20_000, 10, 100)
# The models are tiny: more threads only get into each other's way.
torch.set_num_threads(1)
# Machines are slow, or busy with something else.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# pytest attaches its handler to every logger that does not propagate. With one, torch describes in this log all that
# Dynamo does and every graph, which is a third of what compiling costs.
logging.getLogger("torch.__trace").propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session", autouse=True)
def _configs_are_probed_once() -> Iterator[None]:
    """Opening checkpoints of one config takes its probe from the first; `tests/models/test_probe.py` has the function
    itself."""
    known: dict[Any, Any] = {}

    def of_config(config: Any, context: int, model_class: Any = None) -> Any:
        # Not where it was read from, which is a folder of its own for almost every test.
        key = type(config), without_paths(config.to_json_string(use_diff=False)), context, model_class
        if key not in known:
            known[key] = probe.probe_config(config, context, model_class)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "probe_config", of_config)
        yield


@pytest.fixture(scope="session", autouse=True)
def _compiling_processes_are_forks() -> Iterator[None]:
    """What compiles a step behind starts within milliseconds; one of `tests/graphs/test_compiled_step.py` is fresh."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(behind, "subprocess", SimpleNamespace(Popen=forks.Popen, PIPE=subprocess.PIPE))
        yield


@pytest.fixture(scope="session", autouse=True)
def _compiled_layers_are_handed_on() -> Iterator[None]:
    """From an engine that was closed to the next of the same kind, with the backend `eager`."""
    with shared_graphs.shared():
        yield


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint without a tokenizer."""
    return families.write("llama", tmp_path_factory.mktemp("checkpoints"), num_hidden_layers=2)


@pytest.fixture(scope="session")
def triton_interpreter() -> Iterator[Interpreter]:
    """A process with Triton's interpreter, which starts when it is first used."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture
def eager_engine(llama_path: Path) -> Iterator[hybridgen.Engine]:
    """A small engine on it, in mode eager."""
    with hybridgen.Engine.load(
        llama_path, mode="eager", max_batch=8, page_size=16, token_budget=96, kv_memory="16MiB"
    ) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _unload() -> Iterator[None]:
    """Leave no model loaded for the next test."""
    yield
    hybridgen.unload()
