"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compiler

# Before anything of torch: no test touches the user's compile cache or the checkout's. Processes that tests start
# inherit it. Processes of pytest-xdist inherit that of the process that divides the tests, and have theirs in it.
os.environ["HYBRIDGEN_CACHE_DIR"] = tempfile.mkdtemp(
    prefix="hybridgen-tests-", dir=os.environ["HYBRIDGEN_CACHE_DIR"] if "PYTEST_XDIST_WORKER" in os.environ else None
)
# Nothing is kept unless a test names a store: engines of other tests are to start as if they were the first.
os.environ["HYBRIDGEN_COMPILE_CACHE"] = "0"
os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
os.environ.pop("TRITON_CACHE_DIR", None)
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiler.install(os.environ["HYBRIDGEN_CACHE_DIR"] + "/compiler")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import families
import forks
import pytest
import torch
import transformers
from interpreter import Interpreter

import hybridgen
from hybridgen.compilation import behind
from hybridgen.loading import checkpoint
from hybridgen.models import probe

# The models are tiny: more threads only get into each other's way.
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all-inductor`: what tests of families compile, compile with Inductor (with `-m ""` about half an hour)."""
    parser.addoption("--all-inductor", action="store_true")


TURNS = pytest.StashKey[Any]()


def pytest_configure(config: pytest.Config) -> None:
    """In a process of pytest-xdist: take turns with the others."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        from parallel import Turns

        config.stash[TURNS] = Turns(Path(os.environ["HYBRIDGEN_CACHE_DIR"]).parent)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide by file, whatever `--dist` says."""
    from parallel import ByFile

    return ByFile(config, log)


def spare_the_collector() -> None:
    """Have the garbage collector look no more at what is alive now.

    What imports and torch.compile leave is millions of objects after a few hundred tests; every full collection would
    look at all of them, for seconds.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """Spare the garbage collector what importing made."""
    spare_the_collector()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Run a test beside those of other processes, or alone if it is marked so. After a file, look at what it left."""
    turns = item.config.stash.get(TURNS, None)
    with nullcontext() if turns is None else turns.take(alone="apart" in item.keywords):
        result = yield
    if nextitem is not None and nextitem.path != item.path:
        spare_the_collector()
    return result


def pytest_unconfigure() -> None:
    """Delete the tests' compile cache."""
    shutil.rmtree(os.environ["HYBRIDGEN_CACHE_DIR"], ignore_errors=True)


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
        key = type(config), config.to_json_string(use_diff=False), context, model_class
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


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint without a tokenizer."""
    return families.write("llama", tmp_path_factory.mktemp("checkpoints"))


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
