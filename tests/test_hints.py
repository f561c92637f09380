"""Keywords of other libraries are answered with what to write instead."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

import hybridgen
from hybridgen import Completion, ConfigError, EngineConfig, SamplingError, SamplingParams
from hybridgen.cli.main import main
from hybridgen.hints import HINTS, unknown

FIELDS = SamplingParams.field_names() | EngineConfig.field_names()
CALL = {"prompts", "sampling"}
"""Other keywords of `generate()`."""

NAMES = (
    "max_tokens", "max_length", "do_sample", "num_beams", "num_return_sequences", "max_model_len", "max_num_seqs",
    "enforce_eager", "pad_token_id", "guided_json",
)  # fmt: skip

CALLS: dict[str, Callable[..., Any]] = {
    "generate": lambda **fields: hybridgen.generate("/no/such/model", "x", **fields),
    "stream": lambda **fields: hybridgen.stream("/no/such/model", "x", **fields),
    "server": lambda **fields: hybridgen.generate("unix:/no/such/server", "x", **fields),
    "Engine.load": lambda **fields: hybridgen.Engine.load("/no/such/model", **fields),
    "compare": lambda **fields: hybridgen.compare("/no/such/model", **fields),
    "SamplingParams": SamplingParams,
    "EngineConfig": EngineConfig,
}


def test_no_hint_is_for_a_field_and_each_names_real_ones() -> None:
    assert not FIELDS & set(HINTS)
    for name, text in HINTS.items():
        named = set(re.findall(r"\b([a-z_]+)=", text))
        assert named <= FIELDS | CALL, name
        for attribute in re.findall(r"Completion\.(\w+)", text):
            assert hasattr(Completion, attribute) or attribute in Completion.__dataclass_fields__, name


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES)
def test_each_call_says_what_to_write(call: str, name: str) -> None:
    with pytest.raises((ConfigError, SamplingError), match=f"^unknown keyword '{name}'; ") as caught:
        CALLS[call](**{name: 1})
    assert str(caught.value).endswith(HINTS[name])


def test_other_keywords_are_answered_with_the_nearest() -> None:
    assert unknown("temprature", FIELDS) == "unknown keyword 'temprature'; did you mean 'temperature'?"
    assert unknown("zzz", ("a", "b")) == "unknown keyword 'zzz'; known are: a, b"
    with pytest.raises(SamplingError, match="did you mean 'top_k'"):
        SamplingParams(topk=5)


def test_a_field_in_the_wrong_place() -> None:
    with pytest.raises(ConfigError, match=r"temperature= is a field of SamplingParams; give it to each call"):
        hybridgen.Engine.load("/no/such/model", temperature=1)
    with pytest.raises(ConfigError, match=r"top_p= is a field of SamplingParams"):
        hybridgen.compare("/no/such/model", top_p=1)


def test_the_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "x", "--max-tokens", "5"])
    assert "unknown: --max-tokens" in (error := capsys.readouterr().err)
    assert "write --max-new-tokens\n" in error


@pytest.mark.parametrize("kind", [SamplingParams, EngineConfig])
def test_fields_keep_their_signature_and_copies(kind: type) -> None:
    assert list(inspect.signature(kind).parameters) == list(kind.__dataclass_fields__)
    made = kind()
    assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made
