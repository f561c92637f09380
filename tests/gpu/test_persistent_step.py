"""The persistent kernel on a GPU, against the float32 reference; its watchdog; and an engine that decodes with it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from decoders import Shape, in_parts, make_context, random_decoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import hybridgen
from hybridgen.cache import LayerPages
from hybridgen.execution import fused_executors
from hybridgen.fused import reference
from hybridgen.models.decoder import Decoder, Unfit
from hybridgen.models.projections import fuse_projections

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    from hybridgen.fused import tuning
    from hybridgen.fused.chain import search
    from hybridgen.fused.persistent.shape import Tuning
    from hybridgen.fused.persistent.step import PersistentStep

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the logits; the prototype of the chain has 1.5e-2, and so has Hugging Face's own bfloat16 forward."""
POSITIONS = (0, 1, 63, 64, 65, 127, 500, 1000)


class Run:
    """A kernel with a cache of one row, whose unwritten places are NaN."""

    def __init__(self, model: Decoder, position: int, page_size: int, **options: Any) -> None:
        self.model = model
        context = make_context(model, [position], page_size, seed=position)
        self.pages = context.pages
        self.table = context.block_table
        self.slot = int(context.slots[0])
        self.rows = torch.full((1,), self.slot, dtype=torch.int64, device="cuda")
        self.state = torch.zeros(3, len(self.table), dtype=torch.int64, device="cuda")
        self.state[:2, self.slot] = torch.stack((context.tokens[0], context.positions[0]))
        self.step = PersistentStep(
            model, self.pages, rows=self.rows, state=self.state, block_table=self.table, **options
        )

    def expected(self) -> tuple[Tensor, tuple[LayerPages, ...]]:
        pages = tuple(LayerPages(layer.keys.clone(), layer.values.clone()) for layer in self.pages)
        row = slice(self.slot, self.slot + 1)
        return reference.step(self.model, pages, self.state[0, row], self.state[1, row], self.table[row]), pages

    def check(self) -> None:
        logits, pages = self.expected()
        self.step.logits.fill_(torch.nan)
        # Stale words, as the step before would have left them, but without numbers.
        self.step.words.bitwise_and_(255).bitwise_or_(0x7FC00000)
        self.step()
        torch.cuda.synchronize()
        assert not self.step.faulted
        error = (self.step.logits.float() - logits).norm() / logits.norm()
        assert float(error) < TOLERANCE[self.model.dtype]
        for ours, theirs in zip(self.pages, pages, strict=True):
            for actual, wanted in zip(ours, theirs, strict=True):
                assert torch.equal(actual.isnan(), wanted.isnan())  # one row was written, and no other
                # Keys of later layers carry the rounding of the layers before.
                written = ~wanted.isnan()
                close = (actual.float() - wanted.float())[written].norm() <= 2e-2 * wanted.float()[written].norm()
                assert bool(close)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Shape, torch.dtype, int, Any]:
    head_dim = draw(st.sampled_from((32, 64, 64, 128, 128, 256)))
    kv_heads = draw(st.integers(1, 4))
    group = draw(st.integers(1, 8))
    biases = st.lists(st.sampled_from(("qkv", "out", "gate_up", "down")), unique=True)
    shape = Shape(
        hidden=draw(st.sampled_from((256, 264, 512, 896, 1024, 2048))),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=draw(st.sampled_from((256, 1032, 2048, 4864))),
        vocab=draw(st.sampled_from((131, 1000, 4096))),
        layers=draw(st.integers(1, 4)),
        activation=draw(st.sampled_from(("silu", "gelu_tanh"))),
        biases=tuple(draw(biases)),
        head_norm=draw(st.sampled_from(("", "head"))),
        windows=tuple(draw(st.lists(st.sampled_from((0, 1, 8, 100, 300)), min_size=1, max_size=2))),
        rotates=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=2))),
        embedding_scale=draw(st.sampled_from((1.0, 12.0))),
        residual=draw(st.sampled_from((1.0, 0.25))),
        logits_scale=draw(st.sampled_from((1.0, 0.125))),
        attention_scale=draw(st.sampled_from((head_dim**-0.5, 0.2))),
        max_context=2048,
    )
    tuning = Tuning(
        stage=draw(st.sampled_from((16384, 32768))),
        in_flight=draw(st.integers(1, 4)),
        short_splits=draw(st.integers(1, 8)),
        short_least=draw(st.sampled_from((64, 128, 256))),
        long_splits=draw(st.integers(1, 32)),
        long_least=draw(st.sampled_from((64, 256))),
        long_from=draw(st.sampled_from((1, 128, 512, 4096))),
    )
    return (
        shape,
        draw(st.sampled_from((torch.bfloat16, torch.float16))),
        draw(st.sampled_from((8, 16, 64, 256))),
        tuning,
    )


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_random_shapes(case: tuple[Shape, torch.dtype, int, Any]) -> None:
    shape, dtype, page_size, tuning = case
    model = random_decoder(shape, dtype, "cuda")
    for position in POSITIONS:
        Run(model, position, page_size, tuning=tuning, kept=_kept).check()


