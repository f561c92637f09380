"""The engine's behaviour: results, failures, cancellation, statistics."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import hybridgen
from hybridgen import Engine, FinishReason, SamplingParams
from hybridgen.models.visibility import Visibility
from hybridgen.params import choice_seed

SETTINGS: dict[str, Any] = {"max_batch": 8, "page_size": 16, "token_budget": 96, "kv_memory": "16MiB"}
PROMPTS = families.prompts_of((5, 40, 1, 17, 33, 120, 64, 2))
SAMPLED = SamplingParams(max_new_tokens=24, temperature=1.0, top_p=0.95)


def seeded(count: int) -> list[SamplingParams]:
    return [
        SamplingParams(max_new_tokens=24, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, seed=100 + i)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = families.write("llama", tmp_path_factory.mktemp("engine"), num_hidden_layers=2)
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        yield engine
        assert engine.stats().free_pages == engine.stats().pages
        assert engine.stats().running == engine.stats().waiting == 0


def test_one_prompt_gives_one_completion(engine: Engine) -> None:
    out = engine.generate(PROMPTS[0], max_new_tokens=6)
    assert len(out.token_ids) == 6
    assert out.prompt_token_ids == tuple(PROMPTS[0])
    assert out.finish_reason is FinishReason.LENGTH
    assert out.text == ""  # no tokenizer
    assert out.logprobs is None
    assert 0 <= out.timing.queue <= out.timing.ttft <= out.timing.total
    assert len(out.timing.token_times) == 6
    assert {(step.phase, step.kind, step.count) for step in out.steps} == {
        ("prefill", "layers, eager", 1),
        ("decode", "layers, eager", 5),
    }


def test_a_list_gives_a_list_in_order(engine: Engine) -> None:
    outs = engine.generate(PROMPTS, max_new_tokens=3)
    assert [out.prompt_token_ids for out in outs] == [tuple(prompt) for prompt in PROMPTS]
    assert isinstance(engine.generate([PROMPTS[0]], max_new_tokens=1), list)


def test_more_prompts_than_slots(engine: Engine) -> None:
    prompts = PROMPTS * 4
    outs = engine.generate(prompts, max_new_tokens=5)
    assert [out.token_ids for out in outs] == [out.token_ids for out in engine.generate(PROMPTS, max_new_tokens=5)] * 4


def test_parameters_per_prompt(engine: Engine) -> None:
    outs = engine.generate(PROMPTS[:2], [SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=4)])
    assert [len(out.token_ids) for out in outs] == [2, 4]


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_another_length_is_an_error(engine: Engine, count: int) -> None:
    with pytest.raises(hybridgen.SamplingError, match=f"{count} entries for 2 prompt"):
        engine.generate(PROMPTS[:2], [SAMPLED] * count)


def test_draws_depend_on_seed_and_position_alone(engine: Engine, llama_path: Path) -> None:
    params = seeded(8)
    together = [out.token_ids for out in engine.generate(PROMPTS, params)]
    alone = [engine.generate(prompt, one).token_ids for prompt, one in zip(PROMPTS, params, strict=True)]
    order = [3, 7, 0, 5, 1, 6, 2, 4]
    shuffled = engine.generate([PROMPTS[i] for i in order], [params[i] for i in order])
    assert alone == together
    assert [out.token_ids for out in shuffled] == [together[i] for i in order]
    assert len(set(together)) == 8
    with Engine.load(llama_path, mode="jit", compile_backend="eager", **SETTINGS) as compiled:
        assert [out.token_ids for out in compiled.generate(PROMPTS, params)] == together


def test_a_drawn_seed_is_reported_and_repeats(engine: Engine) -> None:
    first = engine.generate(PROMPTS[0], SAMPLED)
    again = engine.generate(PROMPTS[0], SAMPLED)
    assert first.seed != again.seed
    assert first.token_ids != again.token_ids
    assert engine.generate(PROMPTS[0], SAMPLED, seed=first.seed).token_ids == first.token_ids


def test_n_completions_of_one_prompt(engine: Engine) -> None:
    out = engine.generate(PROMPTS[0], SAMPLED, seed=5, n=3)
    assert [choice.seed for choice in out.choices] == [choice_seed(5, choice) for choice in range(3)]
    assert out.token_ids == out.choices[0].token_ids
    assert len({choice.token_ids for choice in out.choices}) == 3
    assert engine.generate(PROMPTS[0], SAMPLED, seed=out.choices[1].seed).token_ids == out.choices[1].token_ids
    assert engine.generate(PROMPTS[0], SAMPLED, seed=6).token_ids not in {choice.token_ids for choice in out.choices}


def test_stop_token_ids_end_a_request(engine: Engine) -> None:
    greedy = engine.generate(PROMPTS[1], max_new_tokens=20).token_ids
    stop = greedy[7]
    out = engine.generate(PROMPTS[1], max_new_tokens=20, stop_token_ids=[stop])
    assert out.token_ids == greedy[: greedy.index(stop) + 1]
    assert (out.finish_reason, out.stop_match) == (FinishReason.STOP, stop)
    longer = engine.generate(PROMPTS[1], max_new_tokens=20, min_new_tokens=15, stop_token_ids=[stop])
    assert stop not in longer.token_ids[:15]


def test_run_ahead_changes_nothing_but_discards(llama_path: Path, engine: Engine) -> None:
    greedy = [out.token_ids for out in engine.generate(PROMPTS, max_new_tokens=30)]
    stops = [SamplingParams(max_new_tokens=30, stop_token_ids=[tokens[5]]) for tokens in greedy]
    expected = engine.generate(PROMPTS * 2, stops * 2)
    with Engine.load(llama_path, mode="eager", run_ahead=1, **SETTINGS) as ahead:
        actual = ahead.generate(PROMPTS * 2, stops * 2)
        assert ahead.stats().free_pages == ahead.stats().pages
    assert [out.token_ids for out in actual] == [out.token_ids for out in expected]
    assert [out.finish_reason for out in actual] == [out.finish_reason for out in expected]


def test_logprobs_top_k(engine: Engine) -> None:
    outs = engine.generate(PROMPTS[:3], [SamplingParams(max_new_tokens=4, logprobs=k) for k in (None, 0, 5)])
    assert outs[0].logprobs is None
    assert [entry.top for entry in outs[1].logprobs] == [()] * 4
    for token, entry in zip(outs[2].token_ids, outs[2].logprobs, strict=True):
        assert entry.token_id == token
        assert len(entry.top) == 5
        assert entry.top[0] == (token, pytest.approx(entry.logprob))
        assert list(entry.top) == sorted(entry.top, key=lambda pair: -pair[1])


# ------------------------------------------------------------------ bad input


def test_text_without_a_tokenizer(engine: Engine) -> None:
    with pytest.raises(hybridgen.TokenizerError, match="tokenizer"):
        engine.generate("text")
    with pytest.raises(hybridgen.TokenizerError, match="stop="):
        engine.generate([1, 2], stop=["x"])


def test_over_the_context(engine: Engine) -> None:
    with pytest.raises(hybridgen.PromptError, match="over the context of 512"):
        engine.generate([1] * 500, max_new_tokens=13)
    assert len(engine.generate([1] * 500).token_ids) == 12  # the default gives way


def test_over_the_cache(llama_path: Path) -> None:
    page = 2 * 2 * 2 * 16 * 16 * 4
    with Engine.load(llama_path, mode="eager", **SETTINGS | {"kv_memory": 4 * page}) as small:
        assert small.cache_tokens == 48
        with pytest.raises(hybridgen.PromptError, match="KV cache of 48 positions can ever hold"):
            small.generate([1] * 40, max_new_tokens=9)
        outs = small.generate([[1] * 40, [2] * 30, [3] * 8], max_new_tokens=8)
        assert [len(out.token_ids) for out in outs] == [8, 8, 8]


def test_ids_outside_the_vocabulary(engine: Engine) -> None:
    with pytest.raises(hybridgen.PromptError, match="257"):
        engine.generate([1, families.VOCAB])


def test_unknown_keyword_names_the_nearest(engine: Engine) -> None:
    with pytest.raises(hybridgen.ConfigError, match="did you mean 'max_new_tokens'"):
        engine.generate(PROMPTS[0], max_new_tokes=3)


def test_context_above_the_models(llama_path: Path) -> None:
    with pytest.raises(hybridgen.ConfigError, match="above the model's limit of 512"):
        Engine.load(llama_path, max_context=513)


def test_unknown_backend(llama_path: Path) -> None:
    with pytest.raises(hybridgen.ConfigError, match="no_such_backend"):
        Engine.load(llama_path, mode="jit", compile_backend="no_such_backend")


# ------------------------------------------------------------------ failures


def poison_first_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the logits of one request NaN: the one in the first row of the first decode call."""
    runner = engine._runner
    assert runner is not None
    forward, slot = runner.bound.forward, []

    def broken(ids: torch.Tensor, step: Any, keep: torch.Tensor | None) -> torch.Tensor:
        logits = forward(ids, step, keep)
        if keep is None:
            slot.append(int(step.slots[0]))
            logits[step.slots == slot[0]] = float("nan")
        return logits

    monkeypatch.setattr(runner.bound, "forward", broken)


