"""The persistent kernel for several columns on a GPU, against the float32 reference, in every format of weights."""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from decoders import Shape, make_context, mixed_decoder, quantised_decoder, random_decoder
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.fused import reference
from hybridgen.kernels.attention.reference import as_bytes
from hybridgen.models.decoder import Decoder, Unfit

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    from hybridgen.fused.rows.shape import Tuning
    from hybridgen.fused.rows.step import RowsStep

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
BASE = Shape(hidden=1024, heads=16, kv_heads=4, head_dim=64, intermediate=2048, vocab=1000, max_context=2048)
BASE.attention_scale = 0.125
ALL = {"biases": ("qkv", "out", "gate_up", "down"), "head_norm": "head", "activation": "gelu_tanh"}
SCALED = {"embedding_scale": 12.0, "residual": 0.25, "logits_scale": 0.125, "rotates": (True, False)}
WINDOWS = {"windows": (0, 1, 100, 300), "layers": 4}
WIDE = {"hidden": 8192, "intermediate": 9216, "heads": 64, "kv_heads": 8, "head_dim": 128, "layers": 1}
LARGE = {"hidden": 4096, "intermediate": 5120, "heads": 32, "kv_heads": 8, "head_dim": 128, "layers": 1}
CASES: dict[str, tuple[dict[str, Any], torch.dtype, str, int, dict[str, int]]] = {
    "plain": ({}, torch.bfloat16, "bf16", 64, {}),
    "parts": (ALL, torch.bfloat16, "bf16", 16, {}),
    "scales": (SCALED, torch.bfloat16, "bf16", 256, {"unit_heads": 4}),
    "windows": (WINDOWS, torch.bfloat16, "bf16", 32, {"split": 128}),
    "windows, whole": ({**WINDOWS, "head_dim": 128, "heads": 8}, torch.bfloat16, "bf16", 8, {}),
    "float16": (ALL, torch.float16, "bf16", 64, {"split": 256}),
    "large": (LARGE, torch.bfloat16, "bf16", 64, {}),
    "no groups": ({"kv_heads": 16}, torch.bfloat16, "bf16", 64, {}),
    "fp8": ({**ALL, **SCALED}, torch.bfloat16, "fp8", 64, {"split": 256}),
    "fp8, float16": ({}, torch.float16, "fp8", 64, {}),
    "fp8 in blocks": (ALL, torch.bfloat16, "fp8-128-blocks", 64, {}),
    "fp8 in blocks, large": (LARGE, torch.bfloat16, "fp8-128-blocks", 64, {}),
    "int8": ({**ALL, **SCALED}, torch.bfloat16, "int8", 64, {}),
    "int8 in groups": (ALL, torch.bfloat16, "int8-128", 64, {}),
    "int8 in groups of 32": ({"hidden": 1536, "intermediate": 2304}, torch.float16, "int8-32", 64, {}),
    "int4": (ALL, torch.bfloat16, "int4", 64, {}),
    "cache of 8 bits": ({**ALL, **SCALED}, torch.bfloat16, "bf16-kv8", 64, {}),
    "cache of 8 bits, windows": (WINDOWS, torch.bfloat16, "bf16-kv8", 16, {"split": 128}),
    "cache of 8 bits, large": (LARGE, torch.bfloat16, "bf16-kv8", 32, {"split": 256}),
    "cache of 8 bits, whole": ({**WINDOWS, "head_dim": 128, "heads": 8}, torch.float16, "bf16-kv8", 8, {}),
    "cache of 8 bits, int4": (ALL, torch.bfloat16, "int4-kv8", 256, {}),
    "int4, large": (LARGE, torch.bfloat16, "int4", 64, {"piece": 1024}),
    "int4 in groups of 64": ({}, torch.bfloat16, "int4-64", 64, {}),
    "int4 in groups of 32": ({"hidden": 1536, "intermediate": 2304}, torch.float16, "int4-32", 64, {}),
    "int4 with zero points": (ALL, torch.bfloat16, "int4-zeros", 64, {}),
    "int4 with zero points, large": (LARGE, torch.bfloat16, "int4-zeros", 64, {"piece": 1024}),
    "int4, wide": (WIDE, torch.bfloat16, "int4", 64, {}),
    "int4 with zero points, wide": ({**WIDE, **ALL, "layers": 2}, torch.bfloat16, "int4-zeros", 64, {"split": 256}),
    "int4, between": (
        {"hidden": 5120, "intermediate": 6144, "heads": 40, "kv_heads": 8, "head_dim": 128},
        torch.float16,
        "int4",
        64,
        {},
    ),
    "mxfp4": (ALL, torch.bfloat16, "mxfp4", 64, {}),
    "mxfp4, large": (LARGE, torch.float16, "mxfp4", 64, {"piece": 1024}),
    "int4 beside dense": ({**ALL, "layers": 4}, torch.bfloat16, "int4+bf16", 64, {}),
    "int4 beside dense, float16": ({**ALL, **SCALED}, torch.float16, "int4+bf16", 64, {}),
    "int4 beside dense, large": ({**LARGE, "layers": 3}, torch.bfloat16, "int4-zeros+bf16", 64, {}),
    "fp8 beside dense": ({**ALL, **SCALED, "layers": 4}, torch.bfloat16, "fp8+bf16", 64, {"split": 256}),
    "int4 beside fp8": ({**ALL, "layers": 4}, torch.bfloat16, "int4+fp8", 64, {}),
    "attention in fp8": ({**ALL, "layers": 4}, torch.bfloat16, "int4/fp8", 64, {}),
    "attention in fp8, some dense": ({**ALL, "layers": 4}, torch.bfloat16, "int4/fp8+bf16", 64, {}),
    "mxfp4 beside dense": ({**ALL, "layers": 4}, torch.bfloat16, "mxfp4+bf16", 64, {}),
    "int4 with zero points in groups of 32": (
        {"hidden": 1536, "intermediate": 2304},
        torch.float16,
        "int4-32-zeros",
        64,
        {},
    ),
}
"""By name: changes of the shape, dtype, format, page size, tuning. `a/b` has b in attention's projections, `a+b` has
b in the first layer and in the down projection of the third."""
FORMS = [
    "bf16",
    "cache of 8 bits",
    "fp8",
    "fp8 in blocks",
    "int8",
    "int8 in groups",
    "int4",
    "int4 with zero points",
    "int4 with zero points, wide",
    "mxfp4",
    "int4 beside dense",
    "attention in fp8, some dense",
    "mxfp4 beside dense",
]
COLUMNS = {
    "one row": [700],
    "two rows": [0, 1],
    "eight rows": [3, 64, 1500, 700, 63, 0, 129, 1000],
    "five tokens": [(100, 5)],
    "eight tokens": [(1021, 8)],
    "a mix": [(299, 3), 64, (0, 2), 1500],
}
"""Lengths of the requests; with how many tokens each brings, one by default."""


