"""What a user's script sets for all of torch changes nothing in an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import hybridgen
from hybridgen import Engine
from hybridgen.arguments import end_streamer

PROMPTS = [[5, 6, 7, 8, 9], list(range(10, 40))]
SAMPLING: dict[str, Any] = {
    "max_new_tokens": 6,
    "temperature": 0.8,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "logit_bias": {3: 1.0},
    "seed": 3,
    "logprobs": 1,
    "ignore_eos": True,
}


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def anomalies() -> Iterator[None]:
    with torch.no_grad(), torch.autograd.set_detect_anomaly(True):
        yield


STATES: dict[str, Callable[[], Any]] = {
    "device": lambda: default_device("meta"),
    "context": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
    "anomalies": anomalies,
}


def results(engine: Engine) -> list[Any]:
    done = engine.generate(PROMPTS, **SAMPLING)
    assert [completion.error for completion in done] == [None, None]
    return [(completion.token_ids, [token.logprob for token in completion.logprobs]) for completion in done]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("ambient"))


@pytest.fixture(scope="module")
def wanted(path: Path) -> list[Any]:
    with Engine.load(path, mode="eager") as engine:
        return results(engine)


@pytest.mark.parametrize("state", STATES)
def test_a_call(path: Path, wanted: list[Any], state: str) -> None:
    with Engine.load(path, mode="eager") as engine, STATES[state]():
        assert results(engine) == wanted


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_start(path: Path, wanted: list[Any], state: str, mode: str) -> None:
    with STATES[state](), Engine.load(path, mode=mode, decode_buckets=[1, 2], prefill_buckets=[]) as engine:
        assert results(engine) == wanted


def test_the_scripts_noise_and_threads_are_its_own(path: Path) -> None:
    torch.manual_seed(5)
    wanted, threads, dtype = torch.rand(3), torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(5)
    with Engine.load(path, mode="eager") as engine:
        engine.generate(PROMPTS[0], max_new_tokens=3, temperature=1.0)
        engine.generate(PROMPTS[0], max_new_tokens=3, temperature=1.0, seed=3)
    assert torch.equal(torch.rand(3), wanted)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)


def test_compiled_steps(path: Path, wanted: list[Any]) -> None:
    """Dynamo's guards see such states: it compiles again, which is counted, and the tokens are the same."""
    fields: dict[str, Any] = {"mode": "jit", "compile_backend": "eager", "compile_cache": False}
    with Engine.load(path, **fields) as engine:
        for state in STATES:
            with STATES[state]():
                assert [ids for ids, _ in results(engine)] == [ids for ids, _ in wanted], state


@contextmanager
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        yield


@contextmanager
def stance() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("switch", [environment, lambda: torch._dynamo.config.patch(disable=True), stance])
def test_switched_off_compilation_is_not_reported_as_compiled(path: Path, switch: Any) -> None:
    with switch(), Engine.load(path, mode="jit", compile_backend="aot_eager", compile_cache=False) as engine:
        done = engine.generate(PROMPTS[0], max_new_tokens=3)
        assert {step.kind for step in done.steps} == {"layers, eager"}
        assert any("nothing is compiled" in reason for reason in engine.stats().fallbacks)
        assert engine.stats().compiled == 0


class Streamer:
    """Counts the ends."""

    def __init__(self) -> None:
        self.ends = 0

    def put(self, ids: torch.Tensor) -> None:
        assert ids.device.type == "cpu"

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("", {}),
        ([], {}),
        ([10**6], {}),
        (None, {}),
        ([[1], [2]], {}),
        ([1, 2], {"temperature": -1}),
        ([1, 2], {"max_new_token": 3}),
        ([1, 2], {"n": 2, "temperature": 1.0}),
        ([1, 2], {"max_new_tokens": 10**6}),
        ([1, 2], {"sampling": 5}),
    ],
)
def test_a_streamer_ends_once_whatever_is_wrong_with_the_call(path: Path, prompt: Any, fields: dict[str, Any]) -> None:
    try:
        for _ in range(2):  # before the model is loaded, and after
            streamer = Streamer()
            with pytest.raises(hybridgen.HybridgenError):
                hybridgen.generate(path, prompt, mode="eager", streamer=streamer, **fields)
            assert streamer.ends == 1
            hybridgen.generate(path, [1], mode="eager", max_new_tokens=1)
        with Engine.load(path, mode="eager") as engine:
            streamer = Streamer()
            with pytest.raises(hybridgen.HybridgenError):
                engine.generate(prompt, streamer=streamer, **fields)
            assert streamer.ends == 1
        streamer = Streamer()
        with pytest.raises(hybridgen.HybridgenError):
            engine.generate([1], streamer=streamer)  # closed
        assert streamer.ends == 1
        streamer = Streamer()
        with pytest.raises(hybridgen.HybridgenError):
            hybridgen.generate("/no/such/model", [1], streamer=streamer)
        assert streamer.ends == 1
    finally:
        hybridgen.unload()


def test_a_streamer_without_an_end_is_refused_as_such(path: Path) -> None:
    end_streamer(None)
    with Engine.load(path, mode="eager") as engine, pytest.raises(hybridgen.SamplingError, match="has no put"):
        engine.generate([1], streamer=object())


class Raising(Streamer):
    """Raises at one of its puts, counted from 1, or in `end` (0)."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.puts = 0

    def put(self, ids: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == self.at:
            raise OSError("put")

    def end(self) -> None:
        super().end()
        if self.at == 0:
            raise OSError("end")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_streamer_that_raises_ends_once_and_the_engine_goes_on(path: Path, at: int) -> None:
    with Engine.load(path, mode="eager") as engine:
        streamer = Raising(at)
        with pytest.raises((hybridgen.HybridgenError, OSError)):
            engine.generate([1, 2], max_new_tokens=3, ignore_eos=True, streamer=streamer)
        assert streamer.ends == 1
        assert len(engine.generate([1, 2], max_new_tokens=3, ignore_eos=True).token_ids) == 3
