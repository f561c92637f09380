"""The prefix cache: the tokens that come without it, fewer of them computed, and pages that come back."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import hybridgen
from hybridgen import Engine, FinishReason, SamplingParams
from hybridgen.cache import NO_PAGES, PageManager

PAGE = 8
SETTINGS: dict[str, Any] = {
    "max_batch": 4,
    "page_size": PAGE,
    "token_budget": 48,
    "kv_memory": "16MiB",
    "max_context": 256,
    "device": "cpu",
    "progress": False,
    "decode_buckets": (2, 4),
    "prefill_buckets": (16, 48),
}
A, B, C, D = families.prompts_of((70, 33, 9, 16))
PROMPTS = [A, A + B, B, A[:40] + C, A + B, C, A[:64], A[:65], D, D, B + A, A[:7]]
"""Prefixes of several lengths: whole pages and not, longer and shorter than a call's tokens, none at all."""
NEW = 12


def generate(engine: Engine, prompts: list[list[int]], **fields: Any) -> list[Any]:
    return engine.generate(prompts, **{"max_new_tokens": NEW, "ignore_eos": True} | fields)


def tokens(outs: list[Any]) -> list[tuple[int, ...]]:
    return [out.token_ids for out in outs]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("prefix"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def plain(path: Path) -> Any:
    with Engine.load(path, mode="eager", prefix_cache=False, **SETTINGS) as engine:
        yield engine


@pytest.fixture
def engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine whose pages hold NaN whenever a request gets them."""
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        poison(engine, monkeypatch)
        yield engine
        if not engine.closed:
            check_empty(engine)


def poison(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill pages that a request gets for itself with NaN, before anything is written to them."""
    real = PageManager._take

    def take(manager: PageManager, count: int) -> list[int] | None:
        pages = real(manager, count)
        if pages and engine._loop is not None and manager is engine._loop.scheduler.pages:
            for state in engine._runner.states:
                for tensor in state.tensors().values():
                    tensor[pages] = float("nan")
        return pages

    monkeypatch.setattr(PageManager, "_take", take)


def check_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.free_pages, stats.running, stats.waiting) == (stats.pages, 0, 0)
    assert (NO_PAGES.table, NO_PAGES.cached, NO_PAGES.nodes, NO_PAGES.written) == ([], 0, [], 0)


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "mistral", "gemma2", "gpt2", "llama4_text", "gpt_oss"),
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_that_come_without(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In modes eager and graph, alone and in company, on the first call and on the next ones."""
    path = families.write(family, tmp_path, **families.depth(family))
    with Engine.load(path, mode="eager", prefix_cache=False, **SETTINGS) as engine:
        outs = generate(engine, PROMPTS, logprobs=0)
        assert {out.cached_tokens for out in outs} == {0}
        assert engine.stats().prefix.state == "off: prefix_cache=False"
        expected = tokens(outs)
        chosen = [[entry.logprob for entry in out.logprobs] for out in outs]
    for mode, run_ahead in (("eager", 1), ("graph", 0)):
        with Engine.load(path, mode=mode, run_ahead=run_ahead, **SETTINGS) as engine:
            poison(engine, monkeypatch)
            for call in range(2):
                outs = generate(engine, PROMPTS, logprobs=0)
                assert tokens(outs) == expected
                for out, logprobs in zip(outs, chosen, strict=True):
                    assert [entry.logprob for entry in out.logprobs] == pytest.approx(logprobs, abs=1e-4)
                if call:
                    assert [out.cached_tokens for out in outs] == [(len(ids) - 1) // PAGE * PAGE for ids in PROMPTS]
            for prompt, wanted in zip(PROMPTS, expected, strict=True):
                assert tokens(generate(engine, [prompt])) == [wanted]
            assert not engine.stats().fallbacks
            check_empty(engine)


def test_what_is_cached_is_not_computed_and_is_told(engine: Engine) -> None:
    first = engine.generate(A, max_new_tokens=2)
    again = engine.generate(A + C, max_new_tokens=2)
    assert (first.cached_tokens, again.cached_tokens) == (0, 64)
    stats = engine.stats()
    assert stats.tokens == {"prompt": 70 + 79 - 64, "cached": 64, "generated": 4}
    assert stats.prefix.state == "on"
    assert (stats.prefix.prompt_tokens, stats.prefix.cached_tokens) == (149, 64)
    assert stats.prefix.hit_rate == pytest.approx(64 / 149)
    assert stats.prefix.pages == 10  # 79 tokens and one of the two generated ones
    assert "64 of 149 prompt tokens (43%), 10 pages kept, 0 evicted" in str(stats)
    assert stats.as_dict()["prefix"]["cached_tokens"] == 64


def test_choices_and_equal_prompts_of_a_call_share_their_prompt(engine: Engine, plain: Engine) -> None:
    """In one prefill call: the first writes the pages that the others read."""
    prompt = A[:40]
    out = engine.generate(prompt, n=4, temperature=1.0, seed=3, max_new_tokens=6)
    assert [choice.cached_tokens for choice in out.choices] == [0, 32, 32, 32]
    assert tokens(out.choices) == tokens(plain.generate(prompt, n=4, temperature=1.0, seed=3, max_new_tokens=6).choices)
    assert engine.stats().tokens["prompt"] == 40 + 3 * 8
    before = engine.stats().steps
    outs = generate(engine, [D, B, D, D])
    assert [out.cached_tokens for out in outs] == [0, 0, 8, 8]
    assert tokens(outs) == tokens(generate(plain, [D, B, D, D]))
    calls = sum(count - before.get(key, 0) for key, count in engine.stats().steps.items() if key[0] == "prefill")
    assert calls == 2  # 16 + 8 + 8 + 33 tokens at 48 a call


def test_turns_of_a_chat_share_the_answers_too(engine: Engine, plain: Engine) -> None:
    history, fed = list(B), 1
    for turn in range(4):
        out = engine.generate(history, max_new_tokens=11, ignore_eos=True)
        assert out.token_ids == plain.generate(history, max_new_tokens=11, ignore_eos=True).token_ids
        assert out.cached_tokens == fed // PAGE * PAGE
        fed = len(history) + 10  # the last token was not
        history += [*out.token_ids, *C[: turn + 1]]


def test_a_stop_string_or_token_ends_with_pages_that_hold_what_was_fed(engine: Engine, plain: Engine) -> None:
    full = plain.generate(B, max_new_tokens=40, ignore_eos=True).token_ids
    out = engine.generate(B, max_new_tokens=40, ignore_eos=True, stop_token_ids=[full[14]])
    end = full.index(full[14]) + 1
    assert out.token_ids == full[:end]
    longer = [*B, *full]
    again = engine.generate(longer, max_new_tokens=5)
    assert again.cached_tokens == (len(B) + end - 1) // PAGE * PAGE
    assert again.token_ids == plain.generate(longer, max_new_tokens=5).token_ids


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"bad_words_ids": [A[30:32], [A[69], 3]], "sequence_bias": {(A[68], A[69], 17): 20.0}},
        {"temperature": 1.0, "seed": 5, "top_k": 40},
    ],
)
def test_processors_see_the_whole_prompt(engine: Engine, plain: Engine, fields: dict[str, Any]) -> None:
    generate(engine, [A])
    outs = generate(engine, [A, A + C, B], **fields)
    assert [out.cached_tokens for out in outs] == [64, 64, 0]
    assert tokens(outs) == tokens(generate(plain, [A, A + C, B], **fields))


def test_salts_keep_requests_apart(engine: Engine) -> None:
    cached = [
        engine.generate(A, max_new_tokens=1, cache_salt=salt).cached_tokens for salt in (None, "x", "y", "x", None)
    ]
    assert cached == [0, 0, 0, 64, 64]
    with pytest.raises(hybridgen.SamplingError, match="cache_salt=7 is not text"):
        SamplingParams(cache_salt=7)


def test_prompts_of_a_list_meet_before_their_prefix_is_evicted(path: Path) -> None:
    """Three prefixes in turn, one request at a time, and room for two of them."""
    prefixes = families.prompts_of((64, 64, 64), seed=4)
    questions = families.prompts_of((9,) * 9, seed=5)
    prompts = [[*prefixes[i % 3], *question] for i, question in enumerate(questions)]
    per_page = 2 * 2 * 2 * PAGE * 16 * 4
    with Engine.load(
        path, mode="eager", **SETTINGS | {"max_batch": 1, "decode_buckets": None, "kv_memory": 20 * per_page}
    ) as engine:
        outs = generate(engine, prompts, max_new_tokens=4)
        assert [out.cached_tokens for out in outs] == [0] * 3 + [64] * 6
        assert [out.prompt_token_ids for out in outs] == [tuple(prompt) for prompt in prompts]
        assert engine.stats().prefix.evicted > 0
        check_empty(engine)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_full_pool_never_stops(path: Path, plain: Engine, run_ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that together need many times the pool, some of which are cancelled, from two threads."""
    rng = random.Random(run_ahead)
    bases = families.prompts_of((40, 40, 24), seed=6)
    prompts = [
        [*rng.choice(bases)[: rng.randint(1, 40)], *rng.choices(range(3, 200), k=rng.randint(1, 30))] for _ in range(40)
    ]
    news = [rng.randint(1, 20) for _ in prompts]
    sampling = [SamplingParams(max_new_tokens=new, ignore_eos=True) for new in news]
    expected = tokens(plain.generate(prompts, sampling))
    per_page = 2 * 2 * 2 * PAGE * 16 * 4
    settings = SETTINGS | {"kv_memory": 15 * per_page, "max_context": 96, "run_ahead": run_ahead}
    with Engine.load(path, mode="eager", **settings) as engine:
        poison(engine, monkeypatch)
        got: dict[int, list[Any]] = {}

        def work(part: int) -> None:
            got[part] = engine.generate(prompts[part::2], sampling[part::2])

        threads = [threading.Thread(target=work, args=(part,)) for part in range(2)]
        for thread in threads:
            thread.start()
        for index in range(0, 12, 3):
            stream = engine.stream(prompts[index : index + 3], max_new_tokens=15, ignore_eos=True)
            for _ in range(5):
                next(stream)
            stream.close()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
        for part in range(2):
            assert tokens(got[part]) == expected[part::2]
        assert engine.stats().prefix.evicted > 0
        check_empty(engine)


@pytest.mark.parametrize(
    ("method", "length", "start"), [("admit", 70, 0), ("prefill", 20, 0), ("prefill", 70, 0), ("prefill", 70, 48)]
)
def test_who_shares_pages_with_a_request_that_fails_computes_them(
    engine: Engine, plain: Engine, method: str, length: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of several fails: when it is admitted, in a call with the others, in its first or second chunk."""
    shared = A[:length]
    prompts = [shared, shared, shared + C, C]
    expected = tokens(generate(plain, prompts))
    loop, real = engine.open_loop(), getattr(engine._runner, method)
    requests = engine.make_requests(prompts, None, {"max_new_tokens": NEW, "ignore_eos": True})
    first = requests[0]

    def failing(work: Any) -> Any:
        for item in [work] if method == "admit" else work:
            if first.completion is None and item.slot == first.slot and getattr(item, "start", 0) == start:
                raise RuntimeError("injected")
        return real(work)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, method, failing)
        loop.submit(requests)
        while any(request.completion is None for request in requests):
            loop.step()
    assert "injected" in str(first.completion.error)
    assert tokens([request.completion for request in requests[1:]]) == expected[1:]
    assert [request.completion.cached_tokens for request in requests[1:]] == [start, length // PAGE * PAGE, 0]
    check_empty(engine)
    assert tokens(generate(engine, prompts)) == expected


def test_a_cancelled_prefill_is_done_again_by_those_that_waited_for_it(
    engine: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [*A, *B, *A]
    requests = engine.make_requests([prompt, prompt], None, {"max_new_tokens": 6})
    loop = engine.open_loop()
    monkeypatch.setattr(loop.scheduler, "_ahead", 1000)  # both are admitted at once
    loop.submit(requests)
    loop.step()  # the first of four chunks
    assert requests[1].pages.cached == 168
    loop.cancel(requests[:1])
    while requests[1].completion is None:
        loop.step()
    assert requests[0].completion.finish_reason is FinishReason.CANCELLED
    assert requests[1].completion.token_ids == plain.generate(prompt, max_new_tokens=6).token_ids
    assert requests[1].completion.cached_tokens == 48


def test_a_failed_request_leaves_no_output_to_share(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = engine._runner.decode, []

    def failing(slots: tuple[int, ...]) -> Any:
        steps.append(slots)
        if len(steps) > 20:
            raise RuntimeError("injected")
        return real(slots)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "decode", failing)
        with pytest.raises(hybridgen.RequestError, match="injected"):
            engine.generate(B, max_new_tokens=30, ignore_eos=True)
    assert engine.stats().prefix.pages == len(B) // PAGE


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_live_module_shares_within_a_call_alone(mode: str) -> None:
    """Values that change in place cannot be seen, so nothing is kept for the next call."""
    model = families.build("llama", num_hidden_layers=2)
    with Engine.load(model, mode=mode, **SETTINGS) as engine:
        for _ in range(2):
            outs = generate(engine, [A, A + C, C])
            assert [out.cached_tokens for out in outs] == [0, 64, 0]
            for out, prompt in zip(outs, (A, A + C, C), strict=True):
                assert list(out.token_ids) == families.reference(model, prompt, NEW)[0]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
        assert engine.stats().prefix.pages > 0
        check_empty(engine)


@pytest.mark.parametrize(("kind", "fields"), [
    ("longrope", {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}),
    ("dynamic", {"factor": 4.0}),
])  # fmt: skip
def test_keys_that_depend_on_the_length_are_shared_below_it(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    limit = fields.get("original_max_position_embeddings", 64)
    rope = {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}
    longest = 512 if kind == "longrope" else 64
    name = "phi3" if kind == "longrope" else "llama"
    rope |= {name: value for name, value in fields.items() if name.startswith("original")}
    path = families.write(name, tmp_path, num_hidden_layers=2, max_position_embeddings=longest, **rope)
    for context in (limit, 200):
        with Engine.load(path, mode="eager", **SETTINGS | {"max_context": context}) as engine:
            outs = generate(engine, [B, B + C])
            state = engine.stats().prefix.state
            if context == limit:
                assert state == "on"
                assert [out.cached_tokens for out in outs] == [0, 32]
            else:
                assert state.startswith(f"off: keys of this model depend on a request's length above {limit} tokens")
                assert {out.cached_tokens for out in outs} == {0}


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_windowed_models_use_few_pages_in_turn_when_room_is_short(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All four rows run at once in a pool that holds two of them whole, and give the tokens of a large one."""
    path = families.write("mistral", tmp_path, num_hidden_layers=2)
    prompts = [*families.prompts_of((70, 33, 9, 90)), A, A + C]
    with Engine.load(path, mode="eager", prefix_cache=False, **SETTINGS) as engine:
        expected = tokens(generate(engine, prompts, max_new_tokens=60))
    monkeypatch.setattr("hybridgen.engine.builder.plan_pages", lambda *_, **__: 1 + 45)
    used: list[bool] = []
    admit = PageManager.admit

    def note(manager: PageManager, *args: Any) -> Any:
        pages = admit(manager, *args)
        if pages is not None:
            used.append(pages.in_turn)
        return pages

    with Engine.load(path, mode=mode, run_ahead=1, **SETTINGS) as engine:
        poison(engine, monkeypatch)
        monkeypatch.setattr(PageManager, "admit", note)
        for _ in range(2):
            assert tokens(generate(engine, prompts, max_new_tokens=60)) == expected
        check_empty(engine)
    assert any(used)
    assert not all(used)


def test_models_with_a_layer_that_sees_everything_use_no_pages_in_turn(tmp_path: Path) -> None:
    with Engine.load(families.write("gemma2", tmp_path), mode="eager", **SETTINGS) as engine:
        generate(engine, [A])
        assert engine._loop.scheduler.pages.ring_pages is None


def test_the_order_in_which_a_list_starts_changes_no_result(path: Path) -> None:
    """Two rows, outputs of many lengths, greedy and drawn: completions in the order of the list."""
    params = [SamplingParams(max_new_tokens=2 + 7 * i % 23, temperature=i % 2, seed=i) for i in range(len(PROMPTS))]
    found = []
    for longest_first in (False, True):
        settings = SETTINGS | {"max_batch": 2, "decode_buckets": (2,), "longest_first": longest_first}
        with Engine.load(path, mode="eager", **settings) as engine:
            found.append(tokens(engine.generate(PROMPTS, params)))
    assert found[0] == found[1]
    assert [len(out) for out in found[0]] == [each.max_new_tokens for each in params]
