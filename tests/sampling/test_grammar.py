"""Text that keeps to a grammar: every finished output is checked by another library, whatever the model would write."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import forks
import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hybridgen
from hybridgen import ConfigError, FinishReason, SamplingError, TokenizerError
from hybridgen.sampling.grammar_trial import needs_trial, try_apart

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[hybridgen.Engine]:
    with hybridgen.Engine.load(mode="eager", dtype="float32", device="cpu", max_batch=8) as loaded:
        yield loaded


def test_following_a_grammar_imports_nothing_more() -> None:
    """What a step imports holds up everybody's: the first grammar of a server stopped all streams for two seconds."""
    script = """
import sys
import hybridgen
from hybridgen.sampling.grammar import constraint_of, fill
import torch
engine = hybridgen.Engine.load(mode="eager", device="cpu")
engine.generate("a", max_new_tokens=1)
checkpoint = engine.checkpoint
row = constraint_of(
    hybridgen.SamplingParams(regex="ab+"), checkpoint.tokenizer, None, checkpoint.vocab_size, checkpoint.eos_token_ids
).begin()
before = set(sys.modules)
bits = torch.zeros(6, -(-checkpoint.vocab_size // 32), dtype=torch.int32)
fill([row], bits)
assert not set(sys.modules) - before, sorted(set(sys.modules) - before)[:9]
"""
    forks.run([sys.executable, "-c", script], check=True, timeout=120)


def finished(outs: Any) -> list[str]:
    """The texts that ended by themselves; at temperature 2 some meet their limit first."""
    return [out.text for each in outs for out in each.choices if out.finish_reason is FinishReason.STOP]


SCALARS = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "integer", "minimum": 3, "maximum": 40},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": "^[ab]{2,3}$"},
        {"enum": ["red", 3, None]},
        {"const": {"a": [1, "two"]}},
    ]
)


def _objects(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    fields = st.dictionaries(st.sampled_from(["a", "b c", "é"]), inside, min_size=1, max_size=3)
    return st.tuples(fields, st.booleans()).map(
        lambda pair: {
            "type": "object",
            "properties": pair[0],
            "required": list(pair[0]) if pair[1] else [],
            "additionalProperties": False,
        }
    )


SCHEMAS = st.recursive(
    SCALARS,
    lambda inside: (
        _objects(inside)
        | inside.map(lambda item: {"type": "array", "items": item, "maxItems": 3})
        | st.lists(inside, min_size=1, max_size=2).map(lambda items: {"anyOf": items})
    ),
    max_leaves=4,
)


def check_schemas(engine: hybridgen.Engine, schemas: list[Any]) -> None:
    sampling = [
        hybridgen.SamplingParams(json_schema={"anyOf": [schema]}, temperature=2.0, seed=place, max_new_tokens=80)
        for place, schema in enumerate(schemas)
    ]
    outs = engine.generate(["x ="] * len(schemas), sampling)
    for schema, out in zip(schemas, outs, strict=True):
        assert out.error is None
        assert not re.search(r"\s{3,}", re.sub(r'"(\\.|[^"\\])*"', '""', out.text))  # none that has no end
        if out.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(out.text), schema)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(schemas=st.lists(SCHEMAS, min_size=8, max_size=8))
def test_every_finished_text_is_of_its_schema(engine: hybridgen.Engine, schemas: list[Any]) -> None:
    check_schemas(engine, schemas)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(schemas=st.lists(SCHEMAS, min_size=8, max_size=8))
def test_three_hundred_schemas(engine: hybridgen.Engine, schemas: list[Any]) -> None:
    check_schemas(engine, schemas)


@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[a-f]{1,6}", r"(yes|no), \w{2,8}!", r"é{1,3}漢?\n"])
def test_regexes(engine: hybridgen.Engine, pattern: str) -> None:
    outs = engine.generate(["def f", "x"], regex=pattern, temperature=2.0, seed=1, n=3, max_new_tokens=60)
    texts = finished(outs)
    assert texts
    assert all(re.fullmatch(pattern, text) for text in texts)


