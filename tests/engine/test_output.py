"""From tokens to text, events and completions."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hybridgen.core import FinishReason, TokenLogprob
from hybridgen.demo import model_path
from hybridgen.engine.output import Response, StepKind, collect
from hybridgen.engine.scheduler import Sequence
from hybridgen.errors import RequestError
from hybridgen.params import SamplingParams
from hybridgen.sampling import resolve
from hybridgen.text.detokenize import IncrementalDetokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


def respond(
    tokenizer: Any,
    prompt: tuple[int, ...] = (5,),
    index: int = 0,
    choice: int = 0,
    *,
    events: bool = True,
    **fields: Any,
) -> Response:
    sampling = resolve(SamplingParams(**fields), None, [0], 4096)
    return Response(Sequence(prompt, sampling), tokenizer, index, choice, keep_events=events)


def push(response: Response, token: int, logprob: TokenLogprob | None = None, ran: StepKind | None = None) -> None:
    response.push(token, logprob, time.perf_counter(), ran)


def feed(response: Response, ids: list[int]) -> str:
    """Push ids until the response is complete; returns the text of its events."""
    for token in ids:
        push(response, token)
        if response.completion is not None:
            break
    return "".join(event.text for event in response.events)


def test_events_join_to_the_text_of_multi_byte_characters(tokenizer: Any) -> None:
    text = "é 🙂🇪🇺 तो สวัสดี done"
    ids = tokenizer(text)["input_ids"]
    response = respond(tokenizer, max_new_tokens=len(ids))
    assert feed(response, ids) == text
    assert response.completion.text == text
    assert any(event.text == "" for event in response.events)  # bytes of a character come one by one


def test_a_cut_character_is_flushed_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("a🙂")["input_ids"]
    response = respond(tokenizer, max_new_tokens=len(ids) - 1)
    assert feed(response, ids) == tokenizer.decode(ids[:-1])
    assert response.completion.text.endswith("\ufffd")


def test_a_stop_string_across_tokens_is_cut_off(tokenizer: Any) -> None:
    ids = tokenizer("one two three four")["input_ids"]
    response = respond(tokenizer, max_new_tokens=100, stop=["o thr", "zzz"])
    assert feed(response, ids) == "one tw"
    assert response.completion.stop_match == "o thr"
    assert response.completion.finish_reason is FinishReason.STOP


def test_text_held_back_for_a_stop_string_comes_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("one two thr")["input_ids"]
    response = respond(tokenizer, max_new_tokens=len(ids), stop=["thread"])
    assert feed(response, ids) == "one two thr"
    assert response.completion.finish_reason is FinishReason.LENGTH


def test_an_end_token_is_in_the_ids_and_not_in_the_text(tokenizer: Any) -> None:
    ids = [*tokenizer("done")["input_ids"], 0, 7]
    response = respond(tokenizer, max_new_tokens=100)
    assert feed(response, ids) == "done"
    assert response.completion.token_ids == tuple(ids[:-1])
    assert response.completion.stop_match == 0
    shown = respond(tokenizer, max_new_tokens=100, skip_special_tokens=False)
    assert feed(shown, ids) == "done<|endoftext|>"


def test_an_ignored_end_token_goes_on(tokenizer: Any) -> None:
    response = respond(tokenizer, max_new_tokens=3, ignore_eos=True)
    feed(response, [0, 0, 5])
    assert response.completion.finish_reason is FinishReason.LENGTH


def test_a_token_of_minus_one_is_an_error(tokenizer: Any) -> None:
    response = respond(tokenizer, max_new_tokens=5)
    feed(response, [70, -1])
    assert isinstance(response.completion.error, RequestError)
    assert response.completion.token_ids == (70,)


def test_cancelling_keeps_what_came(tokenizer: Any) -> None:
    response = respond(tokenizer, max_new_tokens=5, stop=["never"])
    push(response, tokenizer("x")["input_ids"][0])
    response.end(FinishReason.CANCELLED)
    assert response.completion.finish_reason is FinishReason.CANCELLED
    assert response.completion.text == "x"
    assert response.events[-1].token_id is None


def test_a_request_that_never_ran_has_no_times(tokenizer: Any) -> None:
    response = respond(tokenizer)
    response.end(FinishReason.CANCELLED)
    timing = response.completion.timing
    assert math.isnan(timing.queue)
    assert math.isnan(timing.ttft)
    assert timing.total >= 0


def test_logprobs_are_cut_to_what_was_asked(tokenizer: Any) -> None:
    entry = TokenLogprob(70, -0.5, ((70, -0.5), (71, -1.0), (72, -2.0)))
    for wanted, top in ((0, ()), (2, entry.top[:2])):
        response = respond(tokenizer, max_new_tokens=1, logprobs=wanted)
        push(response, 70, entry)
        assert response.completion.logprobs == (TokenLogprob(70, -0.5, top),)
    silent = respond(tokenizer, max_new_tokens=1)
    push(silent, 70, entry)
    assert silent.completion.logprobs is None


def test_choices_are_collected_by_prompt(tokenizer: Any) -> None:
    responses = [respond(tokenizer, max_new_tokens=1, index=i, choice=c) for i, c in ((0, 0), (1, 0), (1, 1))]
    for response, token in zip(responses, (70, 71, 72), strict=True):
        push(response, token)
    first, second = collect(responses)
    assert (first.token_ids, first.choices) == ((70,), ())
    assert second.token_ids == (71,)
    assert [choice.token_ids for choice in second.choices] == [(71,), (72,)]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("end", ["stop id", "limit", "cancelled"])
def test_without_events_the_text_is_the_same(tokenizer: Any, end: str, skip: bool) -> None:
    """It is decoded at the end then, all at once."""
    rng = random.Random(5)
    for trial in range(40):
        ids = rng.choices(range(1, len(tokenizer)), k=rng.randint(1, 30))
        if trial % 2:  # else most have invalid UTF-8, and are cut inside a character
            ids = tokenizer("def f(é):\n    return '🙂'  # done")["input_ids"][: rng.randint(1, 30)]
        fields = {"max_new_tokens": len(ids) if end == "limit" else 100, "skip_special_tokens": skip}
        loud, silent = (respond(tokenizer, events=events, **fields) for events in (True, False))
        for response in (loud, silent):
            feed(response, ids)
            if end == "stop id":
                push(response, 0)
            elif end == "cancelled":
                response.end(FinishReason.CANCELLED)
        assert silent.completion.text == loud.completion.text == "".join(event.text for event in loud.events)
        assert silent.completion.token_ids == loud.completion.token_ids
        assert silent.completion.finish_reason is loud.completion.finish_reason
        assert not silent.events


def test_nothing_is_decoded_before_the_end_unless_somebody_needs_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    real = IncrementalDetokenizer.push

    def counting(self: IncrementalDetokenizer, token: int) -> str:
        decoded.append(token)
        return real(self, token)

    monkeypatch.setattr(IncrementalDetokenizer, "push", counting)
    ids = tokenizer("one two three")["input_ids"]
    for needs, fields in ((False, {}), (True, {"events": True}), (True, {"stop": ["zzz"]})):
        response = respond(tokenizer, **{"events": False, "max_new_tokens": len(ids), **fields})
        seen: list[int] = []
        response.on_token = seen.append
        feed(response, ids)
        assert response.completion.text == "one two three"
        assert seen == ids
        assert decoded == (ids if needs else [])
        decoded.clear()


def test_steps_are_counted_with_the_tokens_they_brought(tokenizer: Any) -> None:
    response = respond(tokenizer, max_new_tokens=100)
    prefill, graph, eager = ("prefill", "eager", "why"), ("decode", "cuda graph", "hit"), ("decode", "eager", "missing")
    response.prefilled(prefill)
    push(response, 70)
    for ran in (graph, graph, eager, graph):
        push(response, 71, ran=ran)
    response.prefilled(prefill)  # a longrope request is prefilled again
    push(response, 72)
    push(response, 73, ran=eager)
    push(response, -1, ran=eager)
    assert response.completion.token_ids == (70, *[71] * 4, 72, 73)
    counts = {(step.phase, step.kind, step.reason): step.count for step in response.completion.steps}
    assert counts == {prefill: 2, graph: 3, eager: 3}


def test_times_are_those_of_the_reads(tokenizer: Any) -> None:
    before = time.perf_counter()
    response = respond(tokenizer, max_new_tokens=2)
    response.prefilled(("prefill", "eager", "why"))
    moments = [time.perf_counter() + 1, time.perf_counter() + 2]
    for moment in moments:
        response.push(70, None, moment)
    timing = response.completion.timing
    first, second = timing.token_times
    assert timing.ttft == first <= moments[0] - before
    assert second - first == pytest.approx(moments[1] - moments[0])
    assert 0 <= timing.queue <= timing.total < 1


@pytest.fixture(scope="module")
def marked() -> Any:
    """A byte-level tokenizer with special tokens of which the text leaves two out that it does not name."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(x, special=True) for x in ("<|eos|>", "<|im_end|>", "<|call|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")


