"""`families.references`: what `families.reference` gives, whether or not a batch guesses it."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch

PROMPTS = families.prompts_of((5, 1, 12))


@pytest.mark.parametrize("wrong", [None, 0, 3])
def test_a_wrong_guess_is_found_and_generated_alone(wrong: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("llama", num_hidden_layers=1)
    expected = [families.reference(model, prompt, 4) for prompt in PROMPTS]
    own, alone = families._generate, []

    def guessed(model: Any, prompts: list[list[int]], new_tokens: int) -> Any:
        tokens, logits = own(model, prompts, new_tokens)
        if len(prompts) == 1:
            alone.append(prompts[0])
        elif wrong is not None:
            tokens[1][wrong] += 1
        return tokens, logits

    monkeypatch.setattr(families, "_generate", guessed)
    found = families.references(model, PROMPTS, 4)
    assert alone == ([] if wrong is None else [PROMPTS[1]])
    for (tokens, logits), (wanted, behind) in zip(found, expected, strict=True):
        assert tokens == wanted
        torch.testing.assert_close(logits, behind, atol=1e-4, rtol=1e-4)
