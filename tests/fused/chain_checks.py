"""The chain's Triton kernels against the float32 reference in Triton's interpreter; run by test_chain.py.

float32 and float16 only: the interpreter's `tl.dot` is wrong on bfloat16. Checks take a seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import families
import torch
from decoders import Context, Shape, Turns, in_parts, make_context, random_decoder, share_of
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hybridgen.cache import LayerPages
from hybridgen.fused import reference
from hybridgen.fused.chain.step import ChainStep
from hybridgen.fused.chain.tiles import PROJECTIONS, Tile
from hybridgen.models.binding import bind
from hybridgen.models.decoder import Decoder, Unfit, describe
from hybridgen.models.projections import fuse_projections
from hybridgen.models.share import Share
from hybridgen.models.weights import ModuleWeights


def poison(step: ChainStep) -> None:
    """Fill scratch with what must never be read; counters as an aborted launch may leave them."""
    for tensor in step.tensors().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 7)


def compare(
    model: Decoder, context: Context, tolerance: float, tiles: Mapping[str, list[int]] | None = None
) -> ChainStep:
    """One step by the chain and by the reference: logits, and every place of the cache."""
    step = ChainStep(model, max_rows=max(len(context.tokens), 9), tiles=tiles)
    poison(step)
    pages = context.copy_pages()
    table = context.block_table[context.slots.long()]
    expected = reference.step(model, pages, context.tokens, context.positions, table)
    step.attach(context.pages)
    out = torch.full(expected.shape, torch.nan, dtype=model.dtype)
    step(*context.args, out)
    error = float((out.float() - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise AssertionError(f"relative error {error} of the logits")
    for layer, (ours, theirs) in enumerate(zip(context.pages, pages, strict=True)):
        for name, a, b in zip(("keys", "values"), ours, theirs, strict=True):
            if not torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
                raise AssertionError(f"the {name} of layer {layer} differ")
    return step


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    pre_norms = draw(st.sampled_from([True, True, False]))
    return Shape(
        hidden=8 * draw(st.integers(3, 20)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 24, 64, 136])),
        intermediate=8 * draw(st.integers(3, 20)),
        vocab=draw(st.integers(17, 150)),
        layers=draw(st.integers(1, 2)),
        activation=draw(st.sampled_from(["silu", "gelu_tanh"])),
        biases=tuple(draw(st.sets(st.sampled_from(["qkv", "out", "gate_up", "down"])))),
        head_norm=draw(st.sampled_from(["", "head", "all"])),
        windows=tuple(draw(st.lists(st.sampled_from([0, 1, 2, 9, 64, 70]), min_size=1, max_size=2))),
        rotates=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=2))),
        post_norms=draw(st.booleans()) or not pre_norms,
        pre_norms=pre_norms,
        embedding_scale=draw(st.sampled_from([1.0, 8.0])),
        residual=draw(st.sampled_from([1.0, 0.3])),
        logits_scale=draw(st.sampled_from([1.0, 0.25])),
        attention_scale=draw(st.sampled_from([0.1, 0.5])),
        eps=draw(st.sampled_from([1e-6, 1e-2])),
        max_context=400,
    )


lengths = st.lists(st.sampled_from([0, 1, 7, 15, 16, 17, 63, 64, 65, 130, 191, 300]), min_size=1, max_size=16)
power = st.sampled_from([16, 32, 64])
tiles = st.tuples(
    power, power, st.sampled_from([1, 2, 4]), st.sampled_from([1, 4]), st.integers(1, 4), st.integers(0, 1)
)
slices = st.integers(1, 5)


def check_shapes(number: int, examples: int) -> None:
    """Any shape, rows, lengths, page size and tiles."""

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(shapes(), lengths, st.sampled_from([8, 16, 64, 128]), st.lists(tiles, min_size=5, max_size=5), slices)
    def run(shape: Shape, lengths: list[int], page_size: int, cuts: list[tuple[int, ...]], most: int) -> None:
        model = random_decoder(shape, seed=number)
        chosen = {}
        for name, cut in zip(PROJECTIONS, cuts, strict=True):
            features, inner, _ = ChainStep(model).shape(name)
            tile = Tile(*cut, 0)
            for count in range(most, 1, -1):
                sliced = tile._replace(slices=count)
                if -(-features // tile.features) <= -(-model.hidden // 16) and not sliced.leaves_slices_empty(inner):
                    tile = sliced
                    break
            chosen |= {f"{name}.{rows}": list(tile) for rows in (8, 16)}
        compare(model, make_context(model, lengths, page_size, seed=number), 2e-5, chosen)

    run()


def check_float16(number: int) -> None:
    """States that float16 cannot hold, and states of which it would keep few digits."""
    for gain in (1e-4, 1.0, 2e4):
        for post_norms in (False, True):
            shape = Shape(hidden=128, embedding_scale=30.0 * gain, post_norms=post_norms, layers=3)
            model = random_decoder(shape, torch.float16, seed=number)
            compare(model, make_context(model, [5, 0, 33], seed=number), 4e-3)


def check_merge(number: int) -> None:
    """Chunks of a long row among short ones, and of one row alone; the same again, bit for bit."""
    for positions in ([1500, 3, 0], [1500]):
        model = random_decoder(Shape(max_context=2048, heads=6, kv_heads=1), seed=number)
        context = make_context(model, positions, seed=number)
        step = compare(model, context, 2e-5)
        first, second = torch.empty(2, len(positions), model.vocab)
        step(*context.args, first)
        step(*context.args, second)
        if not torch.equal(first, second):
            raise AssertionError("a step gave other logits the second time")
        if step.tensors()["counters"][: len(positions)].any():
            raise AssertionError("a counter is not back at 0")


def check_parts(number: int) -> None:
    """Projections that lie apart give the same bits as joined ones: tiles across two or three parts, biases, slices."""
    for index, (biases, tile) in enumerate(
        (
            ((), [16, 16, 1, 4, 3, 0, 0]),
            (("qkv", "gate_up"), [64, 16, 2, 4, 3, 1, 0]),
            (("qkv",), [32, 16, 1, 4, 3, 0, 0, 2]),
        )
    ):
        shape = Shape(heads=5, kv_heads=1, head_dim=8, hidden=72, intermediate=40, biases=biases, head_norm="head")
        model = random_decoder(shape, seed=number)
        apart = in_parts(model)
        tiles = {f"{name}.8": tile for name in ("qkv", "gate_up")}
        results = []
        for each in (model, apart):
            context = make_context(model, [5, 0, 40], seed=number)
            step = ChainStep(each, max_rows=8, tiles=tiles)
            poison(step)
            step.attach(context.pages)
            out = torch.full((3, model.vocab), torch.nan)
            step(*context.args, out)
            results.append((out, *(part.nan_to_num() for layer in context.pages for part in layer)))
        if results[0][0].isnan().any() or not all(map(torch.equal, *results)):
            raise AssertionError(f"parts give other bits (case {index})")
        compare(apart, make_context(model, [5, 0, 40], seed=number), 2e-5)


def check_strangers(number: int) -> None:
    """A row's result does not depend on the others, not even on NaNs."""
    model = random_decoder(Shape(), seed=number)
    context = make_context(model, [5, 40, 17], seed=number)
    step = ChainStep(model)
    step.attach(context.pages)
    expected, out = torch.empty(2, 3, model.vocab)
    step(*context.args, expected)
    model.embedding[context.tokens[1]] = torch.nan
    poison(step)
    step(*context.args, out)
    if not (torch.equal(out[0], expected[0]) and torch.equal(out[2], expected[2]) and out[1].isnan().all()):
        raise AssertionError("a row of NaNs changed another row")


