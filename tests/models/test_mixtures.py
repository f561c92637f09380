"""Layers with a mixture as one op in decode of one token, and for which layers that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import quantised_formats as formats
import shared_graphs
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssMLP, GptOssRMSNorm

import hybridgen
from hybridgen.engine.builder import Builder
from hybridgen.kernels.linear import mixture
from hybridgen.models import mixtures
from hybridgen.models.mixtures import MixtureLayer
from hybridgen.models.mixtures_check import Verdict

SETTINGS: dict[str, Any] = {
    "max_batch": 2, "page_size": 16, "kv_memory": "4MiB", "max_context": 128, "dtype": "float32",
    "compile_backend": "eager", "compile_cache": False,
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A tiny gpt-oss with packed experts."""
    return formats.write_gpt_oss(tmp_path, **families.ALIKE)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the op's calls; on a CPU layers are looked at as on CUDA, without a trial."""
    rows: list[int] = []

    def counted(x: Tensor, *others: Any) -> Tensor:
        rows.append(x.shape[0])
        return by_ops(x, *others)

    by_ops = mixture.by_ops
    monkeypatch.setattr(mixture, "by_ops", counted)
    monkeypatch.setattr(mixtures, "tried_on", lambda *_: Verdict())
    monkeypatch.setattr(Builder, "_rotates_in_one_op", lambda self: True)
    return rows


def tokens(path: Path, mode: str, count: int = 1) -> list[list[int]]:
    with hybridgen.Engine.load(path, mode=mode, **SETTINGS) as engine:
        outs = engine.generate(families.prompts_of((7, 5))[:count], max_new_tokens=12, ignore_eos=True, temperature=0)
        assert not engine.stats().fallbacks
        return [list(out.token_ids) for out in outs]


def test_one_token_decodes_by_the_op(path: Path, called: list[int]) -> None:
    """With the tokens of mode eager, which does not; nor do two tokens."""
    expected = tokens(path, "eager", 2)
    assert not called
    assert tokens(path, "jit") == expected[:1]
    assert set(called) == {1}
    called.clear()
    assert tokens(path, "jit", 2) == expected


def test_it_is_off_where_a_trial_fails(path: Path, called: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "tried_on", lambda *_: Verdict(wrong="they are off by 0.3"))
    with hybridgen.Engine.load(path, mode="jit", **SETTINGS) as engine:
        engine.generate(families.prompts_of((7,)), max_new_tokens=3)
        assert "mixtures run by several ops: they are off by 0.3" in str(engine.stats().fallbacks)
    assert not called


def test_that_several_ops_are_faster_is_no_fallback(
    path: Path, called: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixtures, "tried_on", lambda *_: Verdict(slower="one op takes 40 us, and they 30"))
    with hybridgen.Engine.load(path, mode="jit", **SETTINGS) as engine:
        engine.generate(families.prompts_of((7,)), max_new_tokens=3)
        assert not engine.stats().fallbacks
        assert "one op takes 40 us" in str(engine.stats().fused)
    assert not called


CHANGES: dict[str, Any] = {
    "a scaled residual": (GptOssDecoderLayer, lambda own: lambda self, x, **kw: own(self, x, **kw) * 1.001),
    "a scaled mixture": (GptOssMLP, lambda own: lambda self, x: (own(self, x)[0] * 1.001, None)),
    "another norm": (GptOssRMSNorm, lambda own: lambda self, x: own(self, x).clamp(max=1.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_do_something_else(
    change: str, path: Path, called: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep their own forward."""
    shared_graphs.forget()  # of a class that had another forward
    kind, changed = CHANGES[change]
    monkeypatch.setattr(kind, "forward", changed(kind.forward))
    expected = tokens(path, "eager")
    found = tokens(path, "jit")
    assert not called
    assert found == expected


def test_layers_are_as_before_where_their_modules_have_to_be_called(path: Path, called: list[int]) -> None:
    with hybridgen.Engine.load(path, mode="jit", **SETTINGS) as engine:
        bound = engine._runner.bound
        assert all(isinstance(layer, MixtureLayer) for layer in bound.layers)
        mixtures.allow_mixture_op(bound, lambda _: False)
        assert not any(isinstance(layer, MixtureLayer) for layer in bound.layers)
        mixtures.allow_mixture_op(bound, lambda _: True)
        assert all(isinstance(layer, MixtureLayer) for layer in bound.layers)
        layers = bound.layers
    assert not any(isinstance(layer, MixtureLayer) or "_hybridgen" in vars(layer) for layer in layers)
