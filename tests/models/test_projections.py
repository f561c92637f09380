"""Fused projections compute the same, store nothing twice, and share one compiled graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.prune import l1_unstructured, random_unstructured
from transformers import AutoModelForCausalLM, PreTrainedModel

from hybridgen import Engine
from hybridgen.errors import EngineError
from hybridgen.models.projections import (
    FusedHead,
    FusedTail,
    FusionReport,
    RowsLinear,
    fuse_projections,
    product,
    unfuse_projections,
    use_rows,
)

QKV, GATE_UP = "q_proj+k_proj+v_proj", "gate_proj+up_proj"

# Groups in four layers. GPT-2, GPT-NeoX, Phi-3 and the like have one fused projection already; MoE blocks
# keep their experts in one tensor.
GROUPS = {
    "lfm2": {"k_proj+q_proj+v_proj": 1, "w1+w3": 4},
    "phi3": {}, "gpt2": {}, "gpt_bigcode": {}, "gpt_neox": {},
    "phi": {QKV: 4}, "starcoder2": {QKV: 4}, "nemotron": {QKV: 4}, "glm": {QKV: 4}, "glm4": {QKV: 4},
    "mixtral": {QKV: 4}, "qwen2_moe": {QKV: 4, GATE_UP: 4}, "qwen3_moe": {QKV: 4}, "olmoe": {QKV: 4},
    "glm4_moe": {QKV: 4, GATE_UP: 4}, "gpt_oss": {QKV: 4}, "opt": {QKV: 4},
}  # fmt: skip
BOTH = {QKV: 4, GATE_UP: 4}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 25).reshape(2, 11)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all storages that the model keeps alive, joined weights included, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def same_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
def test_products_of_a_few_rows_are_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build(family)
    before, state = logits(model), copy.deepcopy(model.state_dict())
    monkeypatch.setattr("hybridgen.models.projections._LEAST", 0)  # these weights are small
    plain = sum(type(module) is nn.Linear for module in model.modules())
    assert use_rows(model) == plain > 0
    assert sum(type(module) is RowsLinear for module in model.modules()) == plain
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert same_states(model.state_dict(), state)
    assert use_rows(model.to(torch.bfloat16)) == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="only where oneDNN is")
def test_wide_weights_lie_by_columns_once_and_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridgen.models.projections._LEAST", 0)
    model = families.build("llama")
    before, state, size = logits(model), copy.deepcopy(model.state_dict()), storage_bytes(model)
    fuse_projections(model)
    use_rows(model)
    heads = [module for module in model.modules() if type(module) is FusedHead]
    assert heads
    for head in heads:
        wide = head.fused_weight.shape[0] >= 2 * head.fused_weight.shape[1]
        assert head.fused_weight.is_contiguous() != wide
        for member in head.fused_members:  # views of it still
            assert member.weight.untyped_storage().data_ptr() == head.fused_weight.untyped_storage().data_ptr()
    assert any(not head.fused_weight.is_contiguous() for head in heads)
    assert storage_bytes(model) == size
    assert same_states(model.state_dict(), state)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    for rows in (1, 2, 40):
        inputs = torch.randn(1, rows, heads[0].in_features)
        expected = torch.nn.functional.linear(inputs, heads[0].fused_weight.contiguous())
        torch.testing.assert_close(product(inputs, heads[0].fused_weight, None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_computes_the_same_and_stores_nothing_twice(family: str) -> None:
    model = families.build(family)
    before, state, size = logits(model), copy.deepcopy(model.state_dict()), storage_bytes(model)
    parameters = [id(p) for p in model.parameters()]

    report = fuse_projections(model)

    assert {"+".join(sorted(k.split("+"))): v for k, v in report.by_names.items()} == {
        "+".join(sorted(k.split("+"))): v for k, v in GROUPS.get(family, BOTH).items()
    }
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert same_states(model.state_dict(), state)
    assert [id(p) for p in model.parameters()] == parameters
    assert storage_bytes(model) == size

    assert unfuse_projections(model) == len(report.groups)
    assert not [m for m in model.modules() if isinstance(m, (FusedHead, FusedTail))]
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert same_states(model.state_dict(), state)
    assert storage_bytes(model) == size


def test_the_joined_weight_is_really_used_and_shared() -> None:
    model = families.build("qwen2")
    fuse_projections(model)
    attention = model.model.layers[1].self_attn
    head = next(m for m in (attention.q_proj, attention.k_proj, attention.v_proj) if type(m) is FusedHead)
    assert head.fused_weight.shape == (64 + 32 + 32, 64)
    assert head.fused_bias is not None
    for name in ("q_proj", "k_proj", "v_proj"):
        member = getattr(attention, name)
        for part, whole in ((member.weight, head.fused_weight), (member.bias, head.fused_bias)):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    before = logits(model)
    with torch.no_grad():
        attention.k_proj.weight.mul_(2.0)  # in place, so it reaches the joined weight
    assert not torch.equal(logits(model), before)


def test_the_report_counts_elements() -> None:
    report = fuse_projections(families.build("qwen2", num_hidden_layers=1))
    assert report.parameters == (128 * 64 + 128) + 2 * 96 * 64
    assert {group.module for group in report.groups} == {"model.layers.0.self_attn", "model.layers.0.mlp"}
    assert fuse_projections(families.build("gpt2")) == FusionReport()


def test_biases_of_a_part_of_the_group_are_filled_with_zeros() -> None:
    model = families.build("llama")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = nn.Parameter(torch.randn(32))
    before, keys = logits(model), list(model.state_dict())
    assert fuse_projections(model).by_names == BOTH
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert model.model.layers[0].self_attn.q_proj.bias is None
    assert list(model.state_dict()) == keys


def test_a_second_call_finds_nothing_left() -> None:
    model = families.build("llama")
    fuse_projections(model)
    assert fuse_projections(model) == FusionReport()
    assert unfuse_projections(model) == 8
    assert unfuse_projections(model) == 0
    assert fuse_projections(model).by_names == BOTH


def test_moves_casts_and_copies_keep_the_group_together() -> None:
    model = families.build("qwen2")
    before = logits(model)
    fuse_projections(model)
    model.double()
    head = model.model.layers[0].mlp.gate_proj
    assert head.fused_weight.dtype == torch.float64
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float64
    shared = head.fused_weight.untyped_storage().data_ptr()
    assert model.model.layers[0].mlp.up_proj.weight.untyped_storage().data_ptr() == shared
    model.float()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(model)
    model.to_empty(device="cpu")  # gives every tensor a new storage, also where the dtype and device stay
    projections = (head, model.model.layers[0].mlp.up_proj)
    assert {p.weight.untyped_storage().data_ptr() for p in projections} == {
        head.fused_weight.untyped_storage().data_ptr()
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(twin), before, rtol=1e-5, atol=1e-5)


def test_a_fused_model_saves_and_loads_as_before(tmp_path: Path) -> None:
    model = families.build("qwen2")
    before = logits(model)
    fuse_projections(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), before, rtol=1e-5, atol=1e-5)
    other = families.build("qwen2").state_dict()
    model.load_state_dict({name: torch.zeros_like(value) for name, value in other.items()})
    assert logits(model).abs().max() == 0
    model.load_state_dict(other)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


# Compiled


class CountingBackend:
    """Runs the graphs uncompiled and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def linears(self) -> list[int]:
        """Matrix products in each graph."""
        return [sum("linear" in str(node.target) for node in g.graph.nodes) for g in self.graphs]