@functools.cache
def _model(name: str) -> Decoder:
    changes, dtype, form, _, _ = CASES[name]
    first, _, ends = form.partition("+")
    usual, _, attention = first.partition("/")
    model = _quantised(name, changes, dtype, usual)
    if attention:
        other = _quantised(name, changes, dtype, attention)
        model = mixed_decoder(model, other, lambda _, part: part in ("qkv", "out"))
    if ends:
        other = _quantised(name, changes, dtype, ends)
        model = mixed_decoder(model, other, lambda index, part: index == 0 or (part == "down" and index == 2))
    return model


def _quantised(name: str, changes: dict[str, Any], dtype: torch.dtype, form: str) -> Decoder:
    model = random_decoder(dataclasses.replace(BASE, **changes), dtype, "cuda")
    kind, *more = form.split("-")
    group = next((int(each) for each in more if each.isdigit()), 0)
    of_a_block = 128 if "blocks" in more else 1
    if kind == "bf16":
        return model
    head = "int8" if name == "int8" else "fp8"
    return quantised_decoder(model, kind, group, head, "zeros" in more, of_a_block)


_codes: dict[str, Future[bytes]] = {}
_pool = ThreadPoolExecutor(8)


def _kept(key: str, make: Any) -> bytes:
    if key not in _codes:
        _codes[key] = _pool.submit(make)
    return _codes[key].result()


