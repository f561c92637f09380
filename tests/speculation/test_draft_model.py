"""A smaller model that drafts: it changes no token, follows what requests do, and is refused where it cannot draft."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from draft_cases import GREEDY, PROMPTS, Streams, check_counts, check_equal, each, loaded
from transformers import PreTrainedModel

import hybridgen
from hybridgen import Engine, SamplingParams
from hybridgen.demo import model_path
from hybridgen.graphs import recorder, stand_in
from hybridgen.loading import Checkpoint


def alike(family: str = "llama", far: float = 0.003, **changes: Any) -> PreTrainedModel:
    """The family's tiny model with other weights, so near that some of its drafts are right."""
    model = families.build(family, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * far)
    return model


def share(engine: Engine) -> float:
    """Of the drafts that were checked, those that were right."""
    stats = engine.stats().speculation
    return stats.accepted / stats.drafted


@pytest.mark.parametrize(
    ("mode", "run_ahead"), [("eager", 1), ("jit", 0), ("graph", 1), pytest.param("hybrid", 0, marks=pytest.mark.slow)]
)
def test_every_mode(mode: str, run_ahead: int, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled, with penalties and bans; prompts in chunks beside it."""
    path, params, expected = streams
    for module in (stand_in, recorder):  # or drafts may not be worth their time here
        monkeypatch.setattr(module, "median_seconds", lambda *_: 1.0)
    with loaded(path, mode, drafter=alike(num_hidden_layers=2), run_ahead=run_ahead) as engine:
        for count in (1, 9):
            engine.generate(PROMPTS[:count], params[:count])
            while engine.record_missing():
                pass
            found = engine.generate(PROMPTS[:count], params[:count])
            check_equal(found, expected[:count])
            check_counts(found)
        assert 0.2 < share(engine) < 0.9
        assert found[0].drafted_tokens > 0 < found[1].drafted_tokens
        assert engine.stats().late_compiles == 0


def test_the_model_itself_is_always_right(streams: Streams) -> None:
    """So its keys and values are those of the text: behind prefill in chunks, accepted drafts, and cached pages. And
    it chooses as the requests do, whatever they ask for."""
    path, params, expected = streams
    with loaded(path, drafter=path) as engine:
        found = engine.generate(PROMPTS, params)
        check_equal(found, expected)
        for completion, wanted in zip(found, params, strict=True):
            if not wanted.stop_token_ids:  # 40 tokens: one of the prefill, 9 steps of 4, and 3 in one or two more
                assert completion.accepted_tokens == 29 == completion.drafted_tokens
        longer = [completion.prompt_token_ids + completion.token_ids for completion in found[:4]]
        again = engine.generate(longer, max_new_tokens=21, temperature=0, ignore_eos=True)
        assert all(completion.cached_tokens for completion in again)
        assert [completion.accepted_tokens for completion in again] == [15] * 4
    with loaded(path) as engine:
        check_equal(again, engine.generate(longer, max_new_tokens=21, temperature=0, ignore_eos=True))


@pytest.mark.parametrize(
    ("family", "drafter"), [("gpt2", "llama"), ("llama", "gpt2"), ("gemma2", "mistral"), ("qwen3_moe", "gpt_oss")]
)
def test_a_drafter_of_another_family(family: str, drafter: str, tmp_path: Path) -> None:
    """Other heads, positions, windows and vocabularies that are padded to another size."""
    path = families.write(family, tmp_path, **families.depth(family))
    params = each(5, 20)
    with loaded(path) as engine:
        expected = engine.generate(PROMPTS[:5], params)
    with loaded(path, drafter=families.build(drafter, **families.depth(drafter))) as engine:
        check_equal(engine.generate(PROMPTS[:5], params), expected)
        assert engine.stats().speculation.drafted > 0


@pytest.mark.parametrize(("drafter", "in_turn"), [("mistral", True), ("llama", False)])
def test_pages_in_turn(drafter: str, in_turn: bool, tmp_path: Path) -> None:
    """Where both see a window alone, a request does with a few pages; a drafter that sees everything needs all."""
    path = families.write("mistral", tmp_path, sliding_window=7, num_hidden_layers=2)
    settings: dict[str, Any] = {"page_size": 8, "token_budget": 2, "max_batch": 3, "prefix_cache": False}
    params = each(3, 60, [GREEDY, {"temperature": 1.0}])
    with loaded(path, **settings) as engine:
        expected = engine.generate(PROMPTS[:3], params)
    page = 2 * 8 * 2 * 2 * 2 * 16 * 4  # of two models: keys and values, 2 layers, 2 heads of 16, float32
    model = alike(drafter, num_hidden_layers=2, **({"sliding_window": 7} if in_turn else {}))
    with loaded(path, **settings, kv_memory=15 * page, drafter=model) as engine:
        assert engine.stats().pages == 14  # the first takes 9 of them, and the others, of 13 and 8, a few in turn
        assert engine._loop.scheduler.pages.ring_pages == (2 if in_turn else None)
        check_equal(engine.generate(PROMPTS[:3], params), expected)
        assert engine.stats().speculation.accepted > 0


def test_cancelled_beside_others_and_a_slot_that_is_used_again(streams: Streams) -> None:
    path, params, expected = streams
    with loaded(path, drafter=path, max_batch=3, run_ahead=1) as engine:
        stream = engine.stream(PROMPTS[1], max_new_tokens=100, temperature=0, ignore_eos=True)
        for _ in range(7):
            next(stream)
        stream.close()
        check_equal(engine.generate(PROMPTS[:8], params[:8]), expected[:8])
        assert share(engine) > 0.97


def test_a_stop_inside_an_accepted_run(streams: Streams) -> None:
    path, _, _ = streams
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0}
    with loaded(path) as engine:
        long = engine.generate(PROMPTS[1], **options, ignore_eos=True).token_ids
        stops = [[long[place]] for place in range(1, 9)]
        expected = [engine.generate(PROMPTS[1], **options, stop_token_ids=stop) for stop in stops]
    with loaded(path, drafter=path, run_ahead=1) as engine:
        check_equal([engine.generate(PROMPTS[1], **options, stop_token_ids=stop) for stop in stops], expected)
        assert share(engine) > 0.5


def test_its_projections_in_8_bits(streams: Streams) -> None:
    """It drafts nearly as well, and no token changes."""
    path, params, expected = streams
    with loaded(path, drafter=path) as engine:
        whole = engine.stats().speculation.weight_bytes
    with loaded(path, drafter=path, quantize_drafter="int8") as engine:
        check_equal(engine.generate(PROMPTS[:5], params[:5]), expected[:5])
        stats = engine.stats().speculation
    assert stats.accepted > 0.5 * stats.drafted > 0
    assert stats.weight_bytes < 0.8 * whole


def test_its_memory_is_counted(streams: Streams) -> None:
    """Pages have room for both models, within the memory that is given."""
    path, params, expected = streams
    with loaded(path, kv_memory="1MiB") as engine:
        alone = engine.stats()
    model = families.build("llama", num_hidden_layers=1)
    with loaded(path, kv_memory="1MiB", drafter=model) as engine:
        stats = engine.stats()
        assert stats.speculation.weight_bytes == sum(
            4 * tensor.numel() for tensor in (*model.parameters(), *model.buffers())
        )
        assert stats.speculation.cache_bytes * 3 == stats.cache_bytes <= 2**20
        assert stats.pages == pytest.approx(alone.pages * 2 / 3, abs=1)
        assert "MiB of the KV cache" in str(stats)
        assert stats.speculation.drafter == "LlamaForCausalLM"
        engine.release_cache()
        engine.resume()
        check_equal(engine.generate(PROMPTS[:3], params[:3]), expected[:3])


def test_its_owner_may_train_it(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call has the weights that it has then; its recordings go with tensors that lie elsewhere."""
    path, params, expected = streams
    for module in (stand_in, recorder):
        monkeypatch.setattr(module, "median_seconds", lambda *_: 1.0)
    model, right = (
        families.build("llama", num_hidden_layers=2, **tied) for tied in ({"tie_word_embeddings": False}, {})
    )
    with torch.no_grad():
        model.lm_head.weight.neg_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings: dict[str, Any] = {"max_batch": 2, "page_size": 16, "kv_memory": "4MiB", "max_context": 192}
    warnings.filterwarnings("ignore", ".*lie elsewhere")
    with Engine.load(path, mode="graph", drafter=model, decode_buckets=(2,), prefill_buckets=(), **settings) as engine:

        def accepted() -> float:
            for _ in range(2):
                found = engine.generate(PROMPTS[:2], params[:2])
                while engine.record_missing():
                    pass
            check_equal(found, expected[:2])
            return sum(c.accepted_tokens for c in found) / max(1, sum(c.drafted_tokens for c in found))

        assert accepted() < 0.1
        model.load_state_dict(right.state_dict())
        assert accepted() > 0.9
        for name, parameter in model.named_parameters():
            parameter.data = before[name].clone()
        assert accepted() < 0.1
        assert any("lie elsewhere" in reason for reason in engine.stats().fallbacks)
    assert all("_hybridgen" not in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("fault", ["prefill", "decode", "nan"])
def test_a_fault_costs_drafts_and_no_token(fault: str, streams: Streams) -> None:
    path, params, expected = streams
    model = families.build("llama")
    calls: list[int] = []

    def forward(module: Any, arguments: Any) -> None:
        tokens = arguments[0].shape[-2]
        calls.append(tokens)
        if (fault == "prefill" and tokens > 17) or (fault == "decode" and len(calls) > 12):
            raise ArithmeticError("no idea")

    if fault == "nan":
        with torch.no_grad():
            model.model.norm.weight[3] = torch.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings: dict[str, Any] = {"max_batch": 4, "page_size": 16, "kv_memory": "16MiB", "max_context": 192}
        with Engine.load(path, mode="eager", drafter=model, **settings) as engine:
            if fault != "nan":
                model.model.layers[1].register_forward_pre_hook(forward)
            check_equal(engine.generate(PROMPTS[:4], params[:4]), expected[:4])
            check_equal(engine.generate(PROMPTS[:4], params[:4]), expected[:4])
            stats = engine.stats()
    [why] = [reason for reason in stats.fallbacks if "drafter" in reason]
    assert [str(warning.message) for warning in caught if warning.category is RuntimeWarning] == [why]
    if fault == "nan":
        assert why == "the drafter LlamaForCausalLM gave logits that hold no number; they are dropped"
        assert stats.speculation.drafted == 0
    else:
        assert "ArithmeticError: no idea; steps run without drafts" in why
        assert stats.speculation.drafter == f"off: {why}"


def test_another_vocabulary_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ids that changed places: the sizes say nothing."""
    other = tmp_path / "other"
    shutil.copytree(model_path(), other)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.__getitem__)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(content))
    monkeypatch.setattr(Checkpoint, "load", lambda _: pytest.fail("weights are read"))
    settings: dict[str, Any] = {"mode": "eager", "device": "cpu", "compile_cache": False}
    with pytest.raises(
        hybridgen.ConfigError, match=r"another vocabulary than .*: 2 ids mean something else, such as \d+"
    ):
        Engine.load(None, **settings, drafter=other)
    with pytest.raises(hybridgen.ConfigError, match=r"257 ids, not .*, and no tokenizer"):
        hybridgen.generate(None, "x", **settings, drafter=families.build("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "another vocabulary than .*: 300 ids, not 257"),
        ({"max_position_embeddings": 64}, "context of 64 tokens, and requests may have 192; set max_context=64"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, streams: Streams) -> None:
    with pytest.raises(hybridgen.ConfigError, match=message):
        Engine.load(streams[0], mode="eager", drafter=families.build("llama", **changes), max_context=192)


def test_one_whose_state_cannot_be_taken_back_is_refused(streams: Streams) -> None:
    with pytest.raises(hybridgen.ConfigError, match="drafter='Lfm2ForCausalLM' cannot draft: its layers keep a state"):
        Engine.load(streams[0], mode="eager", drafter=families.build("lfm2"), max_context=64)


def test_a_drafter_that_cannot_be_quantised(streams: Streams) -> None:
    """The message names the field that was given."""
    with pytest.raises(
        hybridgen.ConfigError, match=r"^quantize_drafter='fp8' with drafter=.*: this model is in memory"
    ):
        Engine.load(streams[0], mode="eager", drafter=families.build("llama"), quantize_drafter="fp8", max_context=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drafter": 3}, "give a smaller model of the same vocabulary"),
        ({"drafter": ""}, "give a smaller model"),
        ({"drafter": PreTrainedModel}, "give a smaller model"),
        ({"drafter": "a", "speculation": "ngram"}, "one of them drafts; leave the other out"),
        ({"quantize_drafter": "fp8"}, "quantize_drafter='fp8' without a drafter"),
        ({"drafter": "a", "quantize_drafter": "int3"}, "quantize_drafter='int3' is unknown"),
        ({"drafter": "a", "graphs": "trees"}, "graphs=\"trees\" with drafter='a'"),
    ],
)
def test_a_config_that_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(hybridgen.ConfigError, match=message):
        hybridgen.EngineConfig(**fields)


def test_nothing_is_said_of_its_generation_config(streams: Streams, caplog: pytest.LogCaptureFixture) -> None:
    """Requests go by the model's own."""
    model = families.build("llama")
    model.generation_config.repetition_penalty = 1.75
    with loaded(streams[0], drafter=model):
        assert "1.75" not in caplog.text
    with loaded(model):
        assert "repetition_penalty=1.75" in caplog.text


def test_a_model_that_is_not_there(streams: Streams) -> None:
    with pytest.raises(hybridgen.ModelNotFoundError, match="nowhere"):
        Engine.load(streams[0], mode="eager", drafter="/nowhere/at/all")


def test_functions_of_a_row_beside_it(streams: Streams) -> None:
    """Steps with such a row check no drafts, and the drafter goes on behind them."""
    path, _, _ = streams

    def no_repeats(ids: Any, logits: Any) -> Any:
        logits[ids] = -float("inf")
        return logits

    mixed = [
        SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True),
        SamplingParams(max_new_tokens=9, temperature=0, ignore_eos=True, logits_processors=[no_repeats]),
    ]
    with loaded(path) as engine:
        expected = engine.generate(PROMPTS[:2], mixed)
    with loaded(path, drafter=path) as engine:
        found = engine.generate(PROMPTS[:2], mixed)
    check_equal(found, expected)
    assert found[1].drafted_tokens == 0 < found[0].accepted_tokens == found[0].drafted_tokens