def check_families(number: int) -> None:
    """Every family that a `Decoder` describes."""
    served = []
    for name in families.FAMILIES:
        model = families.build(name, **families.depth(name))
        fuse_projections(model)
        bound = bind(model)
        sites = bound.sites
        bound.release()
        try:
            decoder = describe(model, sites, ModuleWeights(model), 128)
            reference.check(model, decoder)
        except Unfit:
            continue
        compare(decoder, make_context(decoder, [5, 33, 0], seed=number), 5e-5)
        served.append(name)
    if not {"llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3"} <= set(served):
        raise AssertionError(f"only {served} were served")


def check_ranks(number: int) -> None:
    """Two ranks' shares, whose sums meet, give what the whole model gives: logits, and the cache of its heads."""
    for post_norms, adds in ((False, False), (False, True), (True, True)):
        shape = Shape(heads=4, kv_heads=2, biases=("qkv", "gate_up"), post_norms=post_norms, residual=0.5)
        model = random_decoder(shape, seed=number)
        context = make_context(model, [5, 0, 40], seed=number)
        pages = context.copy_pages()
        table = context.block_table[context.slots.long()]
        expected = reference.step(model, pages, context.tokens, context.positions, table)
        found: dict[int, list[torch.Tensor]] = {}

        def rank(
            share: Share,
            model: Decoder = model,
            context: Context = context,
            found: dict[int, list[torch.Tensor]] = found,
        ) -> None:
            part = share_of(model, share)
            heads = slice(share.rank * part.kv_heads, (share.rank + 1) * part.kv_heads)
            cached = tuple(LayerPages(*(each[:, heads].contiguous() for each in layer)) for layer in context.pages)
            copied = tuple(LayerPages(*(each.clone() for each in layer)) for layer in cached)
            table = context.block_table[context.slots.long()]
            plain = reference.step(part, copied, context.tokens, context.positions, table)
            step = ChainStep(part, max_rows=4)
            poison(step)
            step.attach(cached)
            out = torch.full((len(context.tokens), part.vocab), torch.nan, dtype=part.dtype)
            step(*context.args, out)
            found[share.rank] = [plain, share.gather(out), *(each for layer in cached for each in layer)]

        turns = Turns(2, adds)
        turns.run(rank)
        # Of each layer two sums; of the reference and of the chain; and the logits of both.
        if turns.calls != 2 * (2 * 2 * len(model.layers) + 2):
            raise AssertionError(f"{turns.calls} sums and gathers")
        for which in range(2):
            for logits in found[which][:2]:
                error = float((logits - expected).norm() / expected.norm())
                if not error <= 2e-5:
                    raise AssertionError(f"relative error {error} of the logits on rank {which}")
            heads = slice(which, which + 1)
            for ours, theirs in zip(found[which][2:], (each for layer in pages for each in layer), strict=True):
                if not torch.allclose(ours, theirs[:, heads], rtol=2e-5, atol=2e-5, equal_nan=True):
                    raise AssertionError(f"the cache of rank {which} differs")
