"""Options of a generation_config in an engine, in every mode: token for token what transformers generates."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridgen import CheckpointError, Engine, SamplingParams, TokenizerError
from hybridgen.demo import model_path

MODES = ["eager", "jit", "graph", "hybrid"]
SETTINGS: dict[str, Any] = {
    "max_batch": 8,
    "page_size": 16,
    "token_budget": 48,
    "kv_memory": "16MiB",
    "max_context": 256,
    "compile_backend": "eager",  # what its graphs are made of is for test_families.py
}
RECORDED: dict[str, Any] = {"max_padding_ratio": 64, "decode_buckets": (1, 2, 4, 8), "prefill_buckets": (8, 32)}
PROMPTS = families.prompts_of((1, 5, 60, 17))
FIELDS: dict[str, Any] = {"initializer_range": 0.2, "num_hidden_layers": 2}
"""Of the model: weights so small that draws differ."""
NEW = 16
EOS = 7


def settings(mode: str, **fields: Any) -> dict[str, Any]:
    return {"mode": mode, **SETTINGS, **(RECORDED if mode in ("graph", "hybrid") else {}), **fields}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("options"), **FIELDS)


@pytest.fixture(scope="module")
def reference(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


@torch.no_grad()
def generated(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """What transformers generates greedily."""
    ids = torch.tensor([prompt])
    fields = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": EOS} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **fields)[0, len(prompt) :].tolist()


def options_for(plain: list[int], prompt: list[int]) -> list[dict[str, Any]]:
    """Options that change this text, one or a few at a time."""
    pair, triple = plain[3:5], plain[5:8]
    return [
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [pair, triple, [plain[9]], [EOS]]},
        {"sequence_bias": [[pair, -20.0], [[prompt[-1], plain[0]], -9.5], [[plain[1]], 0.5]]},
        {"suppress_tokens": plain[:3]},
        {"begin_suppress_tokens": plain[:1], "forced_eos_token_id": 11},
        {"forced_bos_token_id": 13, "begin_suppress_tokens": plain[:2]},
        {"min_new_tokens": 9, "no_repeat_ngram_size": 3, "repetition_penalty": 1.2, "suppress_tokens": [plain[2]]},
    ]


@pytest.fixture(scope="module")
def rows(reference: Any) -> tuple[list[tuple[list[int], dict[str, Any]]], list[list[int]]]:
    """Prompts with the options of a row each, and what transformers generates."""
    requests, expected, changed = [], [], 0
    for prompt in PROMPTS:
        plain = generated(reference, prompt)
        for options in options_for(generated(reference, prompt, eos_token_id=None), prompt):
            requests.append((prompt, options))
            expected.append(generated(reference, prompt, **options))
            changed += expected[-1] != plain
        requests.append((prompt, {}))
        expected.append(plain)
    assert changed > 20
    return requests, expected


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_different_options_in_one_batch(path: Path, rows: Any, mode: str) -> None:
    requests, expected = rows
    params = [SamplingParams(max_new_tokens=NEW, **options) for _, options in requests]
    with Engine.load(path, **settings(mode)) as engine:
        engine.checkpoint.generation_config.eos_token_id = EOS
        object.__setattr__(engine.checkpoint, "eos_token_ids", (EOS,))
        for _ in range(2):  # with graphs, the second time in those that the first one wanted
            outs = engine.generate([prompt for prompt, _ in requests], params)
            assert [list(out.token_ids) for out in outs] == expected
        if mode in ("graph", "hybrid"):
            engine.idle()
            assert any("history" in row.sampling for row in engine.stats().graphs.graphs)
            assert any(step.kind == "layers, stand-in" for out in outs for step in out.steps)


@pytest.mark.parametrize("mode", ["eager", "graph", "hybrid"])  # which runs the compiled layers of jit
def test_the_file_decides_where_the_caller_says_nothing(
    path: Path, reference: Any, mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = families.build("llama", **FIELDS)
    model.save_pretrained(tmp_path)
    prompt = PROMPTS[1]
    plain = generated(reference, prompt, eos_token_id=None)
    options = {"no_repeat_ngram_size": 2, "bad_words_ids": [plain[3:5], [plain[1]]], "suppress_tokens": [plain[2]]}
    (tmp_path / "generation_config.json").write_text(json.dumps(options | {"max_new_tokens": NEW}))
    with Engine.load(tmp_path, **settings(mode)) as engine:
        assert list(engine.generate(prompt).token_ids) == generated(reference, prompt, eos_token_id=None, **options)
        off = engine.generate(prompt, no_repeat_ngram_size=0, bad_words_ids=[], suppress_tokens=[])
        assert list(off.token_ids) == plain
    told = [record for record in caplog.records if record.name.startswith("hybridgen") and record.levelno > 20]
    assert all("applied where a call does not say otherwise" in record.getMessage() for record in told)  # and no other


def test_stop_strings_of_the_file(tmp_path: Path) -> None:
    shutil.copytree(model_path(), tmp_path, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    said = {"stop_strings": ["return", "):"], "max_new_tokens": 40, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    prompt = "def fibonacci(n"
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        theirs = model.generate(**ids, do_sample=False, pad_token_id=0, eos_token_id=None, tokenizer=tokenizer, **said)[
            0, ids["input_ids"].shape[1] :
        ]
    with Engine.load(tmp_path, **settings("eager", dtype="float32")) as engine:
        ours = engine.generate(prompt, ignore_eos=True)
        assert list(ours.token_ids) == theirs.tolist()
        assert ours.stop_match in said["stop_strings"]
        assert engine.generate(prompt, ignore_eos=True, stop=[]).stop_match is None
    live = families.build("llama")
    live.generation_config.stop_strings = ["x"]
    with Engine.load(live, **settings("eager")) as engine:
        with pytest.raises(TokenizerError, match="stop=\\[\\] leaves it out"):
            engine.generate([5, 6], max_new_tokens=2)
        assert len(engine.generate([5, 6], max_new_tokens=2, stop=[]).token_ids) == 2


def test_lengths_of_the_file_count_the_prompt(tmp_path: Path, reference: Any) -> None:
    families.build("llama", **FIELDS).save_pretrained(tmp_path)
    prompt = PROMPTS[1]
    plain = generated(reference, prompt, eos_token_id=None)
    lengths = {"max_length": 20, "min_length": 12, "eos_token_id": plain[2]}
    (tmp_path / "generation_config.json").write_text(json.dumps(lengths))
    with Engine.load(tmp_path, **settings("eager")) as engine:
        ours = list(engine.generate(prompt).token_ids)
        assert ours == generated(reference, prompt, eos_token_id=plain[2], min_length=12, max_new_tokens=15)
        assert len(ours) >= 7
        assert list(engine.generate(prompt, min_new_tokens=0).token_ids) == plain[:3]
        assert len(engine.generate(PROMPTS[2]).token_ids) == 1  # longer than max_length: one token, not none


def test_suppressed_ids_that_the_model_does_not_have_change_nothing(tmp_path: Path, reference: Any) -> None:
    """As in transformers: published files of a family are written for its largest vocabulary."""
    families.build("llama", **FIELDS).save_pretrained(tmp_path)
    plain = generated(reference, PROMPTS[1], eos_token_id=None)
    options = {"suppress_tokens": [plain[0], 10**9]}
    expected = generated(reference, PROMPTS[1], eos_token_id=None, **options)
    assert expected != plain
    (tmp_path / "generation_config.json").write_text(json.dumps(options | {"max_new_tokens": NEW}))
    with Engine.load(tmp_path, **settings("eager")) as engine:
        assert list(engine.generate(PROMPTS[1]).token_ids) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"no_repeat_ngram_size": -1}, ["no_repeat_ngram_size=-1"]),
        ({"bad_words_ids": [[3], []]}, ["bad_words_ids"]),
        ({"bad_words_ids": [[3, 100_000]]}, ["bad_words_ids", "100000"]),
        ({"sequence_bias": [[[3], "a"]]}, ["sequence_bias", "'a'"]),
        ({"suppress_tokens": [-4]}, ["suppress_tokens=-4"]),
        ({"forced_eos_token_id": 100_000}, ["forced_eos_token_id", "100000"]),
        ({"min_length": "long"}, ["long"]),
        ({"do_sample": True, "typical_p": 0}, ["typical_p=0"]),
        ({"do_sample": True, "eta_cutoff": 1.0}, ["eta_cutoff=1.0"]),
        ({"do_sample": True, "typical_p": 2.5}, ["typical_p=2.5"]),
        ({"stop_strings": [5]}, ["stop", "5"]),
        ({"stop_strings": 5}, ["stop", "5"]),
        ({"sequence_bias": "x"}, ["sequence_bias"]),
        ({"repetition_penalty": -1.0}, ["repetition_penalty=-1.0"]),
    ],
)
def test_a_bad_value_is_refused_at_load(path: Path, tmp_path: Path, options: dict[str, Any], words: list[str]) -> None:
    families.build("llama").save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(options))
    with pytest.raises(CheckpointError) as caught:
        Engine.load(tmp_path, **settings("eager"))
    for word in (str(file), *words):
        assert word in str(caught.value)


def test_what_is_not_applied_is_named_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    families.build("llama").save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    said = {"num_beams": 4, "guidance_scale": 1.5, "encoder_no_repeat_ngram_size": 2, "diversity_penalty": 0.0}
    harmless = {"remove_invalid_values": False, "max_time": None, "do_sample": False, "top_h": 0.5, "use_cache": True}
    file.write_text(json.dumps(said | harmless))
    with caplog.at_level(logging.WARNING, "hybridgen"), Engine.load(tmp_path, **settings("eager")):
        pass
    (record,) = [record for record in caplog.records if record.name.startswith("hybridgen")]
    message = record.getMessage()
    assert str(file) in message
    for name in ("num_beams=4", "guidance_scale=1.5", "encoder_no_repeat_ngram_size=2"):
        assert name in message
    for name in ("diversity_penalty", *harmless):
        assert name not in message
