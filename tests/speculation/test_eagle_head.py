"""EAGLE-3 heads: what they draft is what the paper describes, and whatever they draft changes no token."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from draft_cases import GREEDY, KINDS, PROMPTS, Streams, check_counts, check_equal, each, loaded
from eagle_heads import (
    COUNT,
    HIDDEN,
    LAYERS,
    Reference,
    counting_head,
    counting_model,
    random_head,
    target,
    write_authors,
    write_specforge,
    write_speculators,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

import hybridgen
from hybridgen import Engine, SamplingParams
from hybridgen.execution.drafting import DraftCall, PrefillCall
from hybridgen.execution.executors import LayersExecutor
from hybridgen.execution.runner import ModelRunner
from hybridgen.graphs import recorder, stand_in
from hybridgen.loading import Checkpoint
from hybridgen.speculation.eagle import EagleDrafter

LAYOUTS = {"specforge": write_specforge, "authors": write_authors, "speculators": write_speculators}
IDS = "eagle_aux_hidden_state_layer_ids"
NUMBERS = [[token % COUNT for token in prompt] for prompt in PROMPTS[:9]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that counts, and a head that is right about it wherever it counts."""
    directory = tmp_path_factory.mktemp("counting")
    return counting_model(directory / "model"), write_specforge(directory / "head", counting_head())


@pytest.fixture(scope="module")
def counted(counting: tuple[Path, Path]) -> Streams:
    fewer = {"no_repeat_ngram_size": 2}, {}, {"stop_token_ids": list(range(0, COUNT, 3))}
    params = each(9, 40, [*KINDS[:-3], *(kind | less for kind, less in zip(KINDS[-3:], fewer, strict=True))])
    with loaded(counting[0]) as engine:
        return counting[0], params, engine.generate(NUMBERS, params)


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Each row's text and what the head drafted behind it, as it does."""
    seen = []
    draft = EagleDrafter.draft

    def noted(self: EagleDrafter, call: DraftCall) -> Tensor:
        made = draft(self, call)
        for slot, length, row in zip(call.slots.tolist(), call.lengths.tolist(), made.tolist(), strict=True):
            if slot < call.text.shape[0] - 1:
                seen.append((call.text[slot, :length].tolist(), row[: row.index(-1)] if -1 in row else row))
        return made

    monkeypatch.setattr(EagleDrafter, "draft", noted)
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_drafts_what_the_paper_describes(
    layout: str, model: Path, tmp_path: Path, drafts: list[tuple[list[int], list[int]]]
) -> None:
    """Prompts in chunks, packed with others, over page borders, and steps that accept nothing: each draft is that of a
    head that reads the whole text at once."""
    tensors = random_head()
    head = LAYOUTS[layout](tmp_path / "head", tensors)
    prompts = PROMPTS[:4] + PROMPTS[6:7]
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
    with loaded(model) as engine:
        expected = engine.generate(prompts, **options)
    with loaded(model, drafter=head, allow_pickle=layout == "authors") as engine:
        check_equal(engine.generate(prompts, **options), expected)
        stats = engine.stats().speculation
    assert stats.drafter == str(head)
    assert stats.drafted > 150
    reference = Reference(model, tensors, norm_before_residual=layout == "speculators")
    assert len(drafts) > 80
    for text, found in drafts:
        assert found == reference.drafts(text, 3)[: len(found)]


