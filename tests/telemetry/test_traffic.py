"""Bytes of a decode step, counted by hand."""

from __future__ import annotations

from collections.abc import Sequence

import families
import pytest
import torch
from torch import nn

import hybridgen
from hybridgen.kernels.read_ceiling import read_ceiling
from hybridgen.models import bind
from hybridgen.models.weights import WHOLE, DenseWeight, ModuleWeights, Shard
from hybridgen.telemetry.statistics import DecodeStats
from hybridgen.telemetry.traffic import DecodeMeter, Traffic, traffic_of


def bytes_of(name: str, **changes: object) -> Traffic:
    bound = bind(families.build(name, **changes))
    try:
        return traffic_of(bound, bound.layer_states(16, torch.float32), None)
    finally:
        bound.release()


def test_weights_are_all_parameters_but_the_embedding_table() -> None:
    model = families.build("llama")
    everything = sum(p.numel() for p in model.parameters()) * 4
    embedding = model.get_input_embeddings().weight.numel() * 4
    assert bytes_of("llama").weights == everything - embedding


def test_a_tied_embedding_is_the_heads_weight() -> None:
    tied, apart = (bytes_of("llama", tie_word_embeddings=tie).weights for tie in (True, False))
    assert tied == apart


def test_experts_are_not_counted() -> None:
    traffic = bytes_of("mixtral")
    assert traffic.weights == 0
    assert traffic.bandwidth(1, 10, 1.0) is None


def test_a_projection_counts_what_its_weight_reads() -> None:
    class Eighth(ModuleWeights):
        def get(self, names: Sequence[str], shard: Shard = WHOLE) -> DenseWeight:
            return _Eighth(super().get(names, shard).values)

    class _Eighth(DenseWeight):
        @property
        def bytes_read(self) -> int:
            return self.values.numel() // 2

    model = families.build("llama")
    bound = bind(model)
    bound.weights = Eighth(model)
    states = bound.layer_states(16, torch.float32)
    try:
        counted = traffic_of(bound, states, None).weights
    finally:
        bound.release()
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert counted == linears // 2 + 4 * norms


def test_a_weight_of_two_modules_counts_once() -> None:
    model = families.build("llama")
    first, second = (model.model.layers[i].mlp.down_proj for i in range(2))
    second.weight = first.weight
    bound = bind(model)
    try:
        shared = traffic_of(bound, bound.layer_states(16, torch.float32), None).weights
    finally:
        bound.release()
    assert shared == bytes_of("llama").weights - 4 * first.weight.numel()


def test_states_say_what_a_position_costs() -> None:
    bound = bind(families.build("llama"))
    try:
        full, half = (
            traffic_of(bound, bound.layer_states(16, dtype), None) for dtype in (torch.float32, torch.float16)
        )
    finally:
        bound.release()
    assert full.cache == ((0, 4 * 2 * 2 * 16 * 4),)
    assert half.cache == ((0, 4 * 2 * 2 * 16 * 2),)


def test_windows_bound_what_a_row_reads() -> None:
    # Two full layers and two of window 8: 2 kv heads of 16, keys and values, float32.
    traffic = bytes_of("gemma3_text")
    each = 2 * 2 * 16 * 4
    assert traffic.step_bytes(1, 100) - traffic.weights == 2 * each * 100 + 2 * each * 8
    assert traffic.step_bytes(3, 5) - traffic.weights == 3 * 4 * each * 5


def test_mbu_is_a_share_of_the_ceiling() -> None:
    traffic = Traffic(weights=1000, cache=((0, 10),), ceiling=4000.0)
    assert traffic.bandwidth(2, 50, 0.5) == (1000 + 2 * 50 * 10) / 0.5
    assert traffic.mbu(3000.0) == 0.75
    assert Traffic(1000, (), None).mbu(3000.0) is None


def test_the_meter_counts_steps_that_follow_each_other() -> None:
    meter = DecodeMeter(Traffic(1000, ((0, 10),), None))
    meter.step(2, 100, 1.0)  # what came before it is not known
    meter.step(2, 102, 1.5)
    meter.pause()
    meter.step(1, 7, 9.0)
    meter.step(1, 8, 9.25)
    assert (meter.steps, meter.seconds) == (2, 0.75)
    assert meter.bytes == pytest.approx(1000 + 1020 + 1000 + 80)


def test_what_the_meter_says() -> None:
    meter = DecodeMeter(Traffic(1000, ((0, 10),), 8000.0))
    assert meter.stats().read_bandwidth is None
    meter.step(2, 100, 1.0)
    meter.step(2, 100, 1.5)
    assert meter.stats() == DecodeStats(steps=1, seconds=0.5, read_bandwidth=4000.0, ceiling=8000.0, mbu=0.5)
    with_experts = DecodeMeter(Traffic(0, ((0, 10),), 8000.0))
    with_experts.step(2, 100, 1.0)
    with_experts.step(2, 100, 1.5)
    assert with_experts.stats().read_bandwidth is None
    assert with_experts.stats().steps == 1


def test_no_ceiling_on_a_cpu() -> None:
    assert read_ceiling(torch.device("cpu")) is None


def test_a_completion_says_what_it_read() -> None:
    model = families.build("llama")
    with hybridgen.Engine.load(model, mode="eager", max_batch=2, max_context=64, kv_memory="4MiB") as engine:
        out = engine.generate(families.prompts_of((9,))[0], max_new_tokens=6, ignore_eos=True)
        stats = engine.stats()
    times = out.timing.token_times
    traffic = bytes_of("llama")
    assert out.timing.read_bandwidth == pytest.approx(traffic.bandwidth(1, 9 + 3, (times[-1] - times[0]) / 5))
    assert out.timing.mbu is None
    assert stats.decode.steps == 4
    assert stats.decode.read_bandwidth == pytest.approx(
        sum(traffic.step_bytes(1, 10 + i) for i in range(1, 5)) / stats.decode.seconds, rel=0.02
    )
    assert stats.fused == {}
    assert "GB/s" in str(stats)
