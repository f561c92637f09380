"""Loading has the garbage collector look less often, and leaves it as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridgen import Engine
from hybridgen.engine.collector import THRESHOLD, seldom_collected
from hybridgen.loading import Checkpoint


@pytest.fixture(autouse=True)
def _threshold() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(("before", "inside"), [(700, THRESHOLD), (0, 0), (10 * THRESHOLD, 10 * THRESHOLD)])
def test_it_looks_less_often_until_the_last_is_done(before: int, inside: int) -> None:
    gc.set_threshold(before, 7, 5)
    with seldom_collected():
        with pytest.raises(KeyError), seldom_collected():
            raise KeyError
        assert gc.get_threshold() == (inside, 7, 5)
    assert gc.get_threshold() == (before, 7, 5)


def test_an_engine_is_loaded_so(llama_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.set_threshold(700, 10, 10)
    seen = []
    real = Checkpoint.load

    def load(checkpoint: Checkpoint) -> object:
        seen.append(gc.get_threshold()[0])
        return real(checkpoint)

    monkeypatch.setattr(Checkpoint, "load", load)
    Engine.load(llama_path, mode="eager", kv_memory="1MiB", max_context=64).close()
    assert seen == [THRESHOLD]
    assert gc.get_threshold() == (700, 10, 10)