def test_choices_and_a_lark_grammar(engine: hybridgen.Engine) -> None:
    texts = ['a "quoted" one', "def g():\n    pass", "漢字 \\ done"]
    outs = engine.generate(["def f"] * 2, choice=texts, temperature=2.0, seed=1, n=4, max_new_tokens=60)
    assert len(finished(outs)) == 8
    assert set(finished(outs)) <= set(texts)
    out = engine.generate("x", grammar='start: "<" /[a-c]{2}/ ">"', temperature=2.0, seed=1)
    assert re.fullmatch("<[a-c]{2}>", out.text)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_rows_without_a_grammar_keep_their_results(mode: str) -> None:
    with hybridgen.Engine.load(mode=mode, dtype="float32", device="cpu", max_batch=4, max_context=256) as engine:
        plain = hybridgen.SamplingParams(temperature=0.9, seed=3, max_new_tokens=24)
        alone = engine.generate("def read(path):", plain)
        bound = hybridgen.SamplingParams(json_schema=PERSON, temperature=1.5, seed=4, max_new_tokens=60)
        both = engine.generate(["def read(path):", "def read(path):"], [plain, bound])
        assert both[0].token_ids == alone.token_ids
        if both[1].finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(both[1].text), PERSON)
        assert both[1].text.startswith('{"name"')
        again = engine.generate("def read(path):", bound)
        assert again.token_ids == both[1].token_ids