def compile_layers(model: PreTrainedModel) -> CountingBackend:
    """Compiles each layer on its own, runs the model, and returns what reached the backend."""
    torch._dynamo.reset()
    backend = CountingBackend()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False, backend=backend)
    logits(model)
    return backend


@pytest.mark.parametrize(("family", "saved"), [("llama", 3), ("qwen2", 3), ("gemma3_text", 3), ("starcoder2", 2)])
def test_layers_share_compiled_graphs_after_fusing(family: str, saved: int) -> None:
    plain = compile_layers(families.build(family))
    model = families.build(family)
    before = logits(model)
    fuse_projections(model)
    fused = compile_layers(model)
    assert len(fused.graphs) == len(plain.graphs) == 1  # the four layers of each share one
    assert fused.linears()[0] == plain.linears()[0] - saved
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert len(fused.graphs) == 1
    slots = [m.fused_slot for m in model.modules() if isinstance(m, FusedTail)]
    assert slots
    assert all(slot.item is None for slot in slots)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_the_whole_model_compiles_to_one_graph(family: str) -> None:
    model = families.build(family, num_hidden_layers=2)
    before = logits(model)
    fuse_projections(model)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    ids = torch.arange(3, 25).reshape(2, 11)
    with torch.no_grad():
        out = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(out, before, rtol=1e-5, atol=1e-5)


