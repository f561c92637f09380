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
    kept = api._engines[str(llama_path.resolve())].engine
    hybridgen.unload(llama_path)
    assert kept.closed
    assert list(api._engines) == [str(model_path())]


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
        ({"sampling": "greedy"}, hybridgen.SamplingError),
        ({"sampling": 5}, hybridgen.SamplingError),
        ({"config": {"mode": "eager"}}, hybridgen.ConfigError),
        ({"config": "eager"}, hybridgen.ConfigError),
        ({"temperature": 10**400}, hybridgen.SamplingError),
        ({"kv_memory": "9" * 400}, hybridgen.ConfigError),
        ({"mode": "jit", "compile_backend": "no such backend"}, hybridgen.ConfigError),
        ({"compile_backend": None}, hybridgen.ConfigError),
        ({"max_context": 10**6}, hybridgen.ConfigError),
        ({"prompts": b"text"}, hybridgen.PromptError),
        ({"prompts": "a \ud800 b"}, hybridgen.PromptError),
        ({"prompts": torch.zeros(0, 3, dtype=torch.int64)}, hybridgen.PromptError),
        ({"prompts": [1] * 1000, "min_new_tokens": 25}, hybridgen.PromptError),
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
    for function in (hybridgen.generate, hybridgen.stream):
        with pytest.raises(error) as caught:
            function(**call)
        assert isinstance(caught.value, hybridgen.HybridgenError)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models whose weights are read."""
    names: list[str] = []
    real = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self: names.append(self.name) or real(self))
    return names


def test_a_padded_batch() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    texts = [PROMPT, "import"]
    expected = hybridgen.generate(None, texts, max_new_tokens=6, **FAST)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        assert not batch["attention_mask"].all()
        for given in (batch, dict(batch), tokenizer(texts, padding=True)):
            out = hybridgen.generate(None, given, max_new_tokens=6, **FAST)
            assert [o.token_ids for o in out] == [o.token_ids for o in expected]
            assert [o.prompt_token_ids for o in out] == [o.prompt_token_ids for o in expected]


def test_sampling_from_an_iterator(loads: list[str]) -> None:
    def params() -> Any:
        yield hybridgen.SamplingParams(max_new_tokens=3)
        yield hybridgen.SamplingParams(max_new_tokens=5)

    for _ in range(2):  # loading, and kept
        out = hybridgen.generate(None, [PROMPT, PROMPT], params(), **FAST)
        assert [len(o.token_ids) for o in out] == [3, 5]
        hybridgen.unload()
        events = list(hybridgen.stream(None, [PROMPT, PROMPT], params(), **FAST))
        assert sum(event.token_id is not None for event in events) == 8
    assert len(loads) == 3


def test_a_tokenizer_by_its_path_loads_once(
    llama_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_path().parent)
    for tokenizer in (str(model_path()), model_path(), "model", "./model/"):
        assert hybridgen.generate(llama_path, [5], tokenizer=tokenizer, max_new_tokens=3, **FAST).text
    assert len(loads) == 1


def test_a_tokenizer_given_holds_for_its_call(loads: list[str]) -> None:
    from transformers import AutoTokenizer

    mine = AutoTokenizer.from_pretrained(model_path())
    other = AutoTokenizer.from_pretrained(model_path())
    own = hybridgen.generate(None, PROMPT, max_new_tokens=3, **FAST)
    engine, _ = api.prepare(None, PROMPT, None, None, mine, FAST)
    assert engine.tokenizer is mine
    assert api.prepare(None, PROMPT, None, None, mine, FAST)[0] is engine
    assert api.prepare(None, PROMPT, None, None, other, FAST)[0].tokenizer is other
    assert hybridgen.generate(None, PROMPT, max_new_tokens=3, **FAST).text == own.text
    assert next(iter(api._engines.values())).engine.tokenizer not in (mine, other)
    assert len(loads) == 4
    assert len(api._engines) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "jit", "compile_backend": "none such"},
        {"max_context": 10**6},
        {"device": "cuda:99"},
        {"temperature": -1.0},
    ],
)
def test_a_bad_call_leaves_the_kept_model(fields: dict[str, Any], loads: list[str]) -> None:
    engine, _ = api.prepare(None, PROMPT, None, None, None, FAST)
    with pytest.raises(hybridgen.HybridgenError):
        hybridgen.generate(None, PROMPT, **FAST | {"max_batch": 2} | fields)
    assert not engine.closed
    assert api.prepare(None, PROMPT, None, None, None, FAST)[0] is engine
    assert len(loads) == 1


def test_one_directory_is_one_model_by_every_name(
    llama_path: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(llama_path)
    monkeypatch.chdir(llama_path.parent)
    name = llama_path.name
    for model in (llama_path, str(llama_path), f"{llama_path}/", name, f"./{name}", f"{name}/", Path(name), link):
        hybridgen.generate(model, [5], max_new_tokens=1, **FAST)
    assert (len(loads), len(api._engines)) == (1, 1)
    hybridgen.unload(f"{name}/")
    assert not api._engines


def test_a_relative_path_is_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {}
    for place, vocab_size in (("a", 128), ("b", 160)):
        families.write("llama", tmp_path / place, vocab_size=vocab_size).rename(tmp_path / place / "model")
        monkeypatch.chdir(tmp_path / place)
        sizes[place] = api.prepare("model", [5], None, None, None, FAST)[0].checkpoint.vocab_size
    assert sizes == {"a": 128, "b": 160}
    monkeypatch.chdir(tmp_path / "a")
    hybridgen.unload("model")
    assert list(api._engines) == [str((tmp_path / "b" / "model").resolve())]


def test_unload_an_engine(llama_path: Path) -> None:
    kept, _ = api.prepare(None, PROMPT, None, None, None, FAST)
    mine = hybridgen.Engine.load(llama_path, **FAST)
    hybridgen.unload(mine)
    assert mine.closed
    assert not kept.closed
    hybridgen.unload(kept)
    assert kept.closed
    assert not api._engines
    hybridgen.unload(kept)  # as close(), twice is fine


def test_unload_what_is_not_loaded(llama_path: Path) -> None:
    with pytest.raises(hybridgen.ConfigError, match=r"model='owner/name' is not loaded; none is"):
        hybridgen.unload("owner/name")
    hybridgen.generate(llama_path, [1], max_new_tokens=1, **FAST)
    for unknown in ("owner/name", "./missing", object(), "x" * 1000):
        with pytest.raises(hybridgen.ConfigError, match=r"model=.* is not loaded; loaded are '/.*unload\(\) frees all"):
            hybridgen.unload(unknown)
    assert len(api._engines) == 1
    hybridgen.unload()
    hybridgen.unload()  # nothing to free is no error


def test_unload_a_directory_that_is_gone(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path)
    hybridgen.generate(path, [1], max_new_tokens=1, **FAST)
    path.rename(tmp_path / "moved")
    hybridgen.unload(path)
    assert not api._engines
