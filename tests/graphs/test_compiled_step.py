"""Decode steps of a CPU that are recorded as operators and compiled whole, in another process."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import forks
import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridgen import Engine, EngineConfig
from hybridgen.compilation import behind
from hybridgen.compilation.step_graph import record_step
from hybridgen.compilation.store.session import mode_of, why_not_behind
from hybridgen.kernels.attention.latent import LatentPlaces, write_latent
from hybridgen.loading import Checkpoint

NEW = 12
PROMPTS = families.prompts_of((9, 5, 7))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


class InThisProcess:
    """A job whose graph is run as it is: what is recorded, without Inductor."""

    done = True
    pid = 0

    def __init__(self, graph, inputs, keep=None) -> None:
        self.graph = graph

    def result(self):
        return self.graph.module()

    def close(self) -> None:
        return None


def tokens_of(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    outs = engine.generate(prompts, max_new_tokens=NEW, temperature=0, ignore_eos=True)
    return [list(out.token_ids) for out in outs]


def kinds_of(engine: Engine) -> set[str]:
    return {kind for phase, kind, _ in engine.stats().steps if phase == "decode"}


def expected_of(path: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


SETTINGS = {"mode": "hybrid", "device": "cpu", "dtype": "float32", "max_batch": 4, "max_context": 64}
# A graph that is run as it is takes as long as the layers: rows are padded whatever its time says.
SETTINGS |= {"max_padding_ratio": 64}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral", "mamba"])
def test_recorded_operators_give_the_tokens_of_hugging_face(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridgen.compilation.steps.CompileJob", InThisProcess)
    path = families.write(family, tmp_path)
    expected = expected_of(path)
    with Engine.load(str(path), compile_cache=False, **SETTINGS) as engine:
        for _ in range(4):  # three rows are padded to four
            assert tokens_of(engine, PROMPTS) == expected
        for _ in range(3):
            assert tokens_of(engine, PROMPTS[:1]) == expected[:1]
        assert "layers, compiled step" in kinds_of(engine)
        assert {row.rows for row in engine.stats().graphs.graphs} == {1, 4}
        assert not engine.stats().fallbacks


def test_a_model_that_looks_at_values_runs_as_it_is(tmp_path: Path) -> None:
    path = families.write("gpt2", tmp_path)
    expected = expected_of(path)
    with Engine.load(str(path), compile_cache=False, **SETTINGS) as engine:
        with pytest.warns(RuntimeWarning, match="values"):
            assert tokens_of(engine, PROMPTS[:1]) == expected[:1]
        assert tokens_of(engine, PROMPTS[:1]) == expected[:1]
        assert kinds_of(engine) == {"layers, eager"}
        assert engine.stats().graphs.failures


@needs_compiler
def test_a_fresh_process_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In other tests it is a fork, with everything imported, so that our ops are there."""
    monkeypatch.setattr(behind, "subprocess", subprocess)
    left, pages, row = torch.zeros(2), torch.zeros(2, 1, 4, 5), torch.zeros(1, dtype=torch.int64)
    latent, rotary, table = torch.ones(1, 3), torch.ones(1, 2), torch.ones(1, 1, dtype=torch.int32)

    def step() -> None:
        left.add_(1)
        write_latent(latent, rotary, LatentPlaces(pages, table, row, row))

    graph, inputs = record_step(step)
    left.zero_(), pages.zero_()
    with torch.inference_mode():
        behind.CompileJob(graph, inputs).result()(*inputs)
    assert left.tolist() == [1, 1]
    assert pages[1, 0, 0].tolist() == [1] * 5
    assert pages.sum() == 5


@needs_compiler
def test_a_step_is_compiled_behind(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=1)  # a step is compiled with all of them
    expected = expected_of(path)
    with Engine.load(str(path), **SETTINGS) as engine:
        end = time.monotonic() + 240
        while "layers, compiled step" not in kinds_of(engine):
            assert time.monotonic() < end, "it is never ready"
            assert tokens_of(engine, PROMPTS) == expected
            time.sleep(0.5)
        assert not engine.stats().fallbacks


@needs_compiler
def test_auto_takes_what_is_compiled_behind_its_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridgen.compilation.steps.CompileJob", InThisProcess)
    path = families.write("llama", tmp_path)
    expected = expected_of(path)
    store = tmp_path / "store"
    settings = SETTINGS | {"mode": "auto", "compile_cache": store}
    with Engine.load(str(path), **settings) as engine:
        assert engine.mode == "hybrid"
        for calls in range(3):
            assert engine.stats().graphs.lazy_captures == max(0, calls - 1)  # nothing is recorded after the first
            assert tokens_of(engine, PROMPTS) == expected
        assert kinds_of(engine) == {"layers, eager", "layers, compiled step"}
        assert not engine.stats().fallbacks


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "hybrid"),
        ({"compile_cache": False}, "eager"),
        ({"offline_compile": True}, "eager"),
        ({"speculation": "ngram"}, "eager"),
        ({"compile_backend": "eager"}, "eager"),
        ({"graphs": "trees"}, "eager"),
        ({"mode": "eager"}, "eager"),
    ],
)
def test_what_auto_is_on_a_cpu(changes: dict, mode: str, tmp_path: Path) -> None:
    path = families.write("llama", tmp_path)
    config = EngineConfig(**{"device": "cpu", "compile_cache": str(tmp_path / "store")} | changes)
    assert mode_of(Checkpoint.open(str(path), config), config) == mode
    live = Checkpoint.open(AutoModelForCausalLM.from_pretrained(path), config)
    assert mode_of(live, config) == "eager"


def test_without_a_compiler_auto_is_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in str(why_not_behind(EngineConfig(device="cpu", compile_cache=str(tmp_path))))


def test_the_compiling_process_ends_with_its_parent() -> None:
    # All that the parent does for it is to end, so that its end of the pipe is closed.
    code = "from hybridgen.compilation.worker import end_with_parent; end_with_parent()"
    with forks.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(120) == -signal.SIGKILL


def test_closing_ends_the_process() -> None:
    left = torch.zeros(2)
    graph, inputs = record_step(lambda: left.add_(1))
    job = behind.CompileJob(graph, inputs)
    job.close()
    job._thread.join(20)
    assert job.done
    assert not job._folder.exists()


def test_a_step_that_looks_at_values_is_refused() -> None:
    values = torch.tensor([1.0, 0.0])
    for look in (
        lambda: values.sum().item(),
        lambda: values.tolist(),
        lambda: bool(values[0] > 0),
        lambda: values.nonzero(),
        lambda: values[values > 0],
        lambda: torch.rand(2),
    ):
        with pytest.raises(RuntimeError, match="values"):
            record_step(look)


def test_a_graph_is_a_function_of_what_the_step_used() -> None:
    state, other = torch.zeros(3), torch.arange(3.0)

    def step() -> None:
        first, second = torch.stack((state, other)).unbind(0)
        state[1:].add_((first + second + 1)[1:])

    graph, inputs = record_step(step)
    state.zero_()
    module = graph.module()
    for _ in range(2):
        module(*inputs)
    expected = torch.zeros(3)
    for _ in range(2):
        expected[1:] += (expected + torch.arange(3.0) + 1)[1:]
    assert torch.equal(state, expected)
