"""EngineConfig."""

import dataclasses
from typing import Any

import pytest
import torch

from hybridgen import ConfigError, EngineConfig, Mode
from hybridgen.config import setting, switch


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
        {"graphs": "some"},
        {"decode_buckets": 4},
        {"decode_buckets": "1, 2"},
        {"prefill_buckets": b"16"},
        {"capture_after": 0},
        {"capture_after": 1.5},
        {"max_graphs": 0},
        {"max_graphs": True},
        {"max_graph_memory": "much"},
        {"max_graph_memory": 0},
        {"max_padding_ratio": -0.5},
        {"max_padding_ratio": True},
        {"max_padding_ratio": "1"},
        {"max_padding_ratio": float("nan")},
        {"on_graph_event": 7},
        {"capture_at_start": 1},
        {"sample_in_graph": None},
        {"lazy_capture": "yes"},
        {"validate": 0},
        {"check_addresses": "no"},
        {"metadata_copy": 1},
        {"double_buffer": 2},
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
        {"graphs": "x" * 1000},
        {"decode_buckets": "x" * 1000},
        {"max_graphs": 10**5000},
        {"max_graph_memory": "9" * 400},
        {"max_padding_ratio": "x" * 1000},
    ],
)
def test_extreme_values_are_refused_in_few_words(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}=") as caught:
        EngineConfig(**fields)
    assert len(str(caught.value)) < 200


def test_each_field_says_how_it_is_checked_and_what_it_is_for() -> None:
    for each in dataclasses.fields(EngineConfig):
        assert set(each.metadata) == {"about", "check", "in_key", "opens"}, f"declare {each.name} with setting(...)"
        assert each.metadata["check"](each.name, each.default) == each.default


@pytest.mark.parametrize("each", dataclasses.fields(EngineConfig), ids=lambda each: each.name)
def test_no_field_takes_what_it_is_not(each: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{each.name}="):
        EngineConfig(**{each.name: -1.5})


def test_a_field_that_is_declared_is_in_the_key_with_its_check() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(EngineConfig):
        loud: bool = dataclasses.field(default=False, metadata=setting("Whether.", switch))
        quiet: bool = dataclasses.field(default=False, metadata=setting("Whether.", switch, in_key=False))

    assert set(More.key_fields()) - set(EngineConfig.key_fields()) == {"loud"}
    with pytest.raises(ConfigError, match="quiet=1; give True or False"):
        More(quiet=1)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("name", ["decode_buckets", "prefill_buckets"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [(None, None), ([], ()), ([4], (4,)), ((8, 1, 8, 2), (1, 2, 8)), ({3, 1}, (1, 3)), (range(1, 4), (1, 2, 3))],
)
def test_buckets_are_put_in_order(name: str, given: Any, kept: Any) -> None:
    config = EngineConfig(**{name: given})
    assert getattr(config, name) == kept
    assert config == EngineConfig(**{name: kept})
    assert config.replace(max_batch=9) == EngineConfig(max_batch=9, **{name: kept})


@pytest.mark.parametrize("name", ["decode_buckets", "prefill_buckets"])
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4", None, 10**300])
def test_sizes_that_are_none(name: str, size: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} holds .*; give integers of at least 1") as caught:
        EngineConfig(**{name: [1, size]})
    assert len(str(caught.value)) < 200


def test_decode_buckets_above_the_batch() -> None:
    assert EngineConfig(max_batch=8, decode_buckets=[8, 1]).decode_buckets == (1, 8)
    with pytest.raises(ConfigError, match="decode_buckets holds 9, above max_batch=8"):
        EngineConfig(max_batch=8, decode_buckets=[1, 9])
    with pytest.raises(ConfigError, match="decode_buckets holds 8, above max_batch=4"):
        EngineConfig(max_batch=8, decode_buckets=[8]).replace(max_batch=4)


@pytest.mark.parametrize("owner", ["trees", "both"])
def test_trees_need_compiled_steps(owner: str) -> None:
    for mode in ("hybrid", "auto"):
        assert EngineConfig(mode=mode, graphs=owner).graphs == owner
    for mode in ("eager", "jit", "graph"):
        with pytest.raises(ConfigError, match=f'graphs="{owner}" with mode="{mode}": trees record compiled steps'):
            EngineConfig(mode=mode, graphs=owner)


@pytest.mark.parametrize(
    ("mode", "compiles", "records"),
    [("eager", False, False), ("jit", True, False), ("graph", False, True), ("hybrid", True, True)],
)
def test_what_a_mode_does(mode: str, compiles: bool, records: bool) -> None:
    config = EngineConfig(mode=mode)
    for device in ("cpu", "cuda"):
        assert config.mode_on(device) == mode
        assert (config.mode_on(device).compiles, config.mode_on(device).records) == (compiles, records)


def test_what_auto_stands_for() -> None:
    assert EngineConfig().mode is Mode.AUTO
    assert EngineConfig().mode_on("cpu") is Mode.EAGER
    assert EngineConfig().mode_on("cuda") is Mode.HYBRID


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "jit"}, 'mode="jit"'),
        ({"fused_decode": False}, "fused_decode=False"),
        ({"graphs": "both", "mode": "hybrid"}, 'graphs="both"'),
        ({"max_batch": 9}, "set max_batch=8 or less"),
    ],
)
def test_what_equal_bits_needs(given: dict[str, Any], message: str) -> None:
    assert EngineConfig(equal_bits=True, max_batch=8).equal_bits
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{"equal_bits": True, "max_batch": 8, **given})