_compiled: dict[str, bytes] = {}


def _kept(key: str, make: Any) -> bytes:
    if key not in _compiled:
        _compiled[key] = make()
    return _compiled[key]


@pytest.mark.parametrize(
    "shape",
    [
        Shape(hidden=2048, heads=32, kv_heads=8, head_dim=64, intermediate=8192, vocab=4096),
        Shape(hidden=1024, heads=16, kv_heads=8, head_dim=128, intermediate=3072, vocab=1000, head_norm="head"),
        # Fewer rows of keys than a stage holds: one stage has rows of queries, keys and values.
        Shape(hidden=256, heads=3, kv_heads=1, head_dim=32, intermediate=264, biases=("qkv", "gate_up", "down")),
    ],
)
def test_projections_that_lie_apart_give_the_same_bits(shape: Shape) -> None:
    model = random_decoder(shape, torch.bfloat16, "cuda")
    apart = in_parts(model)
    mixed = dataclasses.replace(model, layers=(model.layers[0], *apart.layers[1:]))
    for position in (0, 65, 200):
        results = []
        for each in (model, apart, mixed):
            run = Run(each, position, 64, kept=_kept)
            run.check()
            results.append(run.step.logits.clone())
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("position", [32767, 100_000, 131_071])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_contexts(head_dim: int, position: int) -> None:
    shape = Shape(hidden=2048, heads=32, kv_heads=8, head_dim=head_dim, intermediate=8192, max_context=131_072)
    shape.attention_scale = head_dim**-0.5
    Run(random_decoder(shape, torch.bfloat16, "cuda"), position, 64, kept=_kept).check()


def test_many_layers_let_sequence_numbers_wrap() -> None:
    shape = Shape(hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=512, layers=150, residual=0.1)
    run = Run(random_decoder(shape, torch.bfloat16, "cuda"), 100, 64)
    for _ in range(5):
        run.check()


def test_replays_repeat_bit_for_bit() -> None:
    shape = Shape(hidden=2048, heads=32, kv_heads=8, head_dim=64, intermediate=8192, vocab=4096)
    run = Run(random_decoder(shape, torch.bfloat16, "cuda"), 700, 64)
    run.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.step()
    first = run.step.logits.clone()
    for _ in range(300):
        graph.replay()
        assert torch.equal(run.step.logits, first)


def test_the_watchdog_ends_a_step_that_waits_in_vain() -> None:
    shape = Shape(hidden=512, heads=8, kv_heads=2, head_dim=64, intermediate=1024)
    run = Run(random_decoder(shape, torch.bfloat16, "cuda"), 100, 64, patience=2000)
    run.step()
    torch.cuda.synchronize()
    good = run.step.logits.clone()
    run.step.counters[3 * 32] = -100_000  # arrivals that never come
    run.step()
    torch.cuda.synchronize()
    assert run.step.faulted
    assert run.step.logits.isnan().any()
    run.step()  # what was launched behind it ends too
    torch.cuda.synchronize()
    run.step.repair()
    run.step()
    torch.cuda.synchronize()
    assert not run.step.faulted
    assert torch.equal(run.step.logits, good)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 48}, "48 dimensions"),
        ({"hidden": 300}, "multiple of 8"),
        ({"heads": 200}, "multiprocessors"),
    ],
)
def test_what_it_does_not_serve_is_said(change: dict[str, Any], reason: str) -> None:
    shape = Shape(hidden=512, heads=8, kv_heads=2, head_dim=64, intermediate=1024)
    model = dataclasses.replace(random_decoder(shape, torch.bfloat16, "cuda"), **change)
    context = make_context(random_decoder(shape, torch.bfloat16, "cuda"), [3])
    with pytest.raises(Unfit, match=reason):
        PersistentStep(model, context.pages, rows=context.slots, state=context.tokens, block_table=context.block_table)