def _cache(name: str) -> torch.dtype | None:
    return torch.float8_e4m3fn if "kv8" in CASES.get(name, CASES["plain"])[2] else None


class Run:
    """A step with a cache in which places are no numbers until they are written."""

    def __init__(
        self, model: Decoder, lengths: list[Any], page_size: int, cache: torch.dtype | None = None, **options: Any
    ) -> None:
        self.model = model
        # In 8 bits a last bit is 6 to 12 %, and a token that sees itself alone has it in its logits.
        self.close = 2e-2 if cache is None else 5e-2  # of what is written
        self.limit = TOLERANCE[model.dtype] if cache is None else 5e-2  # of logits
        pairs = [length if isinstance(length, tuple) else (length, 1) for length in lengths]
        context = make_context(model, [length + count - 1 for length, count in pairs], page_size, len(lengths), cache)
        self.pages, self.table = context.pages, context.block_table
        slots = context.slots.tolist()
        columns = [(slot, length + i) for slot, (length, count) in zip(slots, pairs, strict=True) for i in range(count)]
        self.slots = torch.tensor([slot for slot, _ in columns], dtype=torch.int32, device="cuda")
        self.positions = torch.tensor([position for _, position in columns], device="cuda")
        self.ids = torch.randint(0, model.vocab, (len(columns),), device="cuda")
        for slot, (length, count) in zip(slots, pairs, strict=True):
            for position in range(length, length + count - 1):  # are fed by this step
                page = int(self.table[slot, position // page_size])
                for part in (part for layer in self.pages for part in layer):
                    as_bytes(part)[page, :, position % page_size] = 0x7F if cache else torch.nan
        self.step = RowsStep(model, self.pages, block_table=self.table, kept=_kept, **options)

    def __call__(self) -> Tensor:
        return self.step(self.ids, self.positions, self.slots)

    def check(self) -> Tensor:
        """Compare with the reference: logits, and what is written to the cache. Returns the logits."""
        pages = tuple(LayerPages(layer.keys.clone(), layer.values.clone()) for layer in self.pages)
        expected = reference.step(self.model, pages, self.ids, self.positions, self.table[self.slots.long()])
        self.step.logits.fill_(torch.nan)
        logits = self()
        torch.cuda.synchronize()
        assert not self.step.faulted
        errors = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(errors.max()) < self.limit, errors
        for ours, theirs in zip(self.pages, pages, strict=True):
            for actual, wanted in zip(ours, theirs, strict=True):
                actual, wanted = actual.float(), wanted.float()
                written = ~wanted.isnan()
                assert torch.equal(actual.isnan(), ~written)
                assert (actual - wanted)[written].norm() <= self.close * wanted[written].norm()
        return logits.clone()


@pytest.mark.parametrize("name", CASES)
def test_columns_of_every_kind(name: str) -> None:
    _, _, _, page_size, tuning = CASES[name]
    for columns in COLUMNS.values():
        Run(_model(name), columns, page_size, _cache(name), tuning=Tuning(**tuning)).check()


def test_contexts_of_every_length() -> None:
    """Splits, and those who put them together, up to 131,072 positions; beside short ones, and with drafts."""
    shape = {"layers": 1, "kv_heads": 2, "max_context": 2**17}
    for form in ("bf16", "fp8", "int4", "cache of 8 bits"):
        model = random_decoder(dataclasses.replace(BASE, **shape), torch.bfloat16, "cuda")
        if form in ("fp8", "int4"):
            model = quantised_decoder(model, form)
        for columns in ([2**17 - 1], [1, 4095, 4096, 65_535, 40_000], [(100_000, 4), 7, (4094, 3)]):
            run = Run(model, columns, 64, _cache(form))
            together = run.check()
            for index in range(len(run.ids)):
                one = slice(index, index + 1)
                assert torch.equal(run.step(run.ids[one], run.positions[one], run.slots[one])[0], together[index])


@pytest.mark.parametrize("form", FORMS)
def test_a_column_has_the_same_bits_in_any_company(form: str) -> None:
    run = Run(
        _model({"bf16": "plain"}.get(form, form)), COLUMNS["eight rows"], 64, _cache(form), tuning=Tuning(split=256)
    )
    together = run.check()
    for columns in ([0], [3, 1], [7, 2, 5], [6, 5, 4, 3, 2, 1, 0]):
        index = torch.tensor(columns, device="cuda")
        alone = run.step(run.ids[index], run.positions[index], run.slots[index])
        assert torch.equal(alone, together[index])


@pytest.mark.parametrize("form", FORMS)
def test_a_token_has_the_same_bits_as_a_draft_and_as_a_row(form: str) -> None:
    run = Run(
        _model({"bf16": "plain"}.get(form, form)), COLUMNS["eight tokens"], 64, _cache(form), tuning=Tuning(split=256)
    )
    together = run.check()
    for index in range(len(run.ids)):  # one after the other, each with what the ones before it left in the cache
        one = slice(index, index + 1)
        assert torch.equal(run.step(run.ids[one], run.positions[one], run.slots[one])[0], together[index])


@pytest.mark.parametrize("columns", ["eight rows", "eight tokens", "a mix"])
@pytest.mark.parametrize("form", FORMS)
def test_replays_repeat_bit_for_bit(form: str, columns: str) -> None:
    run = Run(_model({"bf16": "plain"}.get(form, form)), COLUMNS[columns], 64, _cache(form), tuning=Tuning(split=256))
    first = run().clone().view(torch.int16)
    different = torch.zeros(1, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        different += (run().view(torch.int16) != first).any()
    for _ in range(2000):
        graph.replay()
    assert int(different) == 0


@pytest.mark.parametrize("columns", ["one row", "eight rows", "a mix"])
@pytest.mark.parametrize("name", ["scales", "float16", "int4"])
def test_what_goes_into_layers_is_left(name: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For who drafts; a layer may be asked for twice. The logits have the same bits without."""
    model, inputs = _model(name), []
    project = reference.queries_keys_values

    def noted(model: Decoder, layer: Any, x: Tensor, positions: Tensor) -> Any:
        inputs.append(x)
        return project(model, layer, x, positions)

    monkeypatch.setattr(reference, "queries_keys_values", noted)
    reads = (0, len(model.layers) - 1, len(model.layers) - 1)
    run = Run(model, COLUMNS[columns], 64, reads=reads)
    run.step.states.fill_(torch.nan)
    logits = run.check()
    expected = torch.cat([inputs[layer] for layer in reads], dim=-1)
    found = run.step.states[: len(run.ids)].float()
    assert run.step.states[len(run.ids) :].isnan().all()
    assert (found - expected).norm() < TOLERANCE[model.dtype] * expected.norm()
    plain = RowsStep(model, run.pages, block_table=run.table, kept=_kept)
    assert torch.equal(plain(run.ids, run.positions, run.slots), logits)


def test_the_watchdog_ends_a_step_that_waits_in_vain() -> None:
    run = Run(_model("plain"), [100, 7], 64, patience=2000)
    good = run().clone()
    torch.cuda.synchronize()
    run.step.counters[2 * 32] = -100_000  # arrivals that never come
    logits = run()
    torch.cuda.synchronize()
    assert run.step.faulted
    assert logits.isnan().any()
    run()  # what was launched behind it ends too
    torch.cuda.synchronize()
    run.step.repair()
    again = run()
    torch.cuda.synchronize()
    assert not run.step.faulted
    assert torch.equal(again, good)


def test_what_it_does_not_serve_is_said() -> None:
    model = _model("plain")
    context = make_context(model, [3])
    with pytest.raises(Unfit, match="is no multiple of 256"):
        RowsStep(dataclasses.replace(model, intermediate=2056), context.pages, block_table=context.block_table)
