"""Projections that multiply a few rows by an op in recorded decode steps."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import nn

import hybridgen
from hybridgen.models import few_rows, projections
from hybridgen.models.few_rows import RowsCheck, find_rows
from hybridgen.models.projections import FusedHead, RowsLinear, fuse_projections

SETTINGS: dict[str, Any] = {"max_batch": 4, "page_size": 16, "kv_memory": "4MiB", "max_context": 128}


def test_which_modules_are_found() -> None:
    model = families.build("llama")
    fuse_projections(model)
    sites = list(find_rows(model, lambda weight, bias: weight.shape[0] != model.config.vocab_size))
    assert {site.kind for site in sites} == {nn.Linear, FusedHead}
    before = [type(module) for module in model.modules()]
    for site in sites:
        few_rows.use_rows_of(site)
    assert {type(site.module) for site in sites} == {RowsLinear, FusedHead}
    for site in sites:
        few_rows.use_own_product(site)
    assert [type(module) for module in model.modules()] == before
    replaced = nn.Sequential(nn.Linear(4, 4))
    replaced[0].forward = lambda x: x  # type: ignore[method-assign]
    assert not list(find_rows(replaced, lambda weight, bias: True))
    assert not RowsCheck(None)(torch.ones(4, 512, dtype=torch.bfloat16), None), "a weight on a CPU"


@pytest.mark.parametrize("mode", ["jit", "graph"])
@pytest.mark.parametrize("live", [False, True])
def test_recorded_decode_steps_go_through_the_op(
    mode: str, live: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """As on CUDA, but for the kernel; other modes and prefill keep torch's product, with the same tokens."""
    model = families.build("gpt_oss", **families.ALIKE)
    prompts = families.prompts_of((7, 3))
    calls: list[int] = []
    own = projections.few_rows

    def counted(rows: torch.Tensor, *others: Any) -> torch.Tensor:
        calls.append(rows.shape[0])
        return own(rows, *others)

    monkeypatch.setattr(projections, "few_rows", counted)
    monkeypatch.setattr(RowsCheck, "__call__", lambda self, weight, bias: True)
    before = [type(module) for module in model.modules()]
    if not live:
        model.save_pretrained(tmp_path)
    options = SETTINGS | ({"compile_backend": "eager"} if mode == "jit" else {})
    with hybridgen.Engine.load(model if live else tmp_path, mode=mode, dtype="float32", **options) as engine:
        outs = engine.generate(prompts, max_new_tokens=6, ignore_eos=True)
    assert bool(calls) == (mode == "graph")
    assert max(calls, default=0) <= 4
    assert [type(module) for module in model.modules()] == before
    for prompt, out in zip(prompts, outs, strict=True):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert list(out.token_ids) == wanted[0, len(prompt) :].tolist()
