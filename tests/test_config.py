"""EngineConfig."""

from typing import Any

import pytest
import torch

from hybridgen import ConfigError, EngineConfig, Mode


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "fast"},
        {"dtype": "bf17"},
        {"device": "tpu"},
        {"device": "cuda:x"},
        {"max_batch": 0},
        {"max_batch": 2.0},
        {"max_context": 1},
        {"page_size": 24},
        {"page_size": 4},
        {"kv_memory": "lots"},
        {"kv_memory": 0},
        {"kv_memory": -5},
        {"token_budget": 1},
        {"run_ahead": 2},
        {"trust_remote_code": "yes"},
        {"progress": "on"},
        {"compile_backend": None},
        {"compile_backend": 7},
        {"compile_backend": ""},
        {"revision": 7},
        {"revision": ""},
    ],
)
def test_bad_values_are_refused_and_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**fields)
    name, value = next(iter(fields.items()))
    assert f"{name}=" in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_memory": "9" * 400},
        {"kv_memory": "9" * 400 + "GiB"},
        {"kv_memory": "9999999999999GiB"},
        {"kv_memory": 10**400},
        {"kv_memory": 10**5000},
        {"kv_memory": 2.5},
        {"kv_memory": "lots of memory " * 50},
        {"max_batch": 10**5000},
        {"max_context": 10**400},
        {"token_budget": "x" * 1000},
        {"mode": "x" * 1000},
        {"dtype": "x" * 1000},
        {"device": "x" * 1000},
        {"trust_remote_code": "x" * 1000},
        {"progress": torch.ones(3)},
    ],
)
def test_extreme_values_are_refused_in_few_words(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}=") as caught:
        EngineConfig(**fields)
    assert len(str(caught.value)) < 200


def test_a_config_and_fields_make_a_config() -> None:
    given = EngineConfig(max_batch=3)
    assert EngineConfig.of(None, {}) == EngineConfig()
    assert EngineConfig.of(given, {}) == given
    assert EngineConfig.of(given, {"page_size": 16}) == EngineConfig(max_batch=3, page_size=16)
    with pytest.raises(ConfigError, match="page_size=3"):
        EngineConfig.of(given, {"page_size": 3})


@pytest.mark.parametrize("config", [{"mode": "eager"}, "eager", 0, [], {}, EngineConfig, "x" * 1000])
def test_what_is_no_config(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"config=.* is not an EngineConfig; give EngineConfig") as caught:
        EngineConfig.of(config, {})
    assert len(str(caught.value)) < 200


def test_values_are_normalised() -> None:
    config = EngineConfig(mode="eager", dtype=torch.bfloat16, device=torch.device("cpu"), kv_memory="1.5KiB")
    assert (config.mode, config.dtype, config.device, config.kv_memory) == (Mode.EAGER, "bfloat16", "cpu", 1536)
    assert config == EngineConfig(mode=Mode.EAGER, dtype="bfloat16", device="cpu", kv_memory=1536)
    assert config.replace(max_batch=2).max_batch == 2
