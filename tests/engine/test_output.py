"""From tokens to text, events and completions."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hybridgen.core import FinishReason, TokenLogprob
from hybridgen.demo import model_path
from hybridgen.engine.output import RequestOutput, StepKind
from hybridgen.errors import RequestError
from hybridgen.params import SamplingParams
from hybridgen.sampling import resolve
from hybridgen.text.detokenize import IncrementalDetokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


def make_output(
    tokenizer: Any,
    prompt: tuple[int, ...] = (5,),
    *,
    events: bool = True,
    **fields: Any,
) -> RequestOutput:
    sampling = resolve(SamplingParams(**fields), None, [0], 4096)
    return RequestOutput(prompt, sampling, tokenizer, keep_events=events)


def push(output: RequestOutput, token: int, logprob: TokenLogprob | None = None, ran: StepKind | None = None) -> None:
    output.take([token], None if logprob is None else [logprob], time.perf_counter(), ran)


def feed(output: RequestOutput, ids: list[int]) -> str:
    """Push ids until the output is complete; returns the text of its events."""
    for token in ids:
        push(output, token)
        if output.completion is not None:
            break
    return "".join(event.text for event in output.events)


def test_events_join_to_the_text_of_multi_byte_characters(tokenizer: Any) -> None:
    text = "é 🙂🇪🇺 तो สวัสดี done"
    ids = tokenizer(text)["input_ids"]
    output = make_output(tokenizer, max_new_tokens=len(ids))
    assert feed(output, ids) == text
    assert output.completion.text == text
    assert any(event.text == "" for event in output.events)  # bytes of a character come one by one


def test_a_cut_character_is_flushed_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("a🙂")["input_ids"]
    output = make_output(tokenizer, max_new_tokens=len(ids) - 1)
    assert feed(output, ids) == tokenizer.decode(ids[:-1])
    assert output.completion.text.endswith("\ufffd")


def test_a_stop_string_across_tokens_is_cut_off(tokenizer: Any) -> None:
    ids = tokenizer("one two three four")["input_ids"]
    output = make_output(tokenizer, max_new_tokens=100, stop=["o thr", "zzz"])
    assert feed(output, ids) == "one tw"
    assert output.completion.stop_match == "o thr"
    assert output.completion.finish_reason is FinishReason.STOP


def test_text_held_back_for_a_stop_string_comes_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("one two thr")["input_ids"]
    output = make_output(tokenizer, max_new_tokens=len(ids), stop=["thread"])
    assert feed(output, ids) == "one two thr"
    assert output.completion.finish_reason is FinishReason.LENGTH


def test_an_end_token_is_in_the_ids_and_not_in_the_text(tokenizer: Any) -> None:
    ids = [*tokenizer("done")["input_ids"], 0, 7]
    output = make_output(tokenizer, max_new_tokens=100)
    assert feed(output, ids) == "done"
    assert output.completion.token_ids == tuple(ids[:-1])
    assert output.completion.stop_match == 0
    shown = make_output(tokenizer, max_new_tokens=100, skip_special_tokens=False)
    assert feed(shown, ids) == "done<|endoftext|>"


def test_an_ignored_end_token_goes_on(tokenizer: Any) -> None:
    output = make_output(tokenizer, max_new_tokens=3, ignore_eos=True)
    feed(output, [0, 0, 5])
    assert output.completion.finish_reason is FinishReason.LENGTH


def test_a_token_of_minus_one_is_an_error(tokenizer: Any) -> None:
    output = make_output(tokenizer, max_new_tokens=5)
    feed(output, [70])
    assert output.take([-1], None, time.perf_counter()) == 0
    assert output.completion is None
    output.end_unchosen(None)
    assert "after 2 tokens held NaN" in str(output.completion.error)
    assert isinstance(output.completion.error, RequestError)
    assert output.completion.token_ids == (70,)


def test_cancelling_keeps_what_came(tokenizer: Any) -> None:
    output = make_output(tokenizer, max_new_tokens=5, stop=["never"])
    push(output, tokenizer("x")["input_ids"][0])
    output.end(FinishReason.CANCELLED)
    assert output.completion.finish_reason is FinishReason.CANCELLED
    assert output.completion.text == "x"
    assert output.events[-1].token_id is None


def test_a_request_that_never_ran_has_no_times(tokenizer: Any) -> None:
    output = make_output(tokenizer)
    output.end(FinishReason.CANCELLED)
    timing = output.completion.timing
    assert timing.queue is None
    assert timing.ttft is None
    assert timing.total >= 0


def test_logprobs_are_cut_to_what_was_asked(tokenizer: Any) -> None:
    entry = TokenLogprob(70, -0.5, ((70, -0.5), (71, -1.0), (72, -2.0)))
    for wanted, top in ((0, ()), (2, entry.top[:2])):
        output = make_output(tokenizer, max_new_tokens=1, logprobs=wanted)
        push(output, 70, entry)
        assert output.completion.logprobs == (TokenLogprob(70, -0.5, top),)
    silent = make_output(tokenizer, max_new_tokens=1)
    push(silent, 70, entry)
    assert silent.completion.logprobs is None


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
        loud, silent = (make_output(tokenizer, events=events, **fields) for events in (True, False))
        for output in (loud, silent):
            feed(output, ids)
            if end == "stop id":
                push(output, 0)
            elif end == "cancelled":
                output.end(FinishReason.CANCELLED)
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
        output = make_output(tokenizer, **{"events": False, "max_new_tokens": len(ids), **fields})
        seen: list[int] = []
        output.listen(seen.append)
        feed(output, ids)
        assert output.completion.text == "one two three"
        assert seen == ids
        assert decoded == (ids if needs else [])
        decoded.clear()


def test_steps_are_counted_with_the_tokens_they_brought(tokenizer: Any) -> None:
    output = make_output(tokenizer, max_new_tokens=100)
    prefill, graph, eager = ("prefill", "eager", "why"), ("decode", "cuda graph", "hit"), ("decode", "eager", "missing")
    output.prefilled(prefill)
    push(output, 70)
    for ran in (graph, graph, eager, graph):
        push(output, 71, ran=ran)
    output.prefilled(prefill)  # a longrope request is prefilled again
    push(output, 72)
    push(output, 73, ran=eager)
    push(output, -1, ran=eager)
    output.end_unchosen("the device is tired")
    assert str(output.completion.error) == "the device is tired; run the prompt again"
    assert output.completion.token_ids == (70, *[71] * 4, 72, 73)
    counts = {(step.phase, step.kind, step.reason): step.count for step in output.completion.steps}
    assert counts == {prefill: 2, graph: 3, eager: 3}


def test_several_tokens_of_a_step_are_taken_in_order_up_to_the_end(tokenizer: Any) -> None:
    ran = ("decode", "stub", "none")
    ids = tokenizer("one two three four")["input_ids"]
    for fields, end in (({"max_new_tokens": 6}, 6), ({"stop_token_ids": [ids[5]]}, 6), ({"stop": ["two"]}, None)):
        output = make_output(tokenizer, **{"max_new_tokens": 100, **fields})
        taken = []
        for start in range(0, len(ids), 4):
            taken.append(output.take(ids[start : start + 4], None, float(start), ran))
            if output.completion is not None:
                break
        count = sum(taken)
        assert output.completion.token_ids == tuple(ids[:count])
        assert count == end or (end is None and output.completion.text == "one ")
        assert [event.token_id for event in output.events] == ids[:count]
        assert "".join(event.text for event in output.events) == output.completion.text
        assert [step.count for step in output.completion.steps] == [len(taken)]  # steps, not tokens


def test_logprobs_belong_to_the_tokens_of_the_step(tokenizer: Any) -> None:
    output = make_output(tokenizer, max_new_tokens=3, logprobs=0)
    entries = [TokenLogprob(token, -token / 100) for token in (70, 71, 72, 73)]
    assert output.take([70, 71], entries[:2], 0.0) == 2
    assert output.take([72, 73], entries[2:], 0.0) == 1
    assert output.completion.logprobs == tuple(entries[:3])


def test_tokens_in_front_of_one_that_could_not_be_chosen_are_kept(tokenizer: Any) -> None:
    output = make_output(tokenizer, max_new_tokens=9)
    assert output.take([70, 71, -1], None, 0.0, ("decode", "stub", "none")) == 2
    output.end_unchosen(None)
    assert output.completion.token_ids == (70, 71)
    assert [step.count for step in output.completion.steps] == [1]
    assert "after 3 tokens" in str(output.completion.error)


def test_a_tokenizer_that_fails_ends_the_request_with_an_error(tokenizer: Any) -> None:
    def fail(token: int) -> None:
        if token == 71:
            raise OSError("the pipe is gone")

    output = make_output(tokenizer, max_new_tokens=9)
    output.listen(fail)
    assert output.take([70, 71, 72], None, 0.0) == 2
    assert output.completion.token_ids == (70, 71)
    assert "its output could not be handled: OSError: the pipe is gone" in str(output.completion.error)


def test_times_are_those_of_the_reads(tokenizer: Any) -> None:
    before = time.perf_counter()
    output = make_output(tokenizer, max_new_tokens=2)
    output.prefilled(("prefill", "eager", "why"))
    moments = [time.perf_counter() + 1, time.perf_counter() + 2]
    for moment in moments:
        output.take([70], None, moment)
    timing = output.completion.timing
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
    response = make_output(marked, max_new_tokens=len(ids), stop=stop, events=events, ignore_eos=True)
    shown = feed(response, ids)
    assert response.completion.text == text
    assert response.completion.stop_match == match
    assert not events or shown == text
    in_full = make_output(marked, max_new_tokens=len(ids), stop=stop, skip_special_tokens=False)
    feed(in_full, ids)
    assert in_full.completion.stop_match == match