def test_accepted_drafts_leave_what_the_paper_describes(
    counting: tuple[Path, Path], tmp_path: Path, drafts: list[tuple[list[int], list[int]]]
) -> None:
    """Some are right, some are not: what the next ones go by is that of the text. Its attention adds a little."""
    tensors = counting_head()
    tensors["midlayer.self_attn.o_proj.weight"] = random_head()["midlayer.self_attn.o_proj.weight"] * 0.12
    head = write_specforge(tmp_path / "head", tensors)
    with loaded(counting[0], drafter=head) as engine:
        for options in (GREEDY, {"temperature": 0.8, "seed": 1}):
            engine.generate(NUMBERS[:3], max_new_tokens=40, ignore_eos=True, **options)
        stats = engine.stats().speculation
    assert 0.2 < stats.accepted / stats.drafted < 0.95
    reference = Reference(counting[0], tensors)
    greedy = drafts[: len(drafts) // 3]
    for text, found in greedy:
        assert found == reference.drafts(text, 3)[: len(found)]


def test_one_that_is_right_brings_four_tokens_a_step(counting: tuple[Path, Path]) -> None:
    path, head = counting
    with loaded(path) as engine:
        expected = engine.generate(NUMBERS[:3], max_new_tokens=29, temperature=0, ignore_eos=True)
    counted = [(out.token_ids[0] + i) % COUNT for out in expected for i in range(29)]
    assert [token for out in expected for token in out.token_ids] == counted
    whole = write_specforge(head.parent / "whole", counting_head(left_out=()))
    with loaded(path, drafter=whole) as engine:
        found = engine.generate(NUMBERS[:3], max_new_tokens=29, temperature=0, ignore_eos=True)
        assert engine.stats().speculation.tokens_per_step == 4
    check_equal(found, expected)
    assert [out.accepted_tokens for out in found] == [21, 21, 21]  # 29 tokens: one of the prefill, 7 steps of 4
    with loaded(path, drafter=head) as engine:  # two numbers it cannot say
        found = engine.generate(NUMBERS[:3], max_new_tokens=64, temperature=0, ignore_eos=True)
        assert 2.5 < engine.stats().speculation.tokens_per_step < 4
    assert [out.token_ids[:29] for out in found] == [out.token_ids for out in expected]


@pytest.mark.parametrize(
    ("mode", "run_ahead"), [("eager", 1), ("jit", 0), ("graph", 1), pytest.param("hybrid", 0, marks=pytest.mark.slow)]
)
def test_every_mode(
    mode: str, run_ahead: int, counting: tuple[Path, Path], counted: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled, with penalties, bans and log-probabilities; prompts in chunks beside it."""
    path, params, expected = counted
    for module in (stand_in, recorder):  # or drafts may not be worth their time here
        monkeypatch.setattr(module, "median_seconds", lambda *_: 1.0)
    with loaded(path, mode, drafter=counting[1], run_ahead=run_ahead) as engine:
        for count in (1, 3, 9):
            engine.generate(NUMBERS[:count], params[:count])
            while engine.record_missing():
                pass
            found = engine.generate(NUMBERS[:count], params[:count])
            check_equal(found, expected[:count])
            check_counts(found)
        stats = engine.stats()
    assert found[0].accepted_tokens > 20
    assert sum(out.accepted_tokens for out in found[1:]) > 20
    assert stats.late_compiles == 0
    if mode in ("graph", "hybrid"):
        kinds = {(step.kind, step.reason) for step in found[0].steps if step.phase == "decode"}
        assert any(kind == "layers, stand-in" and "drafts a row" in reason for kind, reason in kinds), kinds


@pytest.mark.parametrize(
    "family", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "gpt2")), "gemma2"]
)
def test_models_of_other_families(family: str, tmp_path: Path) -> None:
    """Windows, experts, learned positions, an embedding that is scaled."""
    changes = {} if family == "gpt2" else {"num_hidden_layers": LAYERS}
    if "layer_types" in families.FAMILIES[family]:
        changes["layer_types"] = families.FAMILIES[family]["layer_types"][:2] * (LAYERS // 2)
    path = families.write(family, tmp_path, **changes)
    params = each(3, 12)
    with loaded(path) as engine:
        expected = engine.generate(PROMPTS[:3], params)
    head = write_specforge(tmp_path / "head", random_head(), eagle_config={IDS: [0, 1, 2]})
    with loaded(path, drafter=head) as engine:
        check_equal(engine.generate(PROMPTS[:3], params), expected)
        assert engine.stats().speculation.drafted > 0


@pytest.mark.parametrize(("drafter", "run_ahead"), [("head", 1), ("model", 0)])
def test_drafting_ends_where_it_costs_more_than_it_brings(
    drafter: str, run_ahead: int, counting: tuple[Path, Path], counted: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By measured times, as of a batch that is large; it begins again with new requests where times are others."""
    path, params, expected = counted
    times = {"quiet": 1.0, "checks": 5.0}

    def seconds(runner: Any, slots: tuple[int, ...], query_len: int, *, quiet: bool = False) -> float:
        return times["quiet" if quiet else "checks"] if quiet or query_len > 1 else 1.1

    monkeypatch.setattr(ModelRunner, "decode_seconds", seconds)
    with loaded(path, drafter=counting[1] if drafter == "head" else path, run_ahead=run_ahead) as engine:
        found = engine.generate(NUMBERS, params)
        check_equal(found, expected)
        assert {step.reason for step in found[0].steps if step.phase == "decode"} == {"mode eager, drafting pauses"}
        assert engine.stats().speculation.drafted == 0
        times["checks"] = 1.2
        found = engine.generate(NUMBERS, params)
        check_equal(found, expected)
        assert found[0].accepted_tokens > 20
        stream = engine.stream(NUMBERS[0], max_new_tokens=60, temperature=0, ignore_eos=True)
        tokens = []
        for place, event in enumerate(stream):  # in the middle of a request, which is drafted for behind that too
            times["checks"] = 9.0 if 20 <= place < 40 else 1.2
            tokens.append(event.token_id)
            ended = event.completion
    assert [(tokens[0] + i) % COUNT for i in range(60)] == tokens
    reasons = {step.reason: step.count for step in ended.steps if step.phase == "decode"}
    assert reasons["mode eager, drafting pauses"] > 9
    assert 15 < ended.accepted_tokens < 42


@pytest.mark.parametrize("slow", [False, True])
def test_a_slow_drafter_pauses_and_a_fast_one_does_not(
    slow: bool, counting: tuple[Path, Path], counted: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what recorded steps really take. Of right drafts 3.7 tokens a step are hoped for at most: a model's step of
    20 ms is worth drafts that take nothing beside it, and none that take 200."""
    path, _, expected = counted
    few = SamplingParams(max_new_tokens=16, temperature=0, ignore_eos=True)
    run, draft = LayersExecutor.logits, EagleDrafter.draft

    def logits(self: LayersExecutor, *args: Any) -> Tensor:
        time.sleep(0.02)
        return run(self, *args)

    def drafted(self: EagleDrafter, call: DraftCall) -> Tensor:
        time.sleep(0.2 if slow else 0)
        return draft(self, call)

    monkeypatch.setattr(LayersExecutor, "logits", logits)
    monkeypatch.setattr(EagleDrafter, "draft", drafted)
    with loaded(path, "graph", drafter=counting[1], decode_buckets=[1], prefill_buckets=[]) as engine:
        for _ in range(2):
            found = engine.generate(NUMBERS[0], few)
            while engine.record_missing():
                pass
        before = engine.stats().speculation.drafted
        found = engine.generate(NUMBERS[0], few)
        after = engine.stats().speculation.drafted
    assert found.token_ids == expected[0].token_ids[:16]
    assert (after == before) == slow
    paused = [step.count for step in found.steps if "drafting pauses" in step.reason]
    assert sum(paused) == (15 if slow else 0)


def test_a_head_in_fp8(counting: tuple[Path, Path], counted: Streams) -> None:
    """Its drafts may be others, no token is."""
    path, params, expected = counted
    with loaded(path, drafter=counting[1]) as engine:
        whole = engine.stats().speculation.weight_bytes
    with loaded(path, drafter=counting[1], quantize_drafter="fp8") as engine:
        found = engine.generate(NUMBERS[:9], params)
        stats = engine.stats().speculation
    check_equal(found, expected)
    assert found[0].accepted_tokens > 20
    assert stats.weight_bytes < 0.4 * whole
    with pytest.raises(hybridgen.ConfigError, match=r"quantize_drafter='int4': .* is a head"):
        Engine.load(path, mode="eager", drafter=counting[1], quantize_drafter="int4", max_context=64)


def test_equal_bits_is_refused_on_a_cpu(counting: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "load", lambda _: pytest.fail("weights are read"))
    settings: dict[str, Any] = {"mode": "hybrid", "max_batch": 4, "max_context": 64, "compile_cache": False}
    with pytest.raises(hybridgen.DeviceError, match="equal_bits=True needs CUDA"):
        Engine.load(counting[0], drafter=counting[1], equal_bits=True, device="cpu", **settings)


def test_cancelled_beside_others_and_a_slot_that_is_used_again(counting: tuple[Path, Path], counted: Streams) -> None:
    path, params, expected = counted
    with loaded(path, drafter=counting[1], max_batch=3, run_ahead=1) as engine:
        stream = engine.stream(NUMBERS[1], max_new_tokens=100, temperature=0, ignore_eos=True)
        for _ in range(7):
            next(stream)
        stream.close()
        check_equal(engine.generate(NUMBERS, params), expected)


def test_prefixes_that_are_cached_and_pages_given_back(counting: tuple[Path, Path]) -> None:
    path, head = counting
    text = [i % COUNT for i in range(50)]
    prompts = [text, [*text[:33], 7, 8], text]
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
    with loaded(path) as engine:
        expected = engine.generate(prompts, **options)
    with loaded(path, drafter=head) as engine:
        check_equal(engine.generate(prompts, **options), expected)
        engine.release_cache()
        engine.resume()
        found = engine.generate(prompts, **options)
        again = engine.generate(prompts, **options)
        stats = engine.stats()
    check_equal(found, expected)
    check_equal(again, expected)
    assert all(out.cached_tokens for out in again)
    assert min(out.accepted_tokens for out in again) > 9
    tensors = sum(t.numel() * 4 for name, t in counting_head().items() if name not in ("d2t", "t2d"))
    assert stats.speculation.weight_bytes == tensors + 8 * (COUNT - 2) + 2 * 4 * (HIDDEN // 4 // 2)
    assert stats.speculation.cache_bytes * (LAYERS + 1) == stats.cache_bytes


def test_a_live_model_and_calls_that_score(counting: tuple[Path, Path], counted: Streams) -> None:
    """Its hidden states are those of the weights that it has then; prompts are scored beside it."""
    path, params, expected = counted
    live = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with loaded(live, drafter=counting[1]) as engine:
        check_equal(engine.generate(NUMBERS[:3], params[:3]), expected[:3])
        before = engine.hidden_states(NUMBERS[1], layers=[2])
        scores = engine.score(NUMBERS[1])
        with torch.no_grad():
            live.lm_head.weight.copy_(live.lm_head.weight.roll(1, dims=0))  # it counts in twos now
        found = engine.generate(NUMBERS[:3], max_new_tokens=9, temperature=0, ignore_eos=True)
        stats = engine.stats().speculation
    assert found[0].token_ids[1] == (found[0].token_ids[0] + 2) % COUNT
    assert stats.accepted > 0
    with loaded(path) as engine:
        assert torch.equal(engine.hidden_states(NUMBERS[1], layers=[2]), before)
        assert engine.score(NUMBERS[1]).logprobs == pytest.approx(scores.logprobs, abs=1e-5)


def test_functions_of_a_row_beside_it(counting: tuple[Path, Path]) -> None:
    """Steps with such a row end at the logits and check no drafts; the head has their hidden states all the same."""
    path, head = counting

    def no_repeats(ids: Any, logits: Any) -> Any:
        logits[ids] = -float("inf")
        return logits

    mixed = [
        SamplingParams(max_new_tokens=30, temperature=0, ignore_eos=True),
        SamplingParams(max_new_tokens=9, temperature=0, ignore_eos=True, logits_processors=[no_repeats]),
    ]
    with loaded(path) as engine:
        expected = engine.generate(NUMBERS[:2], mixed)
    for mode in ("eager", "graph"):
        with loaded(path, mode, drafter=head) as engine:
            for _ in range(2):
                found = engine.generate(NUMBERS[:2], mixed)
                while engine.record_missing():
                    pass
            check_equal(found, expected)
            assert found[1].drafted_tokens == 0
            if mode == "eager":
                assert found[0].accepted_tokens > 9


@pytest.mark.parametrize(
    ("fault", "mode"),
    [
        *((fault, "eager") for fault in ("prefill", "decode", "ids", "nan", "states")),
        ("decode", "graph"),
        *(pytest.param(fault, "graph", marks=pytest.mark.slow) for fault in ("prefill", "ids", "nan", "states")),
    ],
)
def test_a_fault_costs_drafts_and_no_token(
    fault: str,
    mode: str,
    counting: tuple[Path, Path],
    counted: Streams,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, params, expected = counted
    head = counting[1]
    calls: list[int] = []
    draft, follow = EagleDrafter.draft, EagleDrafter.follow

    def drafted(self: EagleDrafter, call: DraftCall) -> Tensor:
        calls.append(0)
        if fault == "decode" and len(calls) > 9:
            raise ArithmeticError("no idea")
        if fault == "states" and call.states is not None:
            call.states[:] = torch.nan
        made = draft(self, call)
        if fault == "ids":
            made[:, 1] = 10**9
        return made

    def followed(self: EagleDrafter, call: PrefillCall) -> None:
        if fault == "prefill":
            raise ArithmeticError("no idea")
        if fault == "states" and call.states is not None:
            call.states[:] = torch.nan
        follow(self, call)

    monkeypatch.setattr(EagleDrafter, "draft", drafted)
    monkeypatch.setattr(EagleDrafter, "follow", followed)
    if fault == "nan":
        tensors = counting_head()
        tensors["midlayer.mlp.down_proj.weight"][3, 5] = torch.nan
        head = write_specforge(tmp_path / "head", tensors)
    settings: dict[str, Any] = {"max_batch": 4, "page_size": 16, "kv_memory": "16MiB", "max_context": 192}
    if mode == "graph":
        settings |= {"decode_buckets": [4], "prefill_buckets": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Engine.load(path, mode=mode, drafter=head, **settings) as engine:
            for _ in range(2):
                check_equal(engine.generate(NUMBERS[:4], params[:4]), expected[:4])
            stats = engine.stats()
    [why] = [reason for reason in stats.fallbacks if "drafter" in reason]
    assert [str(warning.message) for warning in caught if warning.category is RuntimeWarning] == [why]
    if fault in ("prefill", "decode"):
        assert why == f"the drafter {head} raised ArithmeticError: no idea; steps run without drafts"
        assert stats.speculation.drafter == f"off: {why}"
    else:
        assert why == f"the drafter {head} gave logits that hold no number; they are dropped"
        assert stats.speculation.drafter == str(head)
    if fault in ("nan", "states"):
        assert stats.speculation.drafted == 0


def test_a_layer_that_is_not_called(model: Path, tmp_path: Path) -> None:
    """What the head would read is not there: it is not asked again."""
    head = write_specforge(tmp_path / "head", random_head())
    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings: dict[str, Any] = {"mode": "eager", "max_batch": 2, "page_size": 16, "kv_memory": "16MiB"}
    with Engine.load(live, drafter=head, max_context=192, **settings) as engine:
        bound = engine._runner.bound
        bound._noted._layers = (bound.layers[2], torch.nn.Identity(), bound.layers[3])
        with pytest.warns(RuntimeWarning, match="layer 3 of the model was not called"):
            assert engine.generate(PROMPTS[0], max_new_tokens=4).error is None
        assert "off: " in engine.stats().speculation.drafter


def _renamed(tensors: dict[str, Tensor], old: str, new: str | None) -> dict[str, Tensor]:
    value = tensors.pop(old)
    return tensors if new is None else tensors | {new: value}


@pytest.mark.parametrize(
    ("tensors", "changes", "error", "message"),
    [
        (lambda t: _renamed(t, "fc.weight", None), {}, "CheckpointError", "lacks fc.weight"),
        (lambda t: _renamed(t, "d2t", None), {}, "CheckpointError", "lacks d2t"),
        (
            lambda t: _renamed(t, "midlayer.mlp.up_proj.weight", "midlayer.mlp.up_proj.w"),
            {},
            "UnsupportedModelError",
            "tensors that hybridgen does not use: midlayer.mlp.up_proj.w",
        ),
        (
            lambda t: t | {"layers.0.hidden_norm.weight": torch.ones(HIDDEN)},
            {},
            "CheckpointError",
            "both .*hidden_norm.weight and .*hidden_norm.weight; one is due",
        ),
        (
            lambda t: t | {"fc.weight": torch.ones(HIDDEN, HIDDEN)},
            {},
            "CheckpointError",
            r"fc.weight is \[64, 64\], the config says \[64, 192\]",
        ),
        (lambda t: t | {"d2t": t["d2t"] - 9}, {}, "CheckpointError", "d2t .* 120 different ids from 0 to 256"),
        (lambda t: t | {"t2d": ~t["t2d"]}, {}, "CheckpointError", "d2t and t2d .* differ in 257 ids"),
        (dict, {"norm_output": True}, "UnsupportedModelError", "norm_output=True; hybridgen runs heads without it"),
        (dict, {"hidden_act": "gelu"}, "UnsupportedModelError", "hidden_act='gelu'; heads with silu run"),
        (dict, {"hidden_size": "64"}, "CheckpointError", "hidden_size='64'; a number above 0 is due"),
        (dict, {"num_hidden_layers": 2}, "UnsupportedModelError", "num_hidden_layers=2; heads of one layer run"),
        (dict, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "UnsupportedModelError", "'dynamic'"),
        (dict, {"architectures": ["EagleLlamaForCausalLM"]}, "UnsupportedModelError", "of the kind EagleLlama"),
        (
            dict,
            {"eagle_config": {IDS: [1, 2]}},
            "UnsupportedModelError",
            "reads 2 layers",
        ),
        (
            dict,
            {"eagle_config": {IDS: [1, 2, 5]}},
            "ConfigError",
            r"\(2, 3, 6\), .* has 6",
        ),
    ],
)
def test_heads_that_are_refused_before_weights_are_read(
    tensors: Any, changes: dict[str, Any], error: str, message: str, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    head = write_specforge(tmp_path / "head", tensors(random_head()), **changes)
    if "d2t does" not in message and "d2t and" not in message and "different" not in message:
        monkeypatch.setattr(Checkpoint, "load", lambda _: pytest.fail("weights are read"))
    with pytest.raises(getattr(hybridgen, error), match=message):
        Engine.load(model, mode="eager", drafter=head, max_context=64, compile_cache=False)


def test_a_head_for_another_model_is_refused(counting: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mode": "eager", "max_context": 64, "compile_cache": False}
    with pytest.raises(hybridgen.ConfigError, match=r"a head for a vocabulary of 64, and .* has 257"):
        Engine.load(model, drafter=counting[1], **settings)
    wide = target(tmp_path, hidden_size=128)
    head = write_specforge(tmp_path / "head", random_head())
    with pytest.raises(hybridgen.ConfigError, match=r"a head for hidden states of 64, and .* has 128"):
        Engine.load(wide, drafter=head, **settings)
    pickled = write_authors(tmp_path / "pickled", random_head())
    with pytest.raises(hybridgen.CheckpointError, match="set allow_pickle=True if you trust it"):
        Engine.load(model, drafter=pickled, **settings)
