"""Engines that decode with the persistent kernel for several columns alone: formats, watchdog, starts, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import quantised_formats
import torch
from safetensors.torch import load_file, save_file

import hybridgen
from hybridgen.execution import fused_executors

pytestmark = pytest.mark.gpu

LAYERS: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 64, "num_hidden_layers": 2, "vocab_size": 258, "initializer_range": 0.03,
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "mode": "hybrid", "device": "cuda", "dtype": "bfloat16", "max_batch": 4, "max_context": 512, "kv_memory": "64MiB",
    "equal_bits": True, "compile_backend": "eager",
}  # fmt: skip
SIZE = "decode of 1 to 4 rows"
PROMPTS = families.prompts_of((20, 7, 33, 64))
SAMPLING: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True}


def worst(ours: list[hybridgen.Completion], theirs: list[hybridgen.Completion]) -> float:
    """The largest difference of log-probabilities while the tokens agree; behind the first other one texts differ."""
    found = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            if x.token_id != y.token_id:
                break
            found = max(found, abs(x.logprob - y.logprob))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        *({"quantization": kind, "quantize_head": "fp8"} for kind in ("fp8", "int8", "int4")),
        {"kv_dtype": "fp8"},
        {"kv_dtype": "fp8", "quantization": "int4", "quantize_head": "fp8"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_numbers_of_few_bits_are_multiplied_as_the_layers_multiply_them(
    changes: dict[str, str], tmp_path: Path
) -> None:
    path = families.write("llama", tmp_path, **LAYERS)
    options = OPTIONS | changes
    with hybridgen.Engine.load(path, **options) as engine:
        found = engine.generate(PROMPTS, **SAMPLING, logprobs=0)
        stats = engine.stats()
        alone = [engine.generate(prompt, **SAMPLING, logprobs=0) for prompt in PROMPTS]
    assert stats.fused[SIZE] == "one persistent kernel for several rows", stats.fused
    assert all("rounds to the nearest" in note for note in stats.fallbacks)
    assert [out.token_ids for out in alone] == [out.token_ids for out in found]
    assert [out.logprobs for out in alone] == [out.logprobs for out in found]
    with hybridgen.Engine.load(path, **options | {"mode": "eager", "equal_bits": False}) as engine:
        expected = engine.generate(PROMPTS, **SAMPLING, logprobs=0)
    assert sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(found, expected, strict=True)) >= 3
    assert worst(found, expected) < 0.1


@pytest.mark.parametrize(
    ("parts", "ignore"),
    [
        ({"all": ("ct w4 group", "Linear")}, ("lm_head", r"re:.*layers\.0\..*", r"re:.*layers\.2\..*")),
        ({"all": ("ct w4 group", "Linear"), "attention": ("ct fp8 channel", r"re:.*self_attn.*")}, ("lm_head",)),
        ({"all": ("ct mxfp4", "Linear")}, ("lm_head",)),
    ],
    ids=["dense layers beside int4", "attention in fp8 beside int4", "mxfp4"],
)
def test_checkpoints_whose_layers_have_several_formats(
    parts: dict[str, tuple[str, str]], ignore: tuple[str, ...], tmp_path: Path
) -> None:
    """As quantisers leave them: some layers as they were, or each part in a format of its own."""
    model = families.build("llama", **LAYERS | {"num_hidden_layers": 3})
    quantised_formats.write_parts(tmp_path, model, parts, ignore)
    _shrink(tmp_path / "model.safetensors")
    with hybridgen.Engine.load(tmp_path, **OPTIONS) as engine:
        found = engine.generate(PROMPTS, **SAMPLING, logprobs=0)
        stats = engine.stats()
    assert stats.fused[SIZE] == "one persistent kernel for several rows", stats.fused
    with hybridgen.Engine.load(tmp_path, **OPTIONS | {"mode": "eager", "equal_bits": False}) as engine:
        expected = engine.generate(PROMPTS, **SAMPLING, logprobs=0)
    assert sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(found, expected, strict=True)) >= 3
    assert worst(found, expected) < 0.2  # of both; eager alone is up to 0.09 off float32's


def _shrink(file: Path) -> None:
    """Give weights of random codes the size that weights have: with larger ones two bf16 computations part at once."""
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        scale = tensors[name]
        eight_bits = tensors.get(name.removesuffix("_scale"), scale).dtype is torch.float8_e4m3fn
        tensors[name] = scale - 2 if scale.dtype is torch.uint8 else scale * (0.013 if eight_bits else 0.2)
    save_file(tensors, file, metadata={"format": "pt"})


def test_sixteen_rows_take_two_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is faster; here it is said to be."""
    path = families.write("llama", tmp_path, **LAYERS)
    options = OPTIONS | {"max_batch": 16, "equal_bits": False, "quantization": "int4", "decode_buckets": [1, 8, 16]}
    options["prefix_cache"] = False  # prompts that are found there are read in other pieces, with other bits
    real = fused_executors._recorded_seconds
    taken = {"rows": 1.0, "layers": 2.0}
    monkeypatch.setattr(fused_executors, "_recorded_seconds", lambda *args: real(*args) and taken[args[-1]])
    prompts = families.prompts_of(tuple(range(20, 36)))
    with hybridgen.Engine.load(path, **options) as engine:
        assert engine.stats().fused["decode of 1 to 16 rows"] == "one persistent kernel for several rows"
        found = [engine.generate(prompts, **SAMPLING, logprobs=0) for _ in range(3)]
        halves = engine.generate(prompts[:8], **SAMPLING, logprobs=0)
        halves += engine.generate(prompts[8:], **SAMPLING, logprobs=0)
        stats = engine.stats()
    assert any(kind.startswith("rows") and "16" in reason for (phase, kind, reason) in stats.steps if phase == "decode")
    assert all("rounds to the nearest" in note for note in stats.fallbacks)
    assert [out.logprobs for out in found[1]] == [out.logprobs for out in found[2]]
    assert worst(found[0], halves) < 0.1  # prompts of smaller calls have other bits
    assert sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(found[0], halves, strict=True)) >= 14


