"""Sampled tokens have the model's distribution, whoever drafts: chi-square over whole sequences."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import eagle_heads
import families
import mtp_heads
import pytest
import torch
from draft_cases import loaded
from transformers import AutoModelForCausalLM

from hybridgen import SamplingParams
from hybridgen.speculation.oracle import OracleDrafter

ALLOWED = (30, 31, 32)
PROMPT = [40, *ALLOWED, 31, 30, 32, 30, 31, 30]
TEMPERATURE = 2.0
QUANTILES = {3: 48.3, 4: 118.6}
"""0.995 of chi-square with 3^n - 1 degrees of freedom, by tokens of a sequence; the seeds are fixed."""


@torch.no_grad()
def probabilities(path: Path, new: int) -> dict[tuple[int, ...], float]:
    """Of each sequence of so many allowed tokens, by Hugging Face's forward."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = {}
    for sequence in itertools.product(ALLOWED, repeat=new):
        logits = model(torch.tensor([[*PROMPT, *sequence]])).logits[0, len(PROMPT) - 1 : -1, list(ALLOWED)]
        each = (logits.double() / TEMPERATURE).softmax(-1)
        found[sequence] = float(torch.stack([each[i, ALLOWED.index(token)] for i, token in enumerate(sequence)]).prod())
    return found


@pytest.mark.parametrize(
    ("drafter", "new", "requests"),
    [
        ("oracle", 3, 850),
        ("ngram", 3, 850),
        pytest.param("ngram", 4, 2550, marks=pytest.mark.slow),
        ("model", 3, 850),
        ("eagle", 3, 850),
        ("mtp", 3, 850),
    ],
)
def test_chi_square(drafter: str, new: int, requests: int, tmp_path: Path) -> None:
    path = families.write("llama", tmp_path / "llama", num_hidden_layers=2)
    drafts: dict[str, Any] = {"speculation": "ngram"}
    if drafter == "oracle":  # says the same behind every text, which is right now and then
        drafts = {"speculation": OracleDrafter([[*PROMPT, 30, 31, 32, 30, 30]], [7])}
    elif drafter == "model":  # draws from another distribution, with the same noise
        drafts = {"drafter": families.build("llama", num_hidden_layers=1)}
    elif drafter == "eagle":
        path = eagle_heads.target(tmp_path / "target")
        tensors = eagle_heads.random_head(draft_vocab=families.VOCAB)
        drafts = {"drafter": eagle_heads.write_specforge(tmp_path / "head", tensors)}
    elif drafter == "mtp":
        path, drafts = mtp_heads.write(tmp_path / "mtp", "glm4_moe"), {"drafter": "mtp"}
    with loaded(path, max_batch=64, max_context=32, **drafts) as engine:
        sampling: dict[str, Any] = {"max_new_tokens": new, "temperature": TEMPERATURE, "allowed_token_ids": ALLOWED}
        params = [SamplingParams(seed=seed, **sampling) for seed in range(requests)]
        outs = engine.generate([PROMPT] * requests, params)
        stats = engine.stats().speculation
    counts = Counter(out.token_ids for out in outs)
    expected = {sequence: requests * chance for sequence, chance in probabilities(path, new).items()}
    assert set(counts) <= set(expected)
    assert sum(expected.values()) == pytest.approx(requests)
    assert stats.accepted > requests / 8  # some sequences were drafted right, others were not
    assert stats.accepted < stats.drafted * 0.97
    small = sum(count for count in expected.values() if count < 5)
    cells = [(counts[sequence], count) for sequence, count in expected.items() if count >= 5]
    cells.append((requests - sum(found for found, _ in cells), small))
    assert sum((found - count) ** 2 / count for found, count in cells if count) < QUANTILES[new]
