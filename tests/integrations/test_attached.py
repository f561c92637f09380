"""A live module's own `generate` behind an engine: the ids of transformers, what is left to it, and training."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, MinLengthLogitsProcessor

import hybridgen

SETTINGS: dict[str, Any] = {"max_batch": 4, "max_context": 128, "kv_memory": "8MiB", "device": "cpu", "progress": False}
MODES: list[dict[str, Any]] = [
    {"mode": "eager"},
    {"mode": "jit", "compile_backend": "eager"},
    {"mode": "graph", "run_ahead": 1},
    {"mode": "hybrid", "compile_backend": "eager"},
]
PROMPTS = families.prompts_of((3, 9, 17))


def build() -> Any:
    return families.build("llama", num_hidden_layers=2)


def padded() -> dict[str, torch.Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["mode"])
def test_ids_are_those_of_transformers(mode: dict[str, Any]) -> None:
    model = build()
    plain = model.generate(**padded(), max_new_tokens=8, do_sample=False)
    end = int(plain[1, 17 + 3])
    asked: list[dict[str, Any]] = [
        {"max_new_tokens": 8, "do_sample": False},
        {"max_length": 17 + 6, "do_sample": False},
        {
            "generation_config": GenerationConfig(
                max_new_tokens=8, repetition_penalty=1.4, eos_token_id=end, pad_token_id=7
            )
        },
        {
            "max_new_tokens": 8,
            "eos_token_id": [end, 3],
            "suppress_tokens": [5],
            "no_repeat_ngram_size": 2,
            "pad_token_id": 9,
        },
        {"max_new_tokens": 6, "min_new_tokens": 5, "eos_token_id": end, "bad_words_ids": [[8], [1, 2]]},
    ]
    expected = [model.generate(**padded(), **fields) for fields in asked]
    with hybridgen.attach(model, **mode, **SETTINGS) as attached:
        for fields, ids in zip(asked, expected, strict=True):
            assert torch.equal(model.generate(**padded(), **fields), ids), fields
        assert torch.equal(model.generate(padded()["input_ids"][2:], max_new_tokens=8), plain[2:])
        assert not attached.engine.stats().fallbacks
    assert "generate" not in vars(model)
    assert "generate_batch" not in vars(model)
    assert torch.equal(model.generate(**padded(), max_new_tokens=8, do_sample=False), plain)
    assert attached.engine.closed


def test_draws_follow_torch_s_seed() -> None:
    model = build()
    fields: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.9, "num_return_sequences": 3}
    with hybridgen.attach(model, mode="eager", **SETTINGS):
        torch.manual_seed(3)
        first, second = model.generate(**padded(), **fields), model.generate(**padded(), **fields)
        torch.manual_seed(3)
        again = model.generate(**padded(), **fields)
    assert first.shape == (9, 17 + 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(first[:, :17], padded()["input_ids"].repeat_interleave(3, 0))


def test_a_batch_of_lists_is_served_too() -> None:
    model = build()
    expected = model.generate(**padded(), max_new_tokens=5, do_sample=False)[:, 17:]
    with hybridgen.attach(model, mode="eager", **SETTINGS):
        config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None)
        outputs = model.generate_batch(PROMPTS, generation_config=config, progress_bar=False)
        assert model.generate_batch([]) == {}
    assert [out.generated_tokens for out in outputs.values()] == expected.tolist()
    assert [out.prompt_ids for out in outputs.values()] == PROMPTS
    assert all(out.is_finished() and out.error is None and len(out.logprobs) == 5 for out in outputs.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"num_beams": 2}, "it asks for num_beams"),
        ({"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(2, 1)])}, "it has logits_processor="),
        ({"return_dict_in_generate": True}, "it asks for return_dict_in_generate"),
        ({"num_return_sequences": 2, "do_sample": False, "num_beams": 2}, "it asks for num_beams"),
    ],
)
def test_what_it_does_not_do_runs_as_before(fields: dict[str, Any], why: str) -> None:
    model = build()
    expected = model.generate(**padded(), max_new_tokens=4, **fields)
    with hybridgen.attach(model, mode="eager", **SETTINGS) as attached:
        with pytest.warns(RuntimeWarning, match=why):
            found = model.generate(**padded(), max_new_tokens=4, **fields)
        [(reason, count)] = attached.engine.stats().fallbacks.items()
    assert (reason, count) == (f"model.generate ran as transformers': {why}", 1)
    assert torch.equal(*(out if isinstance(out, torch.Tensor) else out.sequences for out in (found, expected)))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_it_follows_a_trainer(dtype: str) -> None:
    """Weights are shared, or cast anew by each call; the module trains on meanwhile."""
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batch = torch.tensor([PROMPTS[2]])

    def expected() -> torch.Tensor:
        other = build().eval()
        other.load_state_dict(model.state_dict())
        other.to(getattr(torch, dtype if dtype != "auto" else "float32"))
        return other.generate(batch, max_new_tokens=6, do_sample=False)

    seen = []
    with hybridgen.attach(model, mode="graph", dtype=dtype, **SETTINGS) as attached:
        shared = {p.data_ptr() for p in model.parameters()}
        ours = attached.engine._runner.bound.model
        assert ({p.data_ptr() for p in ours.parameters()} == shared) == (dtype != "bfloat16")
        for step in range(3):
            found = model.generate(batch, max_new_tokens=6, do_sample=False)
            if dtype != "bfloat16":  # in which near choices can fall otherwise
                assert torch.equal(found, expected()), step
            for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
                assert torch.equal(mine, theirs.to(mine.dtype))
            seen.append(found.tolist())
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            attached.weights_changed()
        out = attached.engine.generate(PROMPTS[0], max_new_tokens=2)
        assert out.weights_version == 3
        assert model.training
        assert not attached.engine.stats().fallbacks
    assert len({str(ids) for ids in seen}) > 1


def test_what_cannot_be_attached_is_refused() -> None:
    model = build()
    with pytest.raises(hybridgen.ConfigError, match="takes a live PreTrainedModel"):
        hybridgen.attach("path")
    with pytest.raises(hybridgen.ConfigError, match="unknown keyword 'modus'"):
        hybridgen.attach(model, modus="eager")
    with hybridgen.attach(model, mode="eager", **SETTINGS) as attached:
        with pytest.raises(hybridgen.EngineError, match="was replaced already"):
            hybridgen.attach(model, mode="eager", **SETTINGS)
        attached.detach()
        attached.detach()
    assert "generate" not in vars(model)
