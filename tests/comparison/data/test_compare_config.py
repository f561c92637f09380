"""What a comparison may be asked for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hybridgen
from hybridgen.comparison.data.config import ABLATIONS, SMOKE, USUAL_PROMPT, CompareConfig
from hybridgen.errors import ConfigError, HybridgenError
from hybridgen.graphs import buckets as ladder
from hybridgen.speculation.oracle import OracleDrafter


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modes": ("eager", "fast")}, "modes holds 'fast'; choose from: eager, jit, graph, hybrid"),
        ({"baselines": "other"}, "baselines holds 'other'"),
        ({"prompt_lengths": ()}, "prompt_lengths is empty"),
        ({"batch_sizes": (0,)}, "batch_sizes holds 0; give integers of at least 1"),
        ({"new_tokens": 0}, "new_tokens=0; give an integer of at least 1"),
        ({"warm_up": 0}, "warm_up=0"),
        ({"budget": -1}, "budget=-1"),
        ({"tolerance": 2}, "tolerance=2"),
        ({"ablate": "yes"}, "ablate='yes'; give True or False"),
        ({"ablate": True, "modes": ("jit",)}, "add hybrid to modes"),
        ({"engine": {"mode": "jit"}}, "mode= is set by the comparison"),
        ({"engine": {"page_sise": 16}}, "did you mean 'page_size'"),
        ({"engine": {"page_size": 17}}, "not a power of two"),
        ({"modes": None}, "modes=None; give a list of"),
        ({"batch_sizes": None}, "batch_sizes=None; give a list of integers"),
        ({"engine": {"adapter": "a"}}, "adapter='a' is not for a comparison"),
        ({"engine": {"tensor_parallel": 2}}, "tensor_parallel=2 is not for a comparison"),
        ({"engine": {"speculation": OracleDrafter([], [])}}, "its result is a file that holds the config"),
    ],
)
def test_what_is_wrong_is_said(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        CompareConfig(**fields)


def test_eager_is_always_there_and_first() -> None:
    assert CompareConfig(modes=("hybrid", "jit")).modes == ("eager", "jit", "hybrid")
    assert list(CompareConfig(modes="graph").variants) == ["eager", "graph"]


def test_one_size_is_a_list_of_one_and_sizes_are_sorted() -> None:
    config = CompareConfig(prompt_lengths=50, batch_sizes=(8, 1, 8))
    assert (config.prompt_lengths, config.batch_sizes) == ((50,), (1, 8))


def test_ablation_switches_one_thing_off_in_hybrid() -> None:
    variants = CompareConfig(ablate=True).variants
    assert len(variants) == 4 + len(ABLATIONS)
    for name, fields in variants.items():
        config = CompareConfig().engine_config(fields, 4096)
        if name.startswith("hybrid, "):
            plain = CompareConfig().engine_config({"mode": "hybrid"}, 4096)
            differ = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(plain, f.name)]
            assert len(differ) == name.count("="), name  # fused decode needs joined projections: two at once there


def test_an_engine_is_as_large_as_the_cells_need() -> None:
    config = CompareConfig(prompt_lengths=(10, 900), batch_sizes=(3,), new_tokens=20, engine={"dtype": "float32"})
    engine = config.engine_config({"mode": "jit"}, 4096)
    assert not engine.prefix_cache  # or the prefill of a prompt would be measured once
    assert (engine.max_batch, engine.max_context, engine.dtype) == (3, 920, "float32")
    assert config.replace(prompt_lengths=(10,)).engine_config({}, 4096).max_context == 512 + 20
    assert config.replace(prompt_lengths=(10,)).engine_config({}, 128).max_context == 128


def test_the_largest_bucket_is_that_of_the_ladder() -> None:
    assert USUAL_PROMPT == ladder.USUAL_PROMPT


@pytest.mark.parametrize("config", [CompareConfig(), SMOKE, CompareConfig(ablate=True, engine={"page_size": 32})])
def test_a_config_comes_back_from_its_plain_values(config: CompareConfig) -> None:
    assert CompareConfig.of(config.as_dict()) == config


def test_what_json_does_not_have_is_taken_as_a_text() -> None:
    config = CompareConfig(engine={"dtype": torch.float32, "compile_cache": Path("a")})
    assert config.engine == {"dtype": "float32", "compile_cache": "a"}


def test_unknown_plain_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown keyword"):
        CompareConfig.of({"modus": "eager"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modus": "jit"}, "unknown keyword 'modus'"),
        ({"config": 3}, "is not a CompareConfig"),
        ({"prompt_lengths": 1000, "new_tokens": 100}, "make 1100 tokens, above the model's 1024"),
        ({"mode": "jit"}, "mode= is set by the comparison"),
        ({"engine": 3, "page_size": 16}, "engine=3 is no mapping"),
        ({"output": 3}, "output=3 is no directory"),
    ],
)
def test_bad_input_is_found_before_weights_are_read(
    fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridgen.loading.Checkpoint.load", lambda self: pytest.fail("weights were read"))
    with pytest.raises(HybridgenError, match=re.escape(message)):
        hybridgen.compare(None, **fields)
