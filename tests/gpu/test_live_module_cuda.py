"""A live module on a GPU: trained while an engine generates with it, steered by hooks, and never copied."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import families
import pytest
import torch

import hybridgen

pytestmark = pytest.mark.gpu

PROMPTS = families.prompts_of((7, 7))
STEPS = 20
NEW = 6
SETTINGS: dict[str, Any] = {"max_batch": 4, "max_context": 128, "kv_memory": "32MiB"}
LAYERS = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
"""A size that the fused kernels serve."""


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def train_once(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """One step towards other tokens than those given; its loss and gradients."""
    loss = model(input_ids=ids, labels=(ids + 1) % families.VOCAB).loss
    optimizer.zero_grad()
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    return loss.item(), gradients


def generated(model: Any) -> list[list[int]]:
    model.eval()
    ids = torch.tensor(PROMPTS, device="cuda")
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    model.train()
    return out[:, ids.shape[1] :].tolist()


# Experts in float32 wait for the device, so they cannot be recorded: see test_graphs_cuda.
@pytest.mark.parametrize(
    ("family", "mode"),
    [*(("llama", mode) for mode in ("eager", "jit", "graph", "hybrid")), ("qwen3_moe", "eager"), ("qwen3_moe", "jit")],
)
def test_a_training_loop_in_float32(family: str, mode: str) -> None:
    model = families.build(family, num_hidden_layers=2).cuda().train()
    alone = copy.deepcopy(model)
    ours, theirs = (torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (model, alone))
    with hybridgen.Engine.load(model, mode=mode, **SETTINGS) as engine:
        for _ in range(STEPS):
            outs = engine.generate(PROMPTS, max_new_tokens=NEW, temperature=0, ignore_eos=True)
            assert [list(out.token_ids) for out in outs] == generated(model)
            ids = torch.tensor([p + list(out.token_ids) for p, out in zip(PROMPTS, outs, strict=True)], device="cuda")
            loss, gradients = train_once(model, ours, ids)
            expected, others = train_once(alone, theirs, ids)
            assert loss == pytest.approx(expected, rel=1e-4)
            torch.testing.assert_close(gradients, others, rtol=1e-2, atol=1e-4)
            # Sums in another order in two runs must not add up over the steps.
            alone.load_state_dict(model.state_dict())
            theirs.load_state_dict(ours.state_dict())
        stats = engine.stats()
    assert not stats.fallbacks
    assert stats.late_compiles == 0


@torch.inference_mode()
def logprobs(model: Any, prompt: list[int], out: hybridgen.Completion) -> tuple[torch.Tensor, torch.Tensor]:
    """A model's own log-probabilities of a completion's tokens, and of the likeliest one at each place."""
    ids = torch.tensor([[*prompt, *out.token_ids]], device="cuda")
    scores = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return scores.gather(1, ids[0, len(prompt) :, None])[:, 0], scores.amax(-1)


def worst(model: Any, outs: list[Any], of: Any = None) -> float:
    """The largest difference of completions' log-probabilities, or of another model's on the same tokens, to a model's
    own."""
    found = []
    for prompt, out in zip((PROMPTS[0], *PROMPTS), outs, strict=True):
        given = torch.tensor([entry.logprob for entry in out.logprobs], device="cuda")
        ours = given if of is None else logprobs(of, prompt, out)[0]
        found.append(float((ours - logprobs(model, prompt, out)[0]).abs().max()))
    return max(found)


def behind(model: Any, outs: list[Any]) -> float:
    """By how much the likeliest token was ahead of a chosen one at most; 0 where a model chooses the same tokens."""
    pairs = [logprobs(model, prompt, out) for prompt, out in zip((PROMPTS[0], *PROMPTS), outs, strict=True)]
    return max(float((best - chosen).max()) for chosen, best in pairs)


def run(engine: Any) -> list[Any]:
    """One row, which the persistent kernel decodes, and two, which the chain does."""
    fields = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    return [engine.generate(PROMPTS[0], **fields), *engine.generate(PROMPTS, **fields)]


def phi3() -> Any:
    """Its projections are joined by itself; fused kernels read the parameters that are trained."""
    return families.build("phi3", **LAYERS).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_training_loop_with_the_persistent_kernel_and_the_chain(family: str) -> None:
    """Phi-3 joins its projections itself; the others' are read where they lie."""
    model = families.build(family, **LAYERS).to("cuda", torch.bfloat16).train()
    alone = copy.deepcopy(model)
    ours, theirs = (torch.optim.AdamW(each.parameters(), lr=3e-4) for each in (model, alone))
    before = copy.deepcopy(model).float().eval()
    with hybridgen.Engine.load(model, mode="hybrid", **SETTINGS) as engine:
        assert engine.stats().fused["decode of 1 row"] == "one persistent kernel", engine.stats().fused
        # So small a model's own layers may be as fast; the chain is what is tried here.
        fused = engine._runner.fused
        fused.use_rows(2, 1, "")
        fused.use_chain_up_to(SETTINGS["max_batch"], "")
        for step in range(STEPS):
            exact = copy.deepcopy(model).float().eval()
            outs = run(engine)
            model.eval()
            # About the error of its own layers. A larger learning rate than this one makes that more than 1.
            allowed = 2 * worst(model, outs, of=exact) + 0.1
            model.train()
            assert worst(exact, outs) < allowed, step
            assert behind(exact, outs) < 2 * allowed, step  # the tokens of float32, but where two are as likely
            ids = torch.tensor([p + list(out.token_ids) for p, out in zip(PROMPTS, outs[1:], strict=True)]).cuda()
            loss, gradients = train_once(model, ours, ids)
            # Bits cannot be asked for: backward adds up an embedding's gradients in any order.
            expected, others = train_once(alone, theirs, ids)
            assert loss == pytest.approx(expected, rel=2e-2)
            total = max(float(gradient.float().norm()) for gradient in others)
            for gradient, other in zip(gradients, others, strict=True):
                distance = float((gradient.float() - other.float()).norm())
                assert distance <= 5e-2 * float(other.float().norm()) + 1e-3 * total, step
            alone.load_state_dict(model.state_dict())
            theirs.load_state_dict(ours.state_dict())
        assert worst(before, outs) > 2  # training has changed what is computed
        stats = engine.stats()
        assert engine._runner.fused is fused
        assert not stats.fallbacks
        assert [executors(out) for out in outs] == [{"persistent"}, {"chain"}, {"chain"}]


