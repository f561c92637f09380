"""What of a model's `generation_config` is named when it is loaded."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from hybridgen.config import EngineConfig
from hybridgen.errors import CheckpointError
from hybridgen.loading import Checkpoint
from hybridgen.loading.files import _tell_of_applied, check_generation


def test_what_changes_texts_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    _tell_of_applied.cache_clear()
    config = GenerationConfig(repetition_penalty=1.1, suppress_tokens=[3], do_sample=True, temperature=0.6)
    for _ in range(2):
        check_generation(config, (), 100, "a/model")
    assert [record.getMessage() for record in caplog.records] == [
        "a/model: applied where a call does not say otherwise: repetition_penalty=1.1, suppress_tokens=[3]; "
        "SamplingParams says how each is switched off"
    ]


def test_what_changes_nothing_is_not(caplog: pytest.LogCaptureFixture) -> None:
    check_generation(GenerationConfig(repetition_penalty=1.0, no_repeat_ngram_size=0), (), 100, "a/model")
    assert caplog.records == []


def test_what_is_not_applied_is_named(caplog: pytest.LogCaptureFixture) -> None:
    check_generation(GenerationConfig(num_beams=4), (), 100, "a/model")
    assert "not applied here, so that texts can differ from Hugging Face's: num_beams=4" in caplog.text
    with pytest.raises(CheckpointError, match="a/model cannot be used"):
        check_generation(GenerationConfig(repetition_penalty=-1.0), (), 100, "a/model")


def test_the_demo_model_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    Checkpoint.open(None, EngineConfig(device="cpu"))
    assert caplog.records == []