def test_nan_logits_fail_their_row_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate(PROMPTS[:4], max_new_tokens=6)
    with monkeypatch.context() as patch:
        poison_first_row(engine, patch)
        outs = engine.generate(PROMPTS[:4], max_new_tokens=6)
    reasons = [out.finish_reason for out in outs]
    assert reasons.count(FinishReason.ERROR) == 1
    for out, good in zip(outs, expected, strict=True):
        if out.finish_reason is FinishReason.ERROR:
            assert isinstance(out.error, hybridgen.RequestError)
            assert "NaN" in str(out.error)
            assert out.token_ids == good.token_ids[:1]
        else:
            assert out.token_ids == good.token_ids


def test_a_single_failed_prompt_raises(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        poison_first_row(engine, patch)
        with pytest.raises(hybridgen.RequestError, match="NaN"):
            engine.generate(PROMPTS[0], max_new_tokens=3)


@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_a_call_that_raises_fails_only_the_request_to_blame(
    engine: Engine, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate(PROMPTS[:3], max_new_tokens=6)
    runner = engine._runner
    real = getattr(runner, method)
    blamed: list[int] = []

    def failing(work: Any) -> Any:
        slots = [item.slot for item in work] if method == "prefill" else list(work)
        if not blamed:
            blamed.append(slots[0])
        if blamed[0] in slots:
            raise RuntimeError("injected\nsecond line")
        return real(work)

    with monkeypatch.context() as patch:
        patch.setattr(runner, method, failing)
        outs = engine.generate(PROMPTS[:3], max_new_tokens=6)
    assert [out.finish_reason for out in outs].count(FinishReason.ERROR) == 1
    for out, good in zip(outs, expected, strict=True):
        if out.error is None:
            assert out.token_ids == good.token_ids
        else:
            assert "RuntimeError: injected" in str(out.error)
            assert "second line" not in str(out.error)
    assert engine.stats().free_pages == engine.stats().pages


def test_garbage_in_unused_cache_changes_nothing(llama_path: Path) -> None:
    with Engine.load(llama_path, mode="eager", **SETTINGS) as clean:
        expected = [out.token_ids for out in clean.generate(PROMPTS, max_new_tokens=12)]
    with Engine.load(llama_path, mode="eager", **SETTINGS) as dirty:
        for site in dirty._runner.bound.sites:
            site.module._hybridgen.keys.fill_(float("nan"))
            site.module._hybridgen.values.fill_(float("nan"))
        assert [out.token_ids for out in dirty.generate(PROMPTS, max_new_tokens=12)] == expected


def test_ctrl_c_keeps_what_is_finished(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = engine._loop
    real, steps = loop.step, []

    def interrupted() -> None:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        real()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", interrupted)
        with pytest.raises(hybridgen.Interrupted, match="1 of 2") as caught:
            engine.generate(PROMPTS[:2], [SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=30)])
    assert isinstance(caught.value, KeyboardInterrupt)
    done, cut = caught.value.completions
    assert (done.finish_reason, len(done.token_ids)) == (FinishReason.LENGTH, 3)
    assert cut.finish_reason is FinishReason.CANCELLED
    assert cut.token_ids == engine.generate(PROMPTS[1], max_new_tokens=30).token_ids[: len(cut.token_ids)]


def test_ctrl_c_inside_a_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine._runner
    with monkeypatch.context() as patch:
        patch.setattr(runner, "decode", lambda slots: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(hybridgen.Interrupted):
            engine.generate(PROMPTS[:2], max_new_tokens=3)
    assert engine.stats().free_pages == engine.stats().pages
    assert len(engine.generate(PROMPTS[0], max_new_tokens=3).token_ids) == 3


def test_a_failed_compilation_falls_back_and_says_so(llama_path: Path, engine: Engine) -> None:
    def failing_backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    torch._dynamo.register_backend(failing_backend, name="hybridgen_test_failing")
    with pytest.warns(RuntimeWarning, match="compilation failed"):
        fallen = Engine.load(llama_path, mode="jit", compile_backend="hybridgen_test_failing", **SETTINGS)
    with fallen:
        out = fallen.generate(PROMPTS[0], max_new_tokens=4)
        assert out.token_ids == engine.generate(PROMPTS[0], max_new_tokens=4).token_ids
        (reason, count) = next(iter(fallen.stats().fallbacks.items()))
        assert count == 1
        assert {step.kind for step in out.steps} == {"layers, eager"}
        assert {step.reason for step in out.steps} == {reason}
        assert "compilation failed" in str(fallen.stats())


def test_a_late_compilation_is_counted_and_warned_of(llama_path: Path) -> None:
    with Engine.load(llama_path, mode="jit", compile_backend="eager", **SETTINGS) as engine:
        engine.generate(PROMPTS[0], max_new_tokens=2)
        engine._runner.compiled._step.query_starts = engine._runner.steps.metadata.query_starts
        binding = next(iter(engine._runner.bound.sites)).module._hybridgen
        binding.sees = Visibility(window=7)  # something that the graph was specialised on
        with pytest.warns(RuntimeWarning, match="after warm-up"):
            engine.generate(PROMPTS[0], max_new_tokens=2)
        assert engine.stats().late_compiles > 0


# ------------------------------------------------------------------ streams and life cycle


def test_a_stream_has_an_event_per_token(engine: Engine) -> None:
    expected = engine.generate(PROMPTS[:2], max_new_tokens=5)
    events = list(engine.stream(PROMPTS[:2], max_new_tokens=5))
    for index, out in enumerate(expected):
        mine = [event for event in events if event.index == index]
        assert tuple(event.token_id for event in mine) == out.token_ids
        assert [event.completion is not None for event in mine] == [False] * 4 + [True]
        assert mine[-1].completion.token_ids == out.token_ids


def test_closing_a_stream_cancels_it(engine: Engine) -> None:
    stream = engine.stream(PROMPTS[0], max_new_tokens=100)
    next(stream)
    assert engine.stats().running == 1
    stream.close()
    assert engine.stats().running == 0
    assert engine.stats().free_pages == engine.stats().pages


def test_a_stream_checks_its_arguments_at_once(engine: Engine) -> None:
    with pytest.raises(hybridgen.PromptError):
        engine.stream("")


def test_streams_interleave(engine: Engine) -> None:
    expected = [out.token_ids for out in engine.generate(PROMPTS[:2], max_new_tokens=9)]
    first, second = (engine.stream(prompt, max_new_tokens=9) for prompt in PROMPTS[:2])
    tokens: tuple[list, list] = ([next(first).token_id], [])
    for event in second:
        tokens[1].append(event.token_id)
    tokens[0].extend(event.token_id for event in first)
    assert [tuple(t) for t in tokens] == expected


def test_a_streamer_gets_the_prompt_and_each_token(engine: Engine) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, ids: torch.Tensor) -> None:
            self.got.append(ids.tolist())

        def end(self) -> None:
            self.got.append("end")

    streamer = Streamer()
    out = engine.generate(PROMPTS[0], max_new_tokens=3, streamer=streamer)
    assert streamer.got == [[PROMPTS[0]], *([token] for token in out.token_ids), "end"]
    with pytest.raises(hybridgen.SamplingError, match="streamer"):
        engine.generate(PROMPTS[:2], streamer=streamer)


def test_threads_share_the_batch(engine: Engine) -> None:
    expected = [out.token_ids for out in engine.generate(PROMPTS, max_new_tokens=20)]
    results: dict[int, Any] = {}

    def run(index: int) -> None:
        results[index] = engine.generate(PROMPTS[index], max_new_tokens=20).token_ids

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(8)] == expected


def test_a_closed_engine_says_so(llama_path: Path) -> None:
    engine = Engine.load(llama_path, mode="eager", **SETTINGS)
    engine.close()
    engine.close()
    assert engine.closed
    with pytest.raises(hybridgen.EngineError, match="closed"):
        engine.generate(PROMPTS[0])


def test_statistics_count(llama_path: Path) -> None:
    with Engine.load(llama_path, mode="eager", **SETTINGS) as engine:
        engine.generate(PROMPTS[:3], max_new_tokens=4)
        stats = engine.stats()
    assert stats.requests == {"submitted": 3, "length": 3}
    assert stats.tokens == {"prompt": 46, "generated": 12}
    assert stats.steps == {("prefill", "layers, eager", "mode eager"): 1, ("decode", "layers, eager", "mode eager"): 3}
    assert list(stats.startup) == [
        "import",
        "open model",
        "load weights",
        "artifacts",
        "fuse projections",
        "allocate cache",
        "first token",
    ]
    assert stats.artifacts.state == "off"
    assert "3 submitted" in str(stats)
    assert stats.as_dict()["steps"][0]["phase"] == "prefill"


def test_nothing_warns_in_a_normal_run(llama_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with Engine.load(llama_path, mode="jit", compile_backend="eager", **SETTINGS) as engine:
            engine.generate(PROMPTS, max_new_tokens=3)