@pytest.mark.parametrize("events", [True, False])
@pytest.mark.parametrize(
    ("written", "stop", "text", "match"),
    [
        ("hi<|im_end|>x", ["<|im_end|>"], "hi", "<|im_end|>"),
        ("hi<|im_end|>x", ["i<|im_end|>"], "h", "i<|im_end|>"),
        ("hi<|im_end|>x", ["end|>x"], "hi", "end|>x"),
        ("a<|call|>b<|im_end|>c", ["<|call|>c", "z"], "abc", None),
        ("a<|call|>b<|call|>c", ["b<|call|>d"], "abc", None),
        ("ab<|eos|>", ["<|eos|>"], "ab", "<|eos|>"),
        ("a<|call|><|im_end|>b", ["|><|"], "a", "|><|"),
    ],
)
def test_stop_strings_see_special_tokens(
    marked: Any, events: bool, written: str, stop: list[str], text: str, match: str | None
) -> None:
    ids = marked(written)["input_ids"]
    response = respond(marked, max_new_tokens=len(ids), stop=stop, events=events, ignore_eos=True)
    shown = feed(response, ids)
    assert response.completion.text == text
    assert response.completion.stop_match == match
    assert not events or shown == text
    in_full = respond(marked, max_new_tokens=len(ids), stop=stop, skip_special_tokens=False)
    feed(in_full, ids)
    assert in_full.completion.stop_match == match
