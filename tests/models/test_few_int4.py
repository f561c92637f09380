"""The kernel for few rows and int4 weights is compared with dequantised ones before an engine uses it."""

from __future__ import annotations

from typing import Any

import pytest
import quantised_formats as formats
import torch

import hybridgen
from hybridgen.kernels import hopper
from hybridgen.kernels.linear.quantised import quantised_linear
from hybridgen.models import few_int4

SETTINGS: dict[str, Any] = {"mode": "graph", "max_batch": 2, "page_size": 16, "kv_memory": "4MiB", "max_context": 64}


def failing(*args: Any) -> torch.Tensor:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (None, None),
        (lambda *args: quantised_linear(*args) * 1.03, "off by 0.03"),
        (lambda *args: quantised_linear(*args) + torch.nan, "off by nan"),
        (failing, "it failed: RuntimeError: no such instruction"),
    ],
)
def test_a_wrong_kernel_is_refused(
    wrong: Any, reason: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: set[tuple[str, int]] = set()
    calls: list[int] = []

    def trial(x: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(x.shape[0])
        return (wrong or quantised_linear)(x, *args)

    monkeypatch.setattr(hopper, "_refused", refused)
    monkeypatch.setattr(few_int4, "serves", lambda kernel, device: (kernel, device.index or 0) not in refused)
    monkeypatch.setattr(few_int4, "quantised_linear", trial)
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    with hybridgen.Engine.load(tmp_path, dtype="bfloat16", **SETTINGS) as engine:
        found = [why for why in engine.stats().fallbacks if "few rows" in why]
    assert set(calls) == ({1, 4} if wrong is None else {1})
    assert refused == (set() if wrong is None else {(hopper.OF_FEW_ROWS, 0)})
    if reason is None:
        assert not found
        assert 2 <= len(calls) <= 8, "projections of a kind are tried once"
        return
    assert len(calls) == 1
    assert len(found) == 1
    assert reason in found[0]


def test_what_is_refused_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_refused", set())
    monkeypatch.setattr(hopper, "is_hopper", lambda ordinal: ordinal < 2)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert hopper.serves("a", first)
    assert hopper.refuse("a", first)
    assert not hopper.refuse("a", first)
    assert not hopper.serves("a", first)
    assert hopper.serves("a", second)
    assert hopper.serves("b", first)
    assert not hopper.serves("a", torch.device("cuda", 2))
    assert not hopper.refuse("a", torch.device("cpu"))
