"""Adapters of other engines: what they are called with, and what comes out."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import families
import pytest
import torch
import transformers

import hybridgen
from hybridgen.comparison.data.config import CompareConfig
from hybridgen.comparison.measuring.baselines import Unavailable, build_baseline

CONFIG = CompareConfig(prompt_lengths=(6,), batch_sizes=(1, 2), new_tokens=5)
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]


@pytest.mark.parametrize("name", ["hf-dynamic", "hf-static", "hf-batch"])
def test_hugging_face_gives_the_tokens_of_generate_and_a_time_for_each(name: str) -> None:
    model = families.build("llama")
    expected = [families.reference(model, prompt, 5)[0] for prompt in PROMPTS]
    baseline = build_baseline(name, model, None, CONFIG)
    try:
        for _ in range(2):  # the second call finds what the first left
            output = baseline.call(PROMPTS, 5)
            assert output.tokens == expected
            assert [len(times) for times in output.times] == [5, 5]
            assert all(0 < times[0] < times[-1] for times in output.times)
    finally:
        baseline.close()


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["hf-dynamic", "hf-static"])
def test_calls_have_hugging_face_warn_of_nothing(name: str) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        baseline = build_baseline(name, families.build("llama"), None, CONFIG)
        baseline.call(PROMPTS, 3)
        baseline.close()
    finally:
        logger.removeHandler(handler)
        transformers.logging.set_verbosity(before)
    assert said == []


def test_static_caches_are_one_per_batch_size() -> None:
    model = families.build("llama")
    baseline = build_baseline("hf-static", model, None, CONFIG)
    one = baseline.call(PROMPTS[:1], 5).tokens
    both = baseline.call(PROMPTS, 5).tokens
    assert baseline.call(PROMPTS[:1], 5).tokens == one == both[:1]
    assert sorted(baseline._caches) == [1, 2]


def test_vllm_that_is_not_installed_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="vllm cannot be imported"):
        build_baseline("vllm", families.build("llama"), "path", CONFIG)


def test_a_baseline_that_is_not_there_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    sys.modules["vllm"].__spec__ = SimpleNamespace()  # type: ignore[assignment]
    found = hybridgen.compare(
        families.build("llama"), modes="eager", baselines="vllm", prompt_lengths=4, batch_sizes=1, new_tokens=2,
        repeats=1, progress=False,
    )  # fmt: skip
    row = found.cell("vllm", 4, 1)
    assert row.status == "not measured"
    assert "given in memory" in (row.error or "")
    assert found.cell("eager", 4, 1).status == "ok"


def test_vllm_is_asked_for_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            asked["options"] = options

        def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> Any:
            asked["prompts"], asked["params"] = prompts, params
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(1, 2, 3))]) for _ in prompts]

    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **fields: fields  # type: ignore[attr-defined]
    vllm.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50, 100))
    baseline = build_baseline("vllm", families.build("llama"), "some/path", CONFIG)
    assert baseline.call(PROMPTS, 3).tokens == [[1, 2, 3]] * 2
    assert asked["prompts"] == [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    assert asked["params"] == {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True, "detokenize": False}
    assert asked["options"]["model"] == "some/path"
    assert asked["options"]["gpu_memory_utilization"] == pytest.approx(0.4)
    assert asked["options"]["enable_prefix_caching"] is False