LAYERS = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
OPTIONS = {"mode": "hybrid", "dtype": "bfloat16", "max_batch": 4, "max_context": 512, "kv_memory": "64MiB"}
OPTIONS |= {"token_budget": 512}  # for larger prefills a start measures a kernel, and says where it is slower


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3"])
def test_engines_decode_with_it(name: str) -> None:
    """Every token's log-probability is as near to float32's as that of the model's own layers."""
    # Phi-3 reads its head size off the heads.
    model = families.build(name, **LAYERS).to("cuda", torch.bfloat16)
    exact = copy.deepcopy(model).float()
    fuse_projections(model)  # a live module's are left as they are
    prompts = families.prompts_of((7, 120, 33))
    errors = {}
    for fused in (True, False):
        with hybridgen.Engine.load(model, **OPTIONS, fused_decode=fused) as engine:
            outs = [engine.generate(p, max_new_tokens=24, ignore_eos=True, logprobs=0) for p in prompts]
            outs += engine.generate(prompts, max_new_tokens=24, ignore_eos=True, logprobs=0)
            stats = engine.stats()
        errors[fused] = max(_worst_error(exact, p, out) for p, out in zip(prompts * 2, outs, strict=True))
        assert not stats.fallbacks
        if fused:
            assert stats.fused["decode of 1 row"] == "one persistent kernel", stats.fused
            # Who is faster at several rows of so small a model is not sure.
            assert any(size.startswith("decode of 2") or "take it" in note for size, note in stats.fused.items())
            assert stats.decode.ceiling is not None
            assert 0 < outs[0].timing.mbu < 1.05
    assert errors[True] < 1.5 * errors[False] + 0.02, errors


def _worst_error(exact: torch.nn.Module, prompt: list[int], out: hybridgen.Completion) -> float:
    """The largest difference of a completion's log-probabilities to the model's own on the same tokens."""
    return float(_errors(exact, prompt, out).max())


