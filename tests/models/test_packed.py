"""Gated delta nets and Mamba-2 over all runs of a prefill call at once, with a stand-in for what `fla-core` gives."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5

import hybridgen
from hybridgen.kernels import packed_runs
from hybridgen.models import mixers, packed

DELTA = ["qwen3_5_text", "qwen3_next", "olmo_hybrid"]
SCAN = ["mamba2", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "zamba2"]
OWN = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)


class Rule:
    """What `fla-core`'s `chunk_gated_delta_rule` does, run by run."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, initial_state: Tensor,
        output_final_state: bool, use_qk_l2norm_in_kernel: bool, cu_seqlens: Tensor, chunk_indices: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert (q.shape[0], output_final_state, use_qk_l2norm_in_kernel) == (1, True, True)
        assert initial_state.dtype is torch.float32
        repeat = v.shape[2] // q.shape[2]
        q, k = (each.repeat_interleave(repeat, dim=2) for each in (q, k))
        ends = cu_seqlens.tolist()
        self.calls.append(ends)
        pieces = [[row, i] for row in range(len(ends) - 1) for i in range(-(-(ends[row + 1] - ends[row]) // 64))]
        assert chunk_indices.tolist() == pieces
        outputs, states = [], []
        for row in range(len(ends) - 1):
            run = slice(ends[row], ends[row + 1])
            found, state = OWN(
                *(each[:, run] for each in (q, k, v, g, beta)), initial_state=initial_state[row : row + 1],
                output_final_state=True, use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
            outputs.append(found)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)


class Linear(Rule):
    """What its `chunk_simple_gla` does, token by token."""

    def __call__(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, scale: float, initial_state: Tensor,
        output_final_state: bool, state_v_first: bool, cu_seqlens: Tensor, cu_seqlens_cpu: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert (q.shape[0], scale, output_final_state, state_v_first) == (1, 1.0, True, True)
        assert cu_seqlens.tolist() == cu_seqlens_cpu.tolist()
        ends = cu_seqlens.tolist()
        self.calls.append(ends)
        output, states = torch.empty_like(v), initial_state.clone()
        for row in range(len(ends) - 1):
            for t in range(ends[row], ends[row + 1]):
                added = v[0, t].float()[:, :, None] * k[0, t].float()[:, None]
                states[row] = states[row] * g[0, t].exp()[:, None, None] + added
                output[0, t] = torch.einsum("hvk,hk->hv", states[row], q[0, t].float())
        return output, states


def generated(name: str, **options: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of ragged prompts in several chunks, and transformers' own."""
    model = families.build(name)
    prompts = families.prompts_of((7, 90, 1, 33, 64))
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        wanted.append(out[0, len(prompt) :].tolist())
    settings = {"mode": "eager", "max_batch": 8, "token_budget": 80, "kv_memory": "16MiB", "max_context": 128} | options
    with hybridgen.Engine.load(model, **settings) as engine:
        for _ in range(2):  # slots that were used before
            outs = engine.generate(prompts, max_new_tokens=12)
        assert not engine.stats().fallbacks
    return [list(out.token_ids) for out in outs], wanted


@pytest.mark.parametrize("name", [*DELTA, *(pytest.param(each, marks=pytest.mark.slow) for each in SCAN[1:]), SCAN[0]])
def test_ragged_prompts_go_through_in_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule() if name in DELTA else Linear()
    monkeypatch.setattr(mixers, "rule_for", lambda *_: rule)
    found, wanted = generated(name)
    assert found == wanted
    assert max(map(len, rule.calls)) > 3  # several runs
    assert len({tuple(call) for call in rule.calls}) > 2


@pytest.mark.parametrize("name", [*DELTA, *SCAN, "lfm2", "mamba", "jamba"])
def test_mixers_are_known_by_their_code(name: str) -> None:
    kinds = {type(mixer) for mixer in mixers.find_mixers(families.build(name))}
    assert [packed.packed_forward(kind) is not None for kind in kinds] == [name in DELTA + SCAN]


def test_runs_are_laid_out_behind_what_their_convolutions_keep() -> None:
    runs = packed.runs_of([2, 70, 1], 3, torch.device("cpu"))
    assert runs.starts.tolist() == [0, 2, 72, 73]
    assert runs.chunks.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0]]
    inputs = torch.arange(9 + 73)  # nine that were kept, then the tokens
    laid_out = inputs[runs.laid_out].tolist()
    assert laid_out == [0, 1, 2, 9, 10, 3, 4, 5, *range(11, 81), 6, 7, 8, 81]
    assert [laid_out[place] for place in runs.tokens] == list(range(9, 82))
    assert [laid_out[place] for place in runs.last] == [2, 9, 10, 78, 79, 80, 7, 8, 81]


def test_a_cpu_and_float32_keep_the_torch_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_runs, "load", lambda: pytest.fail("fla-core was asked for"))
    states = torch.zeros(2, 4, 16, 16)
    assert packed.rule_for(object, torch.zeros(1, 5, 64, dtype=torch.bfloat16), states) is None
    assert packed.rule_for(object, torch.zeros(1, 5, 64, device="meta"), states) is None


@pytest.mark.parametrize(
    ("kind", "base"), [(modeling_qwen3_5.Qwen3_5GatedDeltaNet, Rule), (modeling_mamba2.Mamba2Mixer, Linear)]
)
def test_a_rule_is_compared_before_it_is_used(kind: Any, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(base):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            found, states = super().__call__(*args, **kwargs)
            return found, states * 1.2

    def broken(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no kernel image")

    def tried(rule: Any) -> Any:
        monkeypatch.setattr(packed_runs, "load", lambda: packed_runs.Rules(rule, rule))
        packed._tried.cache_clear()
        return packed._tried(kind, torch.bfloat16, torch.device("cpu"), (4, 16, 24))

    right = base()
    assert tried(right) is right
    with pytest.warns(RuntimeWarning, match=r"the state of a run of 70 tokens differs by"):
        assert tried(Wrong()) is None
    with pytest.warns(RuntimeWarning, match="RuntimeError: no kernel image"):
        assert tried(broken) is None
    packed._tried.cache_clear()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    packed_runs.load.cache_clear()
    with pytest.warns(RuntimeWarning, match=r'pip install "hybridgen\[hybrid\]"'):
        assert packed_runs.load() is None
    packed_runs.load.cache_clear()


@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_where_transformers_calls_other_libraries_engines_do_not(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where fla-core is installed: transformers takes its functions, which want a GPU."""
    from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

    other = ModuleType("other_library")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a pointer of a CPU")

    pairs = {
        "chunk_gated_delta_rule": "torch_chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule": "torch_recurrent_gated_delta_rule",
        "causal_conv1d_fn": "causal_conv1d_fn",
        "causal_conv1d_update": "causal_conv1d_update",
    }
    monkeypatch.setitem(sys.modules, "other_library", other)
    families.build("qwen3_5_text")
    wanted = generated("qwen3_5_text")[1]
    for theirs, name in pairs.items():
        setattr(other, theirs, refuse)
        own = inspect.unwrap(getattr(modeling_qwen3_5, name))
        decorate = use_kernel_func_from_hub_with_fallback(theirs, "other_library", internal_path="")
        monkeypatch.setattr(modeling_qwen3_5, name, decorate(own))
    mixers._with_slots.cache_clear()
    packed.packed_forward.cache_clear()
    try:
        model = families.build("qwen3_5_text")
        with pytest.raises(RuntimeError, match="a pointer of a CPU"):
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
        settings = {"compile_backend": "eager", "kv_memory": "16MiB", "max_context": 128, "max_batch": 8}
        with hybridgen.Engine.load(model, mode=mode, **settings) as engine:
            outs = engine.generate(families.prompts_of((7, 90, 1, 33, 64)), max_new_tokens=12)
            assert [list(out.token_ids) for out in outs] == wanted
            assert not engine.stats().fallbacks
            assert not engine.stats().late_compiles
    finally:
        mixers._with_slots.cache_clear()
        packed.packed_forward.cache_clear()