def test_the_joined_weight_is_a_static_input_of_the_graph() -> None:
    model = families.build("llama", num_hidden_layers=1)
    fuse_projections(model)
    backend = CountingBackend()
    model.model.layers[0].compile(fullgraph=True, dynamic=False, backend=backend)
    logits(model)
    nodes = [n for n in backend.graphs[0].graph.nodes if n.op == "placeholder" and "fused_weight" in n.name]
    assert len(nodes) == 2
    for node in nodes:
        assert node.meta["tensor_dict"]["_dynamo_static_input_type"] == "unguarded"


# What must not be fused, and misuse


def test_a_tail_without_its_head_raises_instead_of_returning_stale_data() -> None:
    model = families.build("llama")
    fuse_projections(model)
    attention = model.model.layers[0].self_attn
    assert type(attention.k_proj) is FusedTail
    hidden = torch.randn(1, 3, 64)
    with pytest.raises(EngineError, match="fuse_projections=False"):
        attention.k_proj(hidden)
    attention.q_proj(hidden)
    with pytest.raises(EngineError, match="without its head"):
        attention.k_proj(hidden + 1)
    attention.q_proj(hidden)
    attention.k_proj(hidden)
    with pytest.raises(EngineError):  # a slice is handed out once
        attention.k_proj(hidden)


class Block(nn.Module):
    """Projections that look like a group; `order` says how they are called."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.order == "other input":
            return self.q_proj(x) + self.k_proj(x) + self.v_proj(x.clone())
        if self.order == "in place":
            out = self.q_proj(x)
            x.add_(1.0)
            return out + self.k_proj(x) + self.v_proj(x)
        if self.order == "twice":
            return self.q_proj(x) + self.k_proj(x) + self.v_proj(x) + self.q_proj(x)
        if self.order == "left out":
            return self.q_proj(x) + self.k_proj(x)
        if self.order == "v first":
            return 3 * self.v_proj(x) + 2 * self.k_proj(x) + self.q_proj(x)
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


class Tiny(nn.Module):
    """The least that `fuse_projections` asks of a model."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 16, "pad_token_id": None})()
        self.embed, self.block = nn.Embedding(16, 8), block

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return self.block(self.embed(input_ids).clone())


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("other input", "v_proj gets another input than q_proj"),
        ("in place", "changes in place"),
        ("twice", "q_proj 2"),
        ("left out", "v_proj 0"),
    ],
)
def test_calls_that_do_not_allow_it_stay_apart(order: str, reason: str) -> None:
    model = Tiny(Block(order))
    before = model(IDS)
    report = fuse_projections(model)
    assert not report.groups
    assert [s.module for s in report.skipped] == ["block"]
    assert reason in report.skipped[0].reason
    assert {type(m) for m in (model.block.q_proj, model.block.k_proj, model.block.v_proj)} == {nn.Linear}
    torch.testing.assert_close(model(IDS), before)