@torch.inference_mode()
def _errors(exact: torch.nn.Module, prompt: list[int], out: hybridgen.Completion) -> Tensor:
    """Differences of a completion's log-probabilities to the model's own on the same tokens."""
    ids = torch.tensor([[*prompt, *out.token_ids]], device="cuda")
    scores = exact(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    theirs = scores.gather(1, ids[0, len(prompt) :, None])[:, 0]
    ours = torch.tensor([entry.logprob for entry in out.logprobs], device="cuda")
    return (ours - theirs).abs()


def test_an_engine_mends_a_step_that_was_given_up() -> None:
    model = families.build("llama", **LAYERS).to("cuda", torch.bfloat16)
    fuse_projections(model)
    prompt = families.prompts_of((20,))[0]
    with hybridgen.Engine.load(model, **OPTIONS) as engine:
        good = engine.generate(prompt, max_new_tokens=12, ignore_eos=True)
        step = engine._runner.fused.persistent.step
        step._host_fault[0] = 1  # as if a block had given up: whoever waits long enough to look stops waiting
        step.counters[3 * 32] = -100_000  # arrivals that never come
        with pytest.raises(hybridgen.RequestError), pytest.warns(RuntimeWarning, match="given up"):
            engine.generate(prompt, max_new_tokens=12, ignore_eos=True)
        assert not step.faulted
        assert engine.generate(prompt, max_new_tokens=12, ignore_eos=True).token_ids == good.token_ids
        assert any("given up" in reason for reason in engine.stats().fallbacks)


def test_the_tuner_keeps_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it chooses: by a clock for which each candidate is faster than all before, each kernel is another than
    without it. Whoever decodes, log-probabilities are as near to float32's."""
    model = families.build("llama", **LAYERS, vocab_size=258)  # an odd one is not for the kernel for several rows
    model = model.to("cuda", torch.bfloat16)
    exact = copy.deepcopy(model).float()
    fuse_projections(model)
    prompts = families.prompts_of((120, 33, 60))
    errors: dict[str, list[float]] = {"persistent": [], "rows": [], "chain": []}
    tunings = []
    ticks = itertools.count(1)
    # A start leaves out who is slower, which depends on what else runs on the device; nobody is here.
    real, taken = fused_executors._recorded_seconds, {"rows": 1.0, "chain": 2.0, "layers": 3.0}
    monkeypatch.setattr(fused_executors, "_recorded_seconds", lambda *args: real(*args) and taken[args[-1]])

    def faster_and_faster(launch: Callable[[], object], **_: Any) -> float:
        launch()
        torch.cuda.synchronize()
        return 0.5 ** next(ticks)

    for seconds in (0, 4):
        if seconds:
            for module in (tuning, search):
                monkeypatch.setattr(module, "graph_seconds", faster_and_faster)
        with hybridgen.Engine.load(model, **OPTIONS, tune_seconds=seconds) as engine:
            runner, fused = engine._runner, engine._runner.fused
            tunings.append((fused.persistent.step.tuning, fused.rows.step.tuning, dict(fused.chain.chain.tiles)))
            for who, found in errors.items():
                # Who is faster at several rows is for other tests to say.
                fused.use_rows(2, 4 if who == "rows" else 1, "")
                fused.use_chain_up_to(4, "")
                runner.use_fused(fused)
                for recording in list(runner.graphs.recordings):  # or steps are padded to those of the one before
                    runner.graphs.drop(recording)
                some = prompts[:1] if who == "persistent" else prompts
                outs = engine.generate(some, max_new_tokens=24, ignore_eos=True, logprobs=0)
                kinds = {step.kind for out in outs for step in out.steps if step.phase == "decode"}
                assert all(kind.startswith(who) for kind in kinds), kinds
                off = [_errors(exact, prompt, out) for prompt, out in zip(some, outs, strict=True)]
                found.append(float(torch.cat(off).mean()))
            assert not engine.stats().fallbacks
    assert all(ours != theirs for ours, theirs in zip(*tunings, strict=True)), tunings
    # Other tilings round otherwise, so that texts part; the mean over a text does not depend on where.
    for who, (plain, tuned) in errors.items():
        assert tuned < 1.5 * plain + 0.02, (who, errors)


def test_a_changed_norm_is_taken_over() -> None:
    model = families.build("llama", **LAYERS).to("cuda", torch.bfloat16)
    prompts = families.prompts_of((20, 30))
    exact, before = (copy.deepcopy(model).float() for _ in range(2))
    fuse_projections(model)
    with hybridgen.Engine.load(model, **OPTIONS) as engine:
        for factor in (1.0, 0.25):
            with torch.no_grad():
                for each in (model, exact):
                    each.model.layers[1].input_layernorm.weight.mul_(factor)
                    each.model.norm.weight.mul_(factor)
            outs = [engine.generate(prompts[0], max_new_tokens=12, ignore_eos=True, logprobs=0)]
            outs += engine.generate(prompts, max_new_tokens=12, ignore_eos=True, logprobs=0)
            for prompt, out in zip((prompts[0], *prompts), outs, strict=True):
                assert _worst_error(exact, prompt, out) < 1, factor
                if factor != 1:
                    assert _worst_error(before, prompt, out) > 2


def test_two_processes_on_one_device(tmp_path: Path) -> None:
    """Each holds all multiprocessors while its kernel runs; the device takes turns."""
    script = tmp_path / "decode.py"
    script.write_text(_WORKER.format(tests=str(Path(families.__file__).parent), layers=LAYERS, options=OPTIONS))
    started = [
        subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]  # fmt: skip
    lines = [process.communicate(timeout=240)[0].splitlines()[-1] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    first, second = map(json.loads, lines)
    assert first["tokens"] == second["tokens"]
    assert first["fused"] == second["fused"] == "one persistent kernel"
    assert not first["fallbacks"]
    assert not second["fallbacks"]


_WORKER = """
import json, sys
sys.path.insert(0, {tests!r})
import families, torch, hybridgen
from hybridgen.models.projections import fuse_projections
model = families.build("llama", **{layers!r}).to("cuda", torch.bfloat16)
fuse_projections(model)
prompt = families.prompts_of((20,))[0]
with hybridgen.Engine.load(model, **{options!r}) as engine:
    tokens = [engine.generate(prompt, max_new_tokens=400, ignore_eos=True).token_ids for _ in range(10)]
    assert all(ids == tokens[0] for ids in tokens)
    stats = engine.stats()
print(json.dumps(dict(tokens=tokens[0], fused=stats.fused["decode of 1 row"], fallbacks=list(stats.fallbacks))))
"""
