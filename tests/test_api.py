"""The front door: models by every name, kept between calls, and bad input found before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch

import hybridgen
from hybridgen import api
from hybridgen.demo import model_path
from hybridgen.loading import Checkpoint

FAST: dict[str, Any] = {"mode": "eager", "max_batch": 4, "page_size": 16, "kv_memory": "16MiB", "dtype": "float32"}
PROMPT = "def read(path):\n"


def test_none_is_the_demo_model() -> None:
    out = hybridgen.generate(None, PROMPT, max_new_tokens=12, **FAST)
    assert out.text == hybridgen.generate(prompts=PROMPT, max_new_tokens=12, **FAST).text
    assert out.text == hybridgen.generate(model_path(), PROMPT, max_new_tokens=12, **FAST).text
    assert len(out.token_ids) == 12


def test_the_second_call_does_not_load_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    real = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self: loads.append(self.name) or real(self))
    first = hybridgen.generate(None, PROMPT, max_new_tokens=4, **FAST)
    again = hybridgen.generate(None, PROMPT, temperature=0.0, max_new_tokens=4, **FAST)
    assert first.token_ids == again.token_ids
    assert len(loads) == 1
    hybridgen.generate(None, PROMPT, max_new_tokens=4, **FAST | {"max_batch": 2})
    assert len(loads) == 2
    assert len(api._engines) == 1  # another config replaces the model
    hybridgen.unload()
    assert not api._engines
    hybridgen.generate(None, PROMPT, max_new_tokens=4, **FAST)
    assert len(loads) == 3


def test_unload_frees_one_model(llama_path: Path) -> None:
    hybridgen.generate(llama_path, [1, 2], max_new_tokens=1, **FAST)
    hybridgen.generate(None, PROMPT, max_new_tokens=1, **FAST)
    kept = api._engines[str(llama_path)]
    hybridgen.unload(llama_path)
    assert kept.closed
    assert list(api._engines) == [None]


def test_a_live_model_and_an_engine() -> None:
    model = families.build("llama")
    expected = families.reference(model, [5, 6, 7], 6)[0]
    assert list(hybridgen.generate(model, [5, 6, 7], max_new_tokens=6, **FAST).token_ids) == expected
    hybridgen.unload(model)
    with hybridgen.Engine.load(model, **FAST) as engine:
        assert list(hybridgen.generate(engine, [5, 6, 7], max_new_tokens=6).token_ids) == expected
        with pytest.raises(hybridgen.ConfigError, match="max_batch= cannot be changed on a loaded Engine"):
            hybridgen.generate(engine, [5, 6, 7], max_batch=2)


def test_a_live_model_with_a_tokenizer_given() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = families.build("llama", vocab_size=len(tokenizer))
    out = hybridgen.generate(model, "def f", tokenizer=tokenizer, max_new_tokens=5, **FAST)
    assert out.text == tokenizer.decode(out.token_ids, skip_special_tokens=True)


def test_prompts_of_every_kind() -> None:
    engine, _ = api.prepare(None, PROMPT, None, None, None, FAST)
    ids = engine.tokenizer(PROMPT)["input_ids"]
    expected = engine.generate(PROMPT, max_new_tokens=6).token_ids
    for prompt in (ids, torch.tensor(ids), torch.tensor(ids).numpy(), engine.tokenizer(PROMPT)):
        assert engine.generate(prompt, max_new_tokens=6).token_ids == expected
    for prompts in ([PROMPT], [ids], torch.tensor([ids]), [torch.tensor(ids)]):
        assert [out.token_ids for out in engine.generate(prompts, max_new_tokens=6)] == [expected]
    engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": PROMPT}]
    assert engine.generate(chat, max_new_tokens=6).token_ids == expected
    assert [out.token_ids for out in engine.generate([chat, chat], max_new_tokens=6)] == [expected] * 2


def test_stream_joins_to_the_text() -> None:
    settings = FAST | {"max_new_tokens": 60, "temperature": 1.0, "seed": 3}
    events = list(hybridgen.stream(None, PROMPT, **settings))
    out = hybridgen.generate(None, PROMPT, **settings)
    assert "".join(event.text for event in events) == out.text == events[-1].completion.text


def test_stop_strings_are_cut_off() -> None:
    whole = hybridgen.generate(None, PROMPT, max_new_tokens=60, **FAST).text
    stop = whole[len(whole) // 2 :][:3]
    out = hybridgen.generate(None, PROMPT, max_new_tokens=60, stop=stop, **FAST)
    assert out.text == whole[: whole.index(stop)]
    assert (out.finish_reason, out.stop_match) == (hybridgen.FinishReason.STOP, stop)
    assert "".join(e.text for e in hybridgen.stream(None, PROMPT, max_new_tokens=60, stop=stop, **FAST)) == out.text


def test_defaults_come_from_the_generation_config() -> None:
    defaults = hybridgen.generate(None, PROMPT, max_new_tokens=30, **FAST)
    assert (
        defaults.token_ids
        == hybridgen.generate(
            None, PROMPT, max_new_tokens=30, temperature=0.0, repetition_penalty=1.2, **FAST
        ).token_ids
    )


def test_a_transformers_streamer() -> None:
    from transformers import TextIteratorStreamer

    engine, _ = api.prepare(None, PROMPT, None, None, None, FAST)
    streamer = TextIteratorStreamer(engine.tokenizer, skip_prompt=True)
    out = hybridgen.generate(None, PROMPT, max_new_tokens=20, streamer=streamer, **FAST)
    assert "".join(streamer) == out.text


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"temperature": -1.0}, hybridgen.SamplingError),
        ({"temperature": float("nan")}, hybridgen.SamplingError),
        ({"temprature": 1.0}, hybridgen.ConfigError),
        ({"mode": "fast"}, hybridgen.ConfigError),
        ({"prompts": ""}, hybridgen.PromptError),
        ({"prompts": []}, hybridgen.PromptError),
        ({"prompts": None}, hybridgen.PromptError),
        ({"prompts": [5, 4096]}, hybridgen.PromptError),
        ({"prompts": [1] * 1000, "max_new_tokens": 25}, hybridgen.PromptError),
        ({"sampling": [hybridgen.SamplingParams()] * 2}, hybridgen.SamplingError),
        ({"device": "cuda:99"}, hybridgen.DeviceError),
        ({"model": "no/such/path"}, hybridgen.ModelNotFoundError),
        ({"model": "./missing"}, hybridgen.ModelNotFoundError),
    ],
)
def test_bad_input_is_found_before_weights_are_read(
    fields: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Checkpoint) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "load", load)
    call = {"model": None, "prompts": PROMPT} | FAST | fields
    with pytest.raises(error) as caught:
        hybridgen.generate(**call)
    assert isinstance(caught.value, hybridgen.HybridgenError)
