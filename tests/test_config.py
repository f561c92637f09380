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
    ],
)
def test_bad_values_are_refused_and_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**fields)
    name, value = next(iter(fields.items()))
    assert f"{name}=" in str(caught.value)
    assert str(value) in str(caught.value)


def test_values_are_normalised() -> None:
    config = EngineConfig(mode="eager", dtype=torch.bfloat16, device=torch.device("cpu"), kv_memory="1.5KiB")
    assert (config.mode, config.dtype, config.device, config.kv_memory) == (Mode.EAGER, "bfloat16", "cpu", 1536)
    assert config == EngineConfig(mode=Mode.EAGER, dtype="bfloat16", device="cpu", kv_memory=1536)
    assert config.replace(max_batch=2).max_batch == 2
