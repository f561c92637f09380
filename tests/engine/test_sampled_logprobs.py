"""`logprobs_of="sampled"` through an engine, against the arithmetic written out here, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridgen import Completion, Engine, SamplingParams

PROMPTS = families.prompts_of((5, 40, 17, 9))
NEW = 8
TOP = 20
SETTINGS: dict[str, Any] = {"max_batch": 4, "page_size": 16, "kv_memory": "8MiB", "max_context": 128}
RECORDED: dict[str, Any] = {"decode_buckets": (4,), "prefill_buckets": (16, 96), "max_padding_ratio": 64}
COMPILED: dict[str, Any] = {"compile_backend": "eager"}
ROWS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "repetition_penalty": 1.3, "logprobs_of": "sampled"},
    {"temperature": 1.5, "top_k": 15, "frequency_penalty": 0.6, "presence_penalty": 0.3, "logprobs_of": "sampled"},
    {"temperature": 0.0, "repetition_penalty": 1.4, "logprobs_of": "sampled"},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "repetition_penalty": 1.3, "logprobs_of": "model"},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("sampled"), initializer_range=0.2)


def by_hand(raw: list[float], prompt: list[int], output: list[int], row: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities of what one token is drawn from, [vocabulary], one id at a time."""
    values = list(raw)
    for token in set(prompt + output):
        factor = row.get("repetition_penalty", 1.0)
        values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
    for token in set(output):
        values[token] -= output.count(token) * row.get("frequency_penalty", 0.0) + row.get("presence_penalty", 0.0)
    values = [value / (row["temperature"] or 1.0) for value in values]
    order = sorted(range(len(values)), key=lambda token: -values[token])
    order = order[: row.get("top_k", len(order))]
    likely = torch.tensor([values[token] for token in order]).softmax(0).tolist()
    kept: list[int] = []
    for token, probability in zip(order, likely, strict=True):
        before = sum(likely[: len(kept)])
        if before < row.get("top_p", 1.0) or not kept:
            kept.append(token)
        assert probability > 0
    logits = torch.full((len(values),), -torch.inf)
    logits[kept] = torch.tensor([values[token] for token in kept])
    return logits.log_softmax(0)


@torch.no_grad()
def check(out: Completion, prompt: list[int], row: dict[str, Any], model: Any) -> None:
    output = list(out.token_ids)
    raw = model(input_ids=torch.tensor([prompt + output]), use_cache=False).logits[0]
    for index, entry in enumerate(out.logprobs):
        at = raw[len(prompt) - 1 + index]
        if row["logprobs_of"] == "model":
            expected = at.log_softmax(0)
        else:
            expected = by_hand(at.tolist(), prompt, output[:index], row)
        assert entry.token_id == output[index]
        assert entry.logprob == pytest.approx(expected[entry.token_id].item(), abs=1e-3)
        found = torch.tensor([logprob for _, logprob in entry.top])
        torch.testing.assert_close(found, expected.topk(TOP).values, atol=1e-3, rtol=0)
        if row["logprobs_of"] == "sampled" and "top_k" in row:
            assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-4)  # all that was kept is among them
            assert torch.isinf(found).any()


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "eager"},
        {"mode": "jit"} | COMPILED,
        {"mode": "graph"} | RECORDED,
        {"mode": "hybrid"} | RECORDED | COMPILED,
    ],
    ids=lambda fields: fields["mode"],
)
def test_what_tokens_were_drawn_from(path: Path, fields: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    params = [SamplingParams(max_new_tokens=NEW, ignore_eos=True, logprobs=TOP, seed=3 + number, **row)
              for number, row in enumerate(ROWS)]  # fmt: skip
    with Engine.load(path, **fields, **SETTINGS) as engine:
        together = engine.generate(PROMPTS, params)
        for out, prompt, row in zip(together, PROMPTS, ROWS, strict=True):
            check(out, prompt, row, model)
        other = engine.generate(PROMPTS[3], SamplingParams(max_new_tokens=NEW, ignore_eos=True, seed=6, **ROWS[0]))
        assert other.token_ids == together[3].token_ids  # what is told of a token changes none