@pytest.mark.parametrize("rows", [1, 7])
def test_a_mask_for_each_draft(engine: hybridgen.Engine, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the drafts before were the text; the way itself goes on from where it was. With threads and without."""
    from hybridgen.sampling import grammar

    monkeypatch.setattr(grammar, "_most_threads", lambda: 2)
    checkpoint = engine.checkpoint
    [end, *_] = checkpoint.eos_token_ids
    made = grammar.constraint_of(
        hybridgen.SamplingParams(regex="ab?c"), checkpoint.tokenizer, None, checkpoint.vocab_size, (end,)
    )
    ids = {letter: checkpoint.tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "abcx"}
    drafts = [
        [ids["a"], ids["b"], ids["c"]],
        [ids["a"], ids["c"], end],
        [ids["a"], -1, -1],
        [ids["x"], ids["b"], ids["c"]],  # which may not come
        [-1, -1, -1],
        [ids["a"], ids["b"], ids["b"]],
        [checkpoint.vocab_size + 5, -1, -1],
    ][:rows]
    words = -(-checkpoint.vocab_size // 32)
    bits = torch.zeros(4 * rows, words, dtype=torch.int32)
    ways = [made.begin() for _ in drafts]
    grammar.fill_with_drafts(ways, drafts, bits)
    for row, said in enumerate(drafts):
        alone, open_ = made.begin(), True
        for place in range(4):
            expected = torch.full((1, words), -1, dtype=torch.int32)
            if place:
                draft, line = said[place - 1], bits[4 * row + place - 1]
                open_ = open_ and 0 <= draft < 32 * words and bool(int(line[draft // 32]) >> draft % 32 & 1)
                if open_:
                    alone.accept(draft)
            if open_:
                grammar.fill([alone], expected)
            assert torch.equal(bits[4 * row + place], expected[0]), (row, place)
    assert not torch.equal(bits[0], bits[1])
    again = torch.zeros(rows, words, dtype=torch.int32)
    grammar.fill(ways, again)
    assert torch.equal(again, bits[::4])
    assert all(way.failure is None for way in ways)


def test_beside_speculation_and_functions() -> None:
    """Drafts change no token of a row with a grammar, and a row's functions come before it."""
    settings = {"mode": "eager", "dtype": "float32", "device": "cpu", "max_batch": 6}
    wanted = {"json_schema": PERSON, "temperature": 1.2, "seed": 1, "n": 6, "max_new_tokens": 40}

    def favour(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits + 4.0 * (torch.arange(len(logits)) % 2)

    with hybridgen.Engine.load(**settings) as plain, hybridgen.Engine.load(speculation="ngram", **settings) as drafting:
        for fields in (wanted, wanted | {"logits_processors": [favour]}):
            outs = [engine.generate("def f(x):", **fields).choices for engine in (plain, drafting)]
            assert [out.token_ids for out in outs[0]] == [out.token_ids for out in outs[1]]
            for text in finished([each for out in outs for each in out]):
                jsonschema.validate(json.loads(text), PERSON)


def test_each_of_n_completions_follows_it_alone(engine: hybridgen.Engine) -> None:
    out = engine.generate("x =", json_schema=PERSON, temperature=1.2, seed=0, n=4, max_new_tokens=90)
    assert len({each.token_ids for each in out.choices}) > 1
    for text in finished([out]):
        jsonschema.validate(json.loads(text), PERSON)


def test_rows_that_run_at_a_time_have_lexers_of_their_own(
    engine: hybridgen.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that share one have their masks made one after the other, however many threads there are."""
    from hybridgen.sampling import grammar

    def wanted(text: str) -> grammar.Constraint:
        checkpoint = engine.checkpoint
        made = grammar.constraint_of(
            hybridgen.SamplingParams(regex=text),
            checkpoint.tokenizer,
            None,
            checkpoint.vocab_size,
            checkpoint.eos_token_ids,
        )
        assert made is not None
        return made

    bits = torch.zeros(20, -(-engine.checkpoint.vocab_size // 32), dtype=torch.int32)
    constraint = wanted("[ab]{2,9}")
    rows = [constraint.begin() for _ in range(20)]
    lexers = [row.matcher.lexer for row in rows]
    assert sorted(lexers) == sorted([*range(grammar._LEXERS), *range(4)])
    for cores in (2, 4):  # by the calling thread, and by several
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        grammar.fill(rows, bits.zero_())
        assert bits[0].any()
        assert (bits == bits[0]).all()
    alone = torch.zeros(1, bits.shape[1], dtype=torch.int32)
    grammar.fill([constraint.begin()], alone)
    assert torch.equal(alone[0], bits[0])
    del rows[3]
    assert constraint.begin().matcher.lexer == lexers[3]  # the one that has the fewest
    monkeypatch.setattr(grammar, "_NOTICED", -1.0)
    dear = wanted("[bc]{2,9}")
    assert {row.matcher.lexer for row in [dear.begin() for _ in range(3)]} == {0}


def test_with_stop_strings_and_a_least_length(engine: hybridgen.Engine) -> None:
    out = engine.generate("x", choice=["alpha beta"], stop=" ", temperature=0)
    assert out.text == "alpha"
    short = engine.generate("x", choice=["a"], min_new_tokens=9, temperature=0, errors="return")
    assert short.error is not None  # neither can be kept: nothing is left to choose
    assert "no token is left" in str(short.error)


def test_a_stream_joins_to_the_text(engine: hybridgen.Engine) -> None:
    whole = engine.generate("x", json_schema=PERSON, temperature=0, max_new_tokens=40)
    assert "".join(
        event.text for event in engine.stream("x", json_schema=PERSON, temperature=0, max_new_tokens=40)
    ) == (whole.text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"not": {"type": "null"}}}, "cannot be kept to"),
        ({"json_schema": {"properties": {"a": {"patternProperties": {"^x": {}}}}}}, "patternProperties"),
        ({"json_schema": "{"}, "is no JSON schema"),
        ({"json_schema": {"a": {1}}}, "is no JSON schema"),
        ({"json_schema": [1]}, "is no JSON schema"),
        ({"regex": "a("}, "unclosed group"),
        ({"regex": ""}, "not empty"),
        ({"grammar": "begin: x"}, "cannot be kept to"),
        ({"choice": []}, "not empty"),
        ({"choice": ["a", 3]}, "not empty"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice"),
        ({"regex": "a", "ignore_eos": True}, "would never end"),
        ({"regex": "a" * 70_000}, "over the limit of 65536"),
    ],
)
def test_what_cannot_be_kept_to_is_said_before_it_runs(
    engine: hybridgen.Engine, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(SamplingError, match=words):
        engine.generate("x", **fields)


def test_names_that_look_like_keys_are_names(engine: hybridgen.Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"patternProperties": {"const": {"patternProperties": 1}}},
        "required": ["patternProperties"],
        "additionalProperties": False,
    }
    out = engine.generate("x", json_schema=schema, temperature=0, max_new_tokens=60)
    assert json.loads(out.text) == {"patternProperties": {"patternProperties": 1}}


def _rules(count: int) -> str:
    """Rules that each hold the next one twice."""
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(count)) + f'\nr{count}: "x"?'


HOSTILE: dict[str, dict[str, Any]] = {
    "stars": {"regex": "(a|a)*" * 200 + "b"},
    "nested counts": {"regex": "(((((a{1,50}){1,50}){1,50}){1,50}){1,50})"},
    "nested counts and an end": {"regex": "(((((a{1000}){1000}){1000}){1000}){1000}) "},
    "anything": {"regex": ".*" * 3000},
    "thirty thousand times perhaps": {"regex": "a?" * 30000},
    "deep": {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000},
    "three thousand times perhaps": {"grammar": "start: " + ' "a"?' * 3000},
    "a chain that ended the process": {"grammar": _rules(3000)},
    "the same of terminals": {"grammar": _rules(60).replace("r", "R").replace("staRt", "start")},
    "a thousand objects": {
        "json_schema": {"anyOf": [{"type": "object", "properties": {f"k{i}": {}}} for i in range(1000)]}
    },
    "patterns all at once": {"json_schema": {"allOf": [{"type": "string", "pattern": f"a{i}.*"} for i in range(40)]}},
    "patterns all at once, anywhere": {
        "json_schema": {"allOf": [{"type": "string", "pattern": f"^.*a{i}.*$"} for i in range(40)]}
    },
    "3^7 objects": {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"{i} {j}": {}}} for j in range(3)]} for i in range(7)
            ]
        }
    },
    "a divisor": {"json_schema": {"type": "integer", "multipleOf": 9973 * 9967}},
}


def _spent() -> float:
    """Seconds of processor time, of this process and of those that it waited for."""
    return sum(os.times()[:4])


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_hostile_grammars_fail_or_run_within_a_second(engine: hybridgen.Engine, fields: dict[str, Any]) -> None:
    """Its own request alone fails, if any."""
    engine.generate("x", regex="a", max_new_tokens=1)  # the tokenizer is read
    begun = _spent()
    out = engine.generate(["x", "x"], [
        hybridgen.SamplingParams(max_new_tokens=4, temperature=0),
        hybridgen.SamplingParams(max_new_tokens=4, temperature=0, **fields),
    ], errors="return")  # fmt: skip
    assert out[0].error is None
    assert _spent() - begun < 1


def test_only_what_may_take_long_is_tried_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not needs_trial("json_schema", json.dumps(PERSON))
    assert not needs_trial("regex", r"[0-9]{3}-[a-f]{1,6}")
    assert not needs_trial("choice", "[]")
    for kind, text in (
        ("json_schema", '{"pattern": "a"}'),
        ("json_schema", r'{"pa\u0074tern": "a"}'),
        ("json_schema", '{"properties": {"' + "a" * 9000 + '": {}}}'),
        ("regex", "a?" * 300),
        ("grammar", 'start: "a"'),
    ):
        assert needs_trial(kind, text)
        try_apart(kind, text)
    try_apart("grammar", 'start: "<a>" <|end|>')
    chain = _rules(3000).replace("start:", "start: <|end|>")
    with pytest.raises(SamplingError, match="goes too deep"):  # a token that the trial's vocabulary lacks hides nothing
        try_apart("grammar", chain)
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(SamplingError, match="no Python"):
        try_apart("grammar", 'start: "a"')


def test_without_a_tokenizer_or_the_package(engine: hybridgen.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridgen.sampling import grammar

    with pytest.raises(TokenizerError, match="regex needs a tokenizer"):
        grammar.constraint_of(hybridgen.SamplingParams(regex="a"), None, None, 10, [0])
    grammar._compiled.cache_clear()
    grammar._vocabulary.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "llguidance.hf", None)
    with pytest.raises(ConfigError, match=r"hybridgen\[grammar\]"):
        engine.generate("x", regex="a")
