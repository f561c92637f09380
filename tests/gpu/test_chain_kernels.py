"""The chain of Triton kernels on a GPU, against the float32 reference and Hugging Face's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import Context, Shape, in_parts, make_context, random_decoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hybridgen.cache import LayerPages
from hybridgen.fused import reference
from hybridgen.models.binding import bind
from hybridgen.models.decoder import Decoder, describe
from hybridgen.models.projections import fuse_projections
from hybridgen.models.weights import ModuleWeights

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    from hybridgen.fused.chain.search import tune
    from hybridgen.fused.chain.step import ChainStep
    from hybridgen.fused.chain.tiles import PROJECTIONS, variants

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
REAL = {
    "llama-3.2-1b": {"hidden": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "intermediate": 8192},
    "llama-3.1-8b": {"hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 14336},
    "llama-2-7b": {"hidden": 4096, "heads": 32, "kv_heads": 32, "head_dim": 128, "intermediate": 11008},
    "qwen3-0.6b": {
        "hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 128, "intermediate": 3072, "head_norm": "head",
    },
    "olmo-2-1b": {
        "hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128, "intermediate": 8192, "head_norm": "all",
        "post_norms": True, "pre_norms": False,
    },
}  # fmt: skip


def _poisoned(step: ChainStep) -> ChainStep:
    for tensor in step.tensors().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
    return step


def _expected(model: Decoder, context: Context) -> tuple[Tensor, tuple[LayerPages, ...]]:
    pages = context.copy_pages()
    table = context.block_table[context.slots.long()]
    return reference.step(model, pages, context.tokens, context.positions, table), pages


def _run(step: ChainStep, context: Context) -> Tensor:
    out = torch.full((len(context.tokens), step.model.vocab), torch.nan, dtype=step.model.dtype, device="cuda")
    step(*context.args, out)
    return out


def _compare(model: Decoder, context: Context, **options: object) -> ChainStep:
    expected, pages = _expected(model, context)
    step = _poisoned(ChainStep(model, **options))  # type: ignore[arg-type]
    step.attach(context.pages)
    out = _run(step, context)
    tolerance = TOLERANCE[model.dtype]
    assert (out.float() - expected).norm() <= tolerance * expected.norm()
    for ours, theirs in zip(context.pages, pages, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert (a.float() - b.float()).nan_to_num().norm() <= tolerance * b.float().nan_to_num().norm()
    return step


@st.composite
def _shapes(draw: st.DrawFn) -> Shape:
    kv_heads = draw(st.sampled_from([1, 2, 8]))
    pre_norms = draw(st.booleans())
    return Shape(
        hidden=8 * draw(st.integers(8, 100)),
        heads=kv_heads * draw(st.sampled_from([1, 3, 4, 8])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 80, 128, 256])),
        intermediate=8 * draw(st.integers(8, 100)),
        vocab=draw(st.integers(300, 3000)),
        activation=draw(st.sampled_from(["silu", "gelu_tanh"])),
        biases=tuple(draw(st.sets(st.sampled_from(["qkv", "out", "gate_up", "down"])))),
        head_norm=draw(st.sampled_from(["", "head", "all"])),
        windows=tuple(draw(st.lists(st.sampled_from([0, 1, 100, 1024]), min_size=1, max_size=2))),
        post_norms=draw(st.booleans()) or not pre_norms,
        pre_norms=pre_norms,
        embedding_scale=draw(st.sampled_from([1.0, 8.0])),
        residual=draw(st.sampled_from([1.0, 0.3])),
        logits_scale=draw(st.sampled_from([1.0, 0.25])),
        attention_scale=0.1,
        max_context=4096,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    _shapes(),
    st.lists(st.sampled_from([0, 1, 15, 63, 64, 65, 127, 500, 1023, 2100, 4000]), min_size=1, max_size=16),
    st.sampled_from([16, 64, 256]),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_random_shapes(shape: Shape, lengths: list[int], page_size: int, dtype: torch.dtype) -> None:
    model = random_decoder(shape, dtype, "cuda")
    _compare(model, make_context(model, lengths, page_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("name", REAL)
def test_real_shapes(name: str, rows: int, dtype: torch.dtype) -> None:
    shape = Shape(**REAL[name], vocab=5000, max_context=2048, attention_scale=0.1)  # type: ignore[arg-type]
    model = random_decoder(shape, dtype, "cuda")
    context = make_context(model, [(row * 397 + 511) % 1500 for row in range(rows)], 64)
    step = _compare(model, context)
    first = _run(step, context)
    for _ in range(5):
        assert torch.equal(_run(step, context), first)


def test_large_and_small_states_in_float16() -> None:
    for gain in (1e-4, 2e4):
        model = random_decoder(Shape(hidden=512, embedding_scale=30.0 * gain), torch.float16, "cuda")
        _compare(model, make_context(model, [5, 0, 33]))


@pytest.mark.parametrize("lengths", [[100_000], [100_000, 3, 70, 5000], [1100] * 16])
def test_long_rows(lengths: list[int]) -> None:
    shape = Shape(hidden=256, heads=8, kv_heads=2, head_dim=64, max_context=131072, attention_scale=0.1)
    model = random_decoder(shape, torch.bfloat16, "cuda")
    step = _compare(model, make_context(model, lengths, 64))
    assert not step.tensors()["counters"][: len(lengths)].any()


def test_capture_and_replay() -> None:
    model = random_decoder(Shape(**REAL["llama-3.2-1b"], vocab=5000), torch.bfloat16, "cuda")  # type: ignore[arg-type]
    context = make_context(model, [30, 7, 100], 16)
    step = ChainStep(model)
    step.attach(context.pages)
    first = _run(step, context)
    out = torch.empty_like(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*context.args, out)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, first)
    # What the graph reads may change: other tokens, the next positions, other pages.
    context.tokens.add_(1).remainder_(model.vocab)
    context.positions.add_(1)
    expected, _ = _expected(model, context)
    _poisoned(step)
    graph.replay()
    assert (out.float() - expected).norm() <= TOLERANCE[model.dtype] * expected.norm()


def test_steps_back_to_back_do_not_overtake_each_other() -> None:
    """A step reads what the one before wrote, tokens and cache, though its kernels start before that one's end."""
    model = random_decoder(Shape(hidden=512, vocab=900), torch.bfloat16, "cuda")
    tokens: list[list[int]] = []
    for waits in (True, False):
        context = make_context(model, [0, 0], 16)
        table = torch.arange(1, 13, dtype=torch.int32, device="cuda").view(2, 6)
        pages = tuple(
            LayerPages(*(torch.zeros(13, model.kv_heads, 16, model.head_dim).cuda().bfloat16() for _ in range(2)))
            for _ in model.layers
        )
        step = ChainStep(model)
        step.attach(pages)
        slots = torch.arange(2, dtype=torch.int32, device="cuda")
        token, position = context.tokens.clone(), torch.zeros(2, dtype=torch.int64, device="cuda")
        seen = []
        out = torch.empty(2, model.vocab, dtype=model.dtype, device="cuda")
        for _ in range(60):
            step(token, position, slots, table, out)
            token.copy_(out.argmax(-1))
            position.add_(1)
            seen.append(token.clone())
            if waits:
                torch.cuda.synchronize()
        tokens.append(torch.stack(seen).tolist())
    assert tokens[0] == tokens[1]