def executors(out: hybridgen.Completion) -> set[str]:
    return {step.kind.split(",")[0] for step in out.steps if step.phase == "decode"}


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_other_data_makes_fused_kernels_and_graphs_anew(family: str) -> None:
    model = families.build(family, **LAYERS).to("cuda", torch.bfloat16)
    with hybridgen.Engine.load(model, mode="hybrid", **SETTINGS) as engine, warnings.catch_warnings(record=True):
        first = engine._runner.fused
        run(engine)
        for module in (model.model.norm, model.model.layers[1].mlp.down_proj, model.lm_head):
            module.weight.data = module.weight.data * -1.5
        exact = copy.deepcopy(model).float()
        for _ in range(3):
            assert worst(exact, run(engine)) < 1
        stats = engine.stats()
        assert engine._runner.fused is not first
        assert stats.fused.get("decode of 1 row") == "one persistent kernel", (stats.fused, stats.fallbacks)
        assert len(stats.fallbacks) == 2, stats.fallbacks
        hits = stats.graphs.hits
        run(engine)
        assert engine.stats().graphs.hits > hits


@pytest.mark.parametrize("mode", ["jit", "graph", "hybrid"])
def test_steering_by_a_hook(mode: str) -> None:
    model = phi3()

    def steer(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * -2

    with hybridgen.Engine.load(model, mode=mode, **SETTINGS) as engine, warnings.catch_warnings(record=True):
        plain, fused = run(engine), engine._runner.fused
        handle = model.model.layers[1].mlp.register_forward_hook(steer)
        steered = run(engine)
        exact = copy.deepcopy(model).float()
        assert worst(exact, steered) < 1
        assert engine._runner.fused is None
        assert not any("cuda graph" in step.kind for out in steered for step in out.steps)
        handle.remove()
        again = run(engine)
        assert [out.token_ids for out in again] == [out.token_ids for out in plain]
        assert engine._runner.fused is fused
        kinds = {step.kind for out in again for step in out.steps if step.phase == "decode"}
        assert any(("compiled" if mode == "jit" else "cuda graph") in kind for kind in kinds)
        assert engine.stats().late_compiles == 0


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_no_weight_is_copied(mode: str) -> None:
    size = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "head_dim": 128}
    model = families.build("llama", **size).to("cuda", torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 500 * 2**20
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with hybridgen.Engine.load(model, mode=mode, **SETTINGS) as engine:
        engine.generate(PROMPTS, max_new_tokens=4)
        assert torch.cuda.memory_allocated() - before < weights / 4


def test_weights_written_on_another_stream_are_waited_for() -> None:
    model = families.build("llama", **LAYERS).cuda()
    with hybridgen.Engine.load(model, mode="graph", **SETTINGS) as engine:
        run(engine)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            torch.cuda._sleep(200_000_000)
            model.model.norm.weight.mul_(torch.linspace(-2, 2, LAYERS["hidden_size"], device="cuda"))
            outs = run(engine)
        torch.cuda.synchronize()
        assert [list(out.token_ids) for out in outs[1:]] == generated(model)
