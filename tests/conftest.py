"""What holds for every test run, and how processes divide the tests. `shared_fixtures.py` has the fixtures."""

from __future__ import annotations

import gc
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import compiler
import pytest

# Before anything of torch: no test touches the user's compile cache or the checkout's. Processes that tests start
# inherit it. Processes of pytest-xdist inherit that of the process that divides the tests, and have theirs in it.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
os.environ["HYBRIDGEN_CACHE_DIR"] = tempfile.mkdtemp(
    prefix="hybridgen-tests-", dir=os.environ["HYBRIDGEN_CACHE_DIR"] if WORKER else None
)
# Nothing is kept unless a test names a store: engines of other tests are to start as if they were the first.
os.environ["HYBRIDGEN_COMPILE_CACHE"] = "0"
os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
os.environ.pop("TRITON_CACHE_DIR", None)
if not WORKER:
    compiler.install(os.environ["HYBRIDGEN_CACHE_DIR"] + "/compiler")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all-inductor`: what tests of families compile, compile with Inductor (with `-m ""` about half an hour)."""
    parser.addoption("--all-inductor", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    """Fixtures are for processes that run tests. The one that divides them needs nothing of torch."""
    if WORKER or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Processes that run tests are forks of one that has imported and compiled what all of them need."""
    if sys.platform == "linux":
        import forks

        python = shlex.join(forks.Server(os.environ, compiles=True).command(forks.OWN))
        for spec in specs:
            spec.python = python


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
    """Run a test. After a file, look at what it left."""
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        spare_the_collector()
    return result


def pytest_unconfigure() -> None:
    """Delete the tests' compile cache."""
    shutil.rmtree(os.environ["HYBRIDGEN_CACHE_DIR"], ignore_errors=True)
