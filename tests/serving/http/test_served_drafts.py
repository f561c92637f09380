"""A server that checks drafts: by its socket and by HTTP, streamed or not, what plain runs in this process give."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from places import short_directory
from waiting import HANGS, until
from wire import Process, at_rest

import hybridgen
from hybridgen.demo import model_path

REPEATED = "def add(a, b):\n    return a + b\n\n\n" * 4
PROMPTS = [REPEATED, "import os\n", "x = [1, 2, 1, 2, 1, 2, 1,"]
FIELDS: list[dict[str, Any]] = [
    {"max_new_tokens": 20, "temperature": 0.0, "repetition_penalty": 1.0, "ignore_eos": True},
    {"max_new_tokens": 12, "temperature": 0.8, "seed": 5, "n": 2},
    {"max_new_tokens": 32, "temperature": 0.0, "repetition_penalty": 1.0, "stop": ["+ b\n\n\ndef add(a"]},
]


@pytest.fixture(scope="module", params=["ngram", "model"])
def drafting(request: pytest.FixtureRequest) -> Iterator[Process]:
    """A server with drafts; at the end some were right."""
    options = ("--speculation", "ngram") if request.param == "ngram" else ("--drafter", str(model_path()))
    process = Process(short_directory(), *options, "--metrics", "0")
    yield process
    with process.client() as client:
        stats = client.stats()["engine"]
    assert stats["speculation"]["accepted"] > 30
    assert stats["free_pages"] == stats["pages"]
    assert process.end() == 0, process.log()
    assert "Traceback" not in process.log()


@pytest.fixture(scope="module")
def expected(engine: hybridgen.Engine) -> list[list[hybridgen.Completion]]:
    """What plain runs give, for each of the fields."""
    return [engine.generate(PROMPTS, **fields) for fields in FIELDS]


def test_one_that_is_cancelled_beside_others(drafting: Process, expected: list[list[hybridgen.Completion]]) -> None:
    """A stream that its reader leaves gives its pages back, and the others have their own tokens."""
    with drafting.client() as client:
        left = client.stream(REPEATED, **FIELDS[0] | {"max_new_tokens": 200})
        for _ in range(9):
            next(left)
        left.close()
        assert client.generate(REPEATED, **FIELDS[0]).token_ids == expected[0][0].token_ids
        until(lambda: at_rest(client))


def test_what_became_of_drafts_is_exported(drafting: Process) -> None:
    with drafting.client() as client:
        found = client.generate(REPEATED, **FIELDS[0])
        stats = client.stats()["engine"]["speculation"]
    assert found.accepted_tokens > 3
    assert found.tokens_per_step > 1.2
    with urllib.request.urlopen(f"http://127.0.0.1:{drafting.facts['metrics_port']}/metrics", timeout=HANGS) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    counts = {result: float(lines[f'hybridgen_drafts_total{{drafter="{stats["drafter"]}",result="{result}"}}'])
              for result in ("accepted", "refused")}  # fmt: skip
    assert counts["accepted"] + counts["refused"] == stats["drafted"]
    assert counts["accepted"] == stats["accepted"]


def told(choice: hybridgen.Completion) -> Any:
    return choice.token_ids, choice.text, choice.finish_reason, choice.stop_match


@pytest.mark.parametrize("number", range(len(FIELDS)))
def test_by_the_socket(drafting: Process, expected: list[list[hybridgen.Completion]], number: int) -> None:
    fields, wanted = FIELDS[number], expected[number]
    tokens: dict[tuple[int, int], list[int]] = {}
    texts: dict[tuple[int, int], str] = {}
    with drafting.client() as client:
        for event in client.stream(PROMPTS, **fields):
            whose = event.index, event.choice
            tokens.setdefault(whose, []).extend([] if event.token_id is None else [event.token_id])
            texts[whose] = texts.get(whose, "") + event.text
            if event.completion is not None:
                assert told(event.completion) == told(wanted[event.index].choices[event.choice])
        for index, each in enumerate(wanted):
            for choice, other in enumerate(each.choices):
                assert tuple(tokens[index, choice]) == other.token_ids
                assert texts[index, choice] == other.text
        if "stop" in fields:
            found = client.generate(PROMPTS, **fields)
            assert [list(map(told, each.choices)) for each in found] == [
                list(map(told, each.choices)) for each in wanted
            ]
            assert found[0].stop_match == fields["stop"][0]
            assert found[0].accepted_tokens > 3


def test_by_http(drafting: Process, expected: list[list[hybridgen.Completion]], door: Callable[..., str]) -> None:
    """A stream of several tokens a step: its parts, joined, are the text, in the order of the choices' own tokens."""
    url = door(drafting.path)
    for fields, wanted in zip(FIELDS, expected, strict=True):
        body = {"model": "demo", "prompt": REPEATED, "stream": True, **fields}
        body["max_tokens"] = body.pop("max_new_tokens")
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        with urllib.request.urlopen(request, timeout=HANGS) as answer:
            lines = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        for line in lines:
            for choice in json.loads(line)["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                if choice["finish_reason"]:
                    reasons[choice["index"]] = choice["finish_reason"]
        choices = wanted[0].choices
        assert [texts[index] for index in range(len(choices))] == [each.text for each in choices]
        assert [reasons[index] for index in range(len(choices))] == [str(each.finish_reason) for each in choices]