def test_an_engine_mends_a_step_that_was_given_up(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, **LAYERS)
    with hybridgen.Engine.load(path, **OPTIONS) as engine:
        good = engine.generate(PROMPTS, **SAMPLING)
        step = engine._runner.fused.rows.step
        step._host_fault[0] = 1  # as if a block had given up: whoever waits long enough to look stops waiting
        step.counters[2 * 32] = -100_000  # arrivals that never come
        with pytest.raises(hybridgen.RequestError), pytest.warns(RuntimeWarning, match="given up"):
            engine.generate(PROMPTS[0], **SAMPLING)
        assert not step.faulted
        assert [out.token_ids for out in engine.generate(PROMPTS, **SAMPLING)] == [out.token_ids for out in good]
        assert any("given up" in reason for reason in engine.stats().fallbacks)


CHILD = """
import json, sys, hybridgen
given = json.loads(sys.argv[1])
with hybridgen.Engine.load(given["model"], **given["options"]) as engine:
    found = [engine.generate(given["prompts"], **given["sampling"]) for _ in range(given["times"])]
    tokens = [[list(out.token_ids) for out in outs] for outs in found]
    stats = engine.stats()
assert all(each == tokens[0] for each in tokens)
print(json.dumps({"tokens": tokens[0], "fused": stats.fused, "fallbacks": list(stats.fallbacks)}))
"""


def start(model: Path, store: Path, times: int = 1, **changes: Any) -> subprocess.Popen[str]:
    options = {**OPTIONS, "compile_backend": "inductor", "compile_cache": str(store), **changes}
    sampling = SAMPLING | {"max_new_tokens": 12 if times == 1 else 300}
    given = {"model": str(model), "options": options, "prompts": PROMPTS, "sampling": sampling, "times": times}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, json.dumps(given)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    found = json.loads(out.splitlines()[-1])
    assert found["fused"][SIZE] == "one persistent kernel for several rows"
    assert not found["fallbacks"]
    return found


def test_a_start_without_a_compiler_and_two_processes_on_one_device(tmp_path: Path) -> None:
    """Machine code is kept. Each process holds all multiprocessors while its kernel runs; the device takes turns."""
    model, store = families.write("llama", tmp_path, **LAYERS), tmp_path / "store"
    cold = result(start(model, store))
    both = [start(model, store, times=10, offline_compile=True) for _ in range(2)]
    first, second = map(result, both)
    assert first["tokens"] == second["tokens"]
    assert [ids[:12] for ids in first["tokens"]] == cold["tokens"]
