"""Options that read the text's order, cutoffs, and log-probabilities of what was drawn from, on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import PreTrainedModel

from hybridgen import Engine, SamplingParams
from hybridgen.sampling import SamplerState, resolve, sample
from hybridgen.sampling.history import apply_history, remember

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from sampling_history_cases import random_tables

pytestmark = pytest.mark.gpu

SETTINGS: dict[str, Any] = {"max_batch": 8, "page_size": 16, "token_budget": 96, "kv_memory": "64MiB"}
PROMPTS = families.prompts_of((1, 7, 300, 33))
NEW = 32


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def column(values: torch.Tensor) -> torch.Tensor:
    """On the device, with a stride, as in the sampler's table."""
    return torch.stack((values, values + 1), 1).cuda()[:, 0]


@pytest.mark.parametrize("seed", range(40))
def test_kernels_match_their_references(seed: int) -> None:
    tables = random_tables(seed)
    moved = [column(t) if i == 5 else t.cuda() for i, t in enumerate(tables)]
    apply_history(*tables)
    apply_history(*moved)
    assert torch.equal(moved[0].cpu(), tables[0])
    history, slots, lengths = tables[1], tables[6], tables[7]
    chosen = torch.arange(-1, len(slots) - 1)
    remember(chosen, slots, lengths, history)
    remember(chosen.cuda(), moved[6], moved[7], moved[1])
    assert torch.equal(moved[1].cpu(), history)


@torch.no_grad()
def generated(model: PreTrainedModel, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt], device="cuda")
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("graphs", ["manual", "trees"])
@pytest.mark.parametrize("mode", ["eager", "jit", "graph", "hybrid"])
def test_rows_of_different_options_in_one_batch(mode: str, graphs: str, tmp_path: Path) -> None:
    if graphs == "trees" and mode != "hybrid":
        pytest.skip("cudagraph trees are of mode hybrid alone")
    path = families.write("llama", tmp_path, initializer_range=0.2)
    model = families.build("llama", initializer_range=0.2).cuda()
    requests, expected = [], []
    for prompt in PROMPTS:
        plain = generated(model, prompt)
        for options in (
            {"no_repeat_ngram_size": 1},
            {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
            {"bad_words_ids": [plain[3:5], plain[5:8], [plain[9]]], "forced_eos_token_id": 11},
            {"sequence_bias": [[plain[2:4], -20.0], [[plain[1]], 0.5]], "begin_suppress_tokens": plain[:1]},
            {"suppress_tokens": plain[:3]},
            {},
        ):
            requests.append((prompt, options))
            expected.append(generated(model, prompt, **options))
    params = [SamplingParams(max_new_tokens=NEW, **options) for _, options in requests]
    with Engine.load(path, mode=mode, device="cuda", graphs=graphs, validate=graphs == "manual", **SETTINGS) as engine:
        for _ in range(2):
            outs = engine.generate([prompt for prompt, _ in requests], params)
            assert [list(out.token_ids) for out in outs] == expected
            engine.idle()
        assert not engine.stats().fallbacks


@pytest.mark.parametrize("seed", range(8))
def test_cutoffs_and_what_they_tell_are_those_of_the_cpu(seed: int) -> None:
    vocab, rows = 5000, 9
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    states = [SamplerState(rows, vocab, device) for device in ("cpu", "cuda")]
    for row in range(rows):
        fields: list[dict[str, Any]] = [
            {"typical_p": 0.8},
            {"epsilon_cutoff": 0.001, "top_k": 50},
            {"eta_cutoff": 0.01, "top_p": 0.9},
            {"top_p": 0.9, "top_k": 40},
            {"temperature": 0.0, "top_k": 3},
        ]
        chosen = {"temperature": 0.9, "seed": row, "logprobs": 5} | fields[row % 5]
        params = resolve(SamplingParams(**chosen, logprobs_of="sampled" if row % 3 else "model"), None, (), vocab)
        for state in states:
            state.assign(row, params)
    outs = []
    for state, device in zip(states, ("cpu", "cuda"), strict=True):
        slots, positions = torch.arange(rows, device=device), torch.full((rows,), 7, device=device)
        plan = state.needs(range(rows))
        out = sample(logits.to(device), state, slots, positions, positions, plan)
        outs.append([value.cpu() for value in out if value is not None])
        for row in range(rows):  # whatever its neighbours ask for
            one = slice(row, row + 1)
            alone = sample(
                logits[one].to(device), state, slots[one], positions[one], positions[one], state.needs([row])
            )
            assert alone.tokens.item() == out.tokens[row].item()
    assert torch.equal(outs[0][0], outs[1][0])
    here, there = ([value.double() for value in out] for out in outs)
    for ours, theirs in zip(here[1:], there[1:], strict=True):
        if ours.dim() == 2:  # which tokens a row lists after those that it may draw from is nobody's business
            told = here[-1].isfinite()
            assert torch.equal(told, there[-1].isfinite())
            ours, theirs = ours[told], theirs[told]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
