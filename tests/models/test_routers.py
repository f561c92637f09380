"""Routers: probed, and choosing by the op in decode where they compute what it does."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn

import hybridgen
from hybridgen.kernels.linear.experts_form import RouteForm
from hybridgen.models import routers
from hybridgen.models.routers import find_routers, probe


class Router(nn.Module):
    """A router of a user's own, of whom `changes` say what is unusual."""

    def __init__(self, changes: str = "") -> None:
        super().__init__()
        self.top_k, self.changes = 2, changes
        self.weight = nn.Parameter(torch.randn(6, 12))

    def forward(self, states: Tensor) -> Any:
        logits = states @ self.weight.T
        if self.changes == "sigmoid":
            scores, ids = logits.sigmoid().topk(2)
        elif self.changes == "smallest":
            scores, ids = logits.softmax(-1).topk(2, largest=False)
        else:
            scores, ids = logits.softmax(-1).topk(2)
        if self.changes == "a factor":
            scores = scores * 1.001
        return (scores, ids) if self.changes == "two" else (logits, scores, ids)


def test_what_is_recognised() -> None:
    assert probe(Router()) == (RouteForm(False), 2)
    for changes in ("sigmoid", "smallest", "a factor", "two"):
        assert probe(Router(changes)) is None, changes
    replaced = Router()
    replaced.forward = lambda *args: None  # type: ignore[method-assign]
    assert not list(find_routers(replaced))
    biased = Router()
    biased.register_buffer("correction", torch.zeros(6))
    assert not list(find_routers(biased))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("gpt_oss", RouteForm(True)),
        ("qwen3_moe", RouteForm(False)),
        ("mixtral", RouteForm(False, True, True)),
    ],
)
def test_a_module_is_as_before_afterwards(name: str, form: RouteForm) -> None:
    model = families.build(name)
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    sites = list(find_routers(model))
    assert sites
    assert all(site.form._replace(normalised=form.normalised) == form for site in sites)
    for site in sites:
        routers.use_route(site)
        assert isinstance(site.module, routers.RouterModule)
        routers.use_own_choice(site)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before


SETTINGS: dict[str, Any] = {"max_batch": 4, "page_size": 16, "kv_memory": "4MiB", "max_context": 128}


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_decode_goes_through_the_op(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But in mode eager, and with the tokens of transformers."""
    model = families.build("qwen3_moe")
    prompts = families.prompts_of((7, 3))
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(args[0].shape[0])
        return route(*args)

    route = routers.route
    monkeypatch.setattr(routers, "route", counted)
    with hybridgen.Engine.load(model, mode=mode, **SETTINGS) as engine:
        outs = engine.generate(prompts, max_new_tokens=6, ignore_eos=True)
    assert bool(calls) == (mode != "eager")
    assert max(calls, default=0) <= 4
    for prompt, out in zip(prompts, outs, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, len(prompt) :]
        assert list(out.token_ids) == wanted.tolist()