def test_every_kind_of_tile() -> None:
    model = random_decoder(Shape(**REAL["llama-3.2-1b"], vocab=5000, layers=1), torch.bfloat16, "cuda")  # type: ignore[arg-type]
    context = make_context(model, [30, 7, 100, 0, 1, 2, 3, 4, 5], 16)
    expected, _ = _expected(model, context)
    step = ChainStep(model)
    step.attach(context.pages)
    for name in PROJECTIONS:
        kept = step.tiles[f"{name}.16"]
        for tile in (*step.candidates(name, 9)[::4], *variants(kept, step.shape(name)[1])[::3]):
            step.use({f"{name}.16": tile})
            _poisoned(step)
            error = (_run(step, context).float() - expected).norm() / expected.norm()
            assert error < TOLERANCE[model.dtype], (name, tile)
        step.use({f"{name}.16": kept})


def test_tune() -> None:
    model = random_decoder(Shape(hidden=512, heads=8, intermediate=1024, vocab=900), torch.bfloat16, "cuda")
    tuned = ChainStep(model)
    contexts = {rows: make_context(model, [30] * rows) for rows in (1, 16)}
    launched = set()

    def launch(rows: int) -> None:
        launched.add(rows)
        tuned.attach(contexts[rows].pages)
        _run(tuned, contexts[rows])

    tried = []
    chosen = tune(tuned, launch, rows=(1, 16), seconds=5, report=lambda *entry: tried.append(entry))
    assert launched == {1, 16}
    assert {key for key, _, _ in tried} == set(chosen)
    assert len({(key, tile) for key, tile, _ in tried}) == len(tried)
    context = make_context(model, [30, 7, 100])
    step = _compare(model, context, tiles=chosen)
    assert {key: list(tile) for key, tile in step.tiles.items()} == chosen


@pytest.mark.parametrize("biases", [(), ("qkv", "gate_up")])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b"])
def test_projections_that_lie_apart_give_the_same_bits(name: str, biases: tuple[str, ...]) -> None:
    model = random_decoder(Shape(**REAL[name], vocab=1000, biases=biases), torch.bfloat16, "cuda")
    apart = in_parts(model)
    for rows in (1, 2, 8, 16):
        results = []
        for each in (model, apart):
            context = make_context(model, [70] * rows, seed=rows)
            step = _poisoned(ChainStep(each))
            step.attach(context.pages)
            results.append(_run(step, context))
        assert not results[0].isnan().any()
        assert torch.equal(*results), rows


@torch.inference_mode()
def test_closer_to_float32_than_hugging_face() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, initializer_range=0.05, eos_token_id=None,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 4000, (1, 24), device="cuda")
    theirs = model(ids).logits[0].float()
    exact = copy.deepcopy(model).float()(ids).logits[0]
    fuse_projections(model)
    bound = bind(model)
    sites = bound.sites
    bound.release()
    decoder = describe(model, sites, ModuleWeights(model), 64)
    step = ChainStep(decoder)
    size = 3, decoder.kv_heads, 16, decoder.head_dim
    step.attach(tuple(LayerPages(*torch.zeros(2, *size).cuda().bfloat16()) for _ in decoder.layers))
    table, slots = torch.tensor([[2, 1]], dtype=torch.int32).cuda(), torch.zeros(1, dtype=torch.int32).cuda()
    ours = torch.empty(24, 4000, dtype=torch.bfloat16, device="cuda")
    for position in range(24):
        step(ids[0, position : position + 1], torch.tensor([position]).cuda(), slots, table, ours[position][None])
    assert (ours.float() - exact).norm() <= (theirs - exact).norm()
