"""The chain of Triton kernels where there is no GPU: in the interpreter, and what the host decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from decoders import Shape, Turns, make_context, random_decoder, share_of
from hypothesis import given
from hypothesis import strategies as st
from interpreter import Interpreter

pytest.importorskip("triton")

from hybridgen.cache import LayerPages
from hybridgen.fused.chain.attention import cut_contexts, least_tiles
from hybridgen.fused.chain.step import ChainStep
from hybridgen.fused.chain.tiles import PROJECTIONS, Tile, as_tiles, candidates, default_tile, variants
from hybridgen.models.decoder import Linear, Unfit, dense
from hybridgen.models.share import Share
from hybridgen.models.weights import DenseWeight


@pytest.mark.parametrize("examples", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_any_shape_in_the_interpreter(examples: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("chain_checks.py"), "check_shapes", 0, examples)


@pytest.mark.parametrize("check", ["float16", "merge", "strangers", "families", "parts", "ranks"])
def test_kernels_in_the_interpreter(check: str, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("chain_checks.py"), f"check_{check}", 0)


@given(
    rows=st.integers(1, 16),
    kv_heads=st.sampled_from([1, 2, 8, 32]),
    head_dim=st.sampled_from([64, 128, 256]),
    max_tiles=st.integers(1, 4100),
    processors=st.sampled_from([4, 108, 132]),
    data=st.data(),
)
def test_a_rows_chunks_fit_their_scratch(
    rows: int, kv_heads: int, head_dim: int, max_tiles: int, processors: int, data: st.DataObject
) -> None:
    cut = cut_contexts(rows, kv_heads, head_dim, max_tiles, processors)
    tiles = data.draw(st.integers(0, max_tiles))
    # As the kernel's _chunks_of does.
    per = max(min(-(-tiles // cut.splits), cut.chunk_tiles), least_tiles(head_dim))
    per = max(1, -(-tiles // max(1, min(-(-tiles // per), cut.row_chunks))))
    chunks = max(1, -(-tiles // per))
    assert chunks <= cut.row_chunks
    assert (chunks - 1) * per < max(tiles, 1) <= chunks * per
    assert chunks == 1 or per >= least_tiles(head_dim) // 2
    assert cut.row_chunks == 1 or rows * kv_heads * cut.row_chunks <= 8 * processors + rows * kv_heads


def test_what_is_prepared_is_what_a_step_launches() -> None:
    model = random_decoder(Shape(windows=(0, 32)))
    step = ChainStep(model, max_rows=16)
    context = make_context(model, [5])
    step.attach(context.pages)
    for tensor in step.tensors().values():
        tensor.fill_(7)
    prepared = {rows: len(step.prepare([rows], 4)) for rows in (2, 8, 16)}
    # The embedding; five projections, of which the first layer's reads what the embedding handed on; attention with a
    # window and without.
    assert prepared == {2: 9, 8: 9, 16: 9}
    # Only the projections differ between up to 8 rows and more.
    assert len(step.prepare([2, 8, 16], 4)) == 9 + 6
    assert all(bool((tensor == 7).all()) for tensor in step.tensors().values())
    assert len(step._launchers) == 0


SHAPES = [  # features, inner, gated
    (3072, 2048, False),
    (2048, 8192, False),
    (14336, 4096, True),
    (4096, 14336, False),
    (128256, 4096, False),
    (32000, 4096, False),
    (64, 24, True),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 16])
def test_candidates_can_be_used(shape: tuple[int, int, bool], rows: int) -> None:
    features, inner, gated = shape
    found = candidates(features, inner, gated, rows, 2, 132, 300)
    assert found[0] == default_tile(features, inner, gated, rows, 132)
    for tile in found:
        others = variants(tile, inner)
        assert tile not in others
        assert not tile.leaves_slices_empty(inner)
        for each in (tile, *others):
            as_tiles({"head.8": each})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared_memory", [48 * 1024, 99 * 1024, 227 * 1024])
def test_default_tiles_fit_every_device(shape: tuple[int, int, bool], shared_memory: int) -> None:
    for rows in (8, 16):
        tile = default_tile(*shape, rows, 132)
        fitted = tile.fitted(rows, shape[2], 2, shared_memory)
        assert fitted.shared_bytes(rows, shape[2], 2) <= shared_memory
        assert fitted == tile or shared_memory < 227 * 1024
        as_tiles({"head.8": fitted})


def test_tiles_are_checked_and_reloaded() -> None:
    step = ChainStep(random_decoder(Shape()), tiles={"out.8": [32, 16, 2, 4, 3, 0, 2]})
    assert step.tiles["out.8"] == Tile(32, 16, 2, 4, 3, 0, 2)
    assert set(step.tiles) == {f"{name}.{rows}" for name in PROJECTIONS for rows in (8, 16)}
    # What was tuned for more rows than this step takes is of no use to it, and no error.
    again = ChainStep(random_decoder(Shape()), max_rows=8, tiles=step.tiles)
    assert again.tiles == {key: tile for key, tile in step.tiles.items() if key.endswith(".8")}
    for wrong in (
        {"head": [16, 16, 1, 4, 3, 0, 0]},
        {"head.4": [16, 16, 1, 4, 3, 0, 0]},
        {"head.8": [16, 16, 1]},
        {"head.8": [8, 16, 1, 4, 3, 0, 0]},
        {"head.8": [16, 48, 1, 4, 3, 0, 0]},
        {"head.8": [16, 16, 1, 4, 0, 0, 0]},
        {"head.8": [16, 16, 1, 4, 3, 2, 0]},
        {"head.8": [16, 16, 1, 4, 3, 1, 0, 0]},
        {"head.8": [16, 16, 4, 4, 3, 1, 0, 2]},
    ):
        with pytest.raises(ValueError, match="head"):
            ChainStep(random_decoder(Shape()), tiles=wrong)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden": 68}, "hidden size 68"),
        ({"intermediate": 98}, "intermediate size 98"),
        ({"attention_scale": 0.0}, "attention scale"),
        ({"activation": "relu"}, "activation"),
        ({"head_dim": 264}, "head size 264"),
    ],
)
def test_a_model_that_does_not_fit(change: dict[str, object], reason: str) -> None:
    model = random_decoder(Shape(**change), torch.float16)  # type: ignore[arg-type]
    with pytest.raises(Unfit, match=reason):
        ChainStep(model)


def test_a_weight_that_starts_anywhere() -> None:
    model = random_decoder(Shape())
    weight = dense(model.head)
    head = Linear(DenseWeight(torch.empty(weight.numel() + 1)[1:].view_as(weight)))
    with pytest.raises(Unfit, match="16 bytes"):
        ChainStep(dataclasses.replace(model, head=head))


def test_sums_whose_biases_each_rank_would_add_are_left_to_others() -> None:
    def build(share: Share) -> None:
        with pytest.raises(Unfit, match="biases, which each rank would add"):
            ChainStep(share_of(random_decoder(Shape(biases=("out",))), share))

    Turns(2).run(build)


def test_wrong_calls() -> None:
    model = random_decoder(Shape())
    context = make_context(model, [3, 4])
    for rows in (0, 17):
        with pytest.raises(ValueError, match="max_rows"):
            ChainStep(model, max_rows=rows)
    step = ChainStep(model, max_rows=1)
    with pytest.raises(ValueError, match="2 rows"):
        step(*context.args, torch.empty(2, model.vocab))
    step = ChainStep(model)
    with pytest.raises(ValueError, match="attach"):
        step(*context.args, torch.empty(2, model.vocab))
    for pages in (
        context.pages[:1],
        tuple(LayerPages(p.keys[:, :1], p.values[:, :1]) for p in context.pages),
        tuple(LayerPages(p.keys.half(), p.values.half()) for p in context.pages),
        tuple(LayerPages(*(part[:, :, :12].contiguous() for part in p)) for p in context.pages),
        tuple(LayerPages(*(part[:, :, :8] for part in p)) for p in context.pages),
    ):
        with pytest.raises(ValueError, match="page"):
            step.attach(pages)
    step.attach(context.pages)
    for out in (torch.empty(1, model.vocab), torch.empty(2, model.vocab).half(), torch.empty(model.vocab, 2).T):
        with pytest.raises(ValueError, match="out"):
            step(*context.args, out)