def test_the_member_called_first_is_the_head() -> None:
    model = Tiny(Block("v first"))
    before = model(IDS)
    assert fuse_projections(model).groups[0].names == ("v_proj", "k_proj", "q_proj")
    assert type(model.block.v_proj) is FusedHead
    torch.testing.assert_close(model(IDS), before)


class OtherLinear(nn.Linear):
    pass


def _subclass(block: Block) -> None:
    block.k_proj = OtherLinear(8, 8)


def _hook(block: Block) -> None:
    block.v_proj.register_forward_hook(lambda module, args, output: output * 2)


def _forward(block: Block) -> None:
    block.v_proj.forward = lambda x: x  # type: ignore[method-assign]


def _tied(block: Block) -> None:
    block.out = nn.Linear(8, 8)
    block.out.weight = block.q_proj.weight


def _one_module(block: Block) -> None:
    block.k_proj = block.q_proj


def _dtype(block: Block) -> None:
    block.k_proj.bias = nn.Parameter(torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_subclass, "k_proj is a OtherLinear"),
        (_hook, "v_proj has hooks"),
        (_forward, "replaced forward"),
        (_tied, "q_proj shares a parameter"),
        (_one_module, "one module"),
        (_dtype, "dtypes or devices differ"),
    ],
)
def test_modules_that_do_not_allow_it_stay_apart(change: Any, reason: str) -> None:
    model = Tiny(Block("plain"))
    change(model.block)
    report = fuse_projections(model)
    assert not report.groups
    assert reason in report.skipped[0].reason


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    class Fails(Block):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 2:  # the check after fusing
                raise ValueError("no")
            return super().forward(x)

    model = Tiny(Fails("plain"))
    report = fuse_projections(model)
    assert not report.groups
    assert "ValueError: no" in report.skipped[0].reason
    assert type(model.block.q_proj) is nn.Linear
    assert not [name for name in vars(model.block.q_proj) if name.startswith("fused_")]
    assert not model.block.q_proj._forward_pre_hooks


def test_it_works_inside_inference_mode() -> None:
    model: PreTrainedModel = families.build("llama")
    before = logits(model)
    with torch.inference_mode():
        assert fuse_projections(model).by_names == BOTH
        inside = model(input_ids=torch.arange(3, 25).reshape(2, 11), use_cache=False).logits
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=1e-5)
    assert not model.model.layers[0].self_attn.q_proj.weight.is_inference()


@pytest.mark.gpu
def test_on_cuda() -> None:
    model = families.build("qwen2").to("cuda", torch.bfloat16)
    ids = torch.arange(3, 25, device="cuda").reshape(2, 11)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        assert fuse_projections(model).by_names == BOTH
        after = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=0, atol=0.1 * float(before.abs().max()))


def weight_normed(model: PreTrainedModel) -> None:
    weight_norm(model.model.layers[0].mlp.down_proj)


def spectrally_normed(model: PreTrainedModel) -> None:
    spectral_norm(model.model.layers[1].self_attn.k_proj)
    model.eval()


def pruned(model: PreTrainedModel) -> None:
    l1_unstructured(model.lm_head, "weight", 0.3)
    random_unstructured(model.model.layers[0].mlp.gate_proj, "weight", 0.5)


@pytest.mark.parametrize("change", [weight_normed, spectrally_normed, pruned])
def test_a_live_module_with_weights_that_are_computed(change: Any) -> None:
    model = families.build("llama")
    change(model)
    (prompt,) = families.prompts_of((9,))
    expected, _ = families.reference(model, prompt, 8)
    with Engine.load(model, mode="eager", page_size=16, kv_memory="4MiB") as engine:
        assert list(engine.generate(prompt, max_new_tokens=8).token_ids) == expected
