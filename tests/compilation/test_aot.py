"""Compiled layer functions: whom they serve, what is kept of them, and when what was kept is not used."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hybridgen.compilation import aot as units
from hybridgen.compilation.aot import INDEX, LayerUnits, Unit, changed_source

LAYER = """
from torch import nn

class Layer(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.scale = 2.0
        self.act = nn.functional.silu

    def forward(self, x):
        return self.act(self.linear(x)) * self.scale


def run(layer, x):
    return type(layer).forward(layer, x)


def other():
    return 0
"""


def module_of(path: Path, name: str) -> ModuleType:
    """A module with a layer and its compile unit; to be put into `sys.modules`, where what was traced is looked for."""
    path.write_text(LAYER)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hidden(tokens: int, size: int = 8) -> torch.Tensor:
    return torch.randn(1, tokens, size)


def made(module: ModuleType, directory: Path, name: str = "prefill_layer") -> LayerUnits:
    """A unit for any number of tokens."""
    found, x = LayerUnits(directory), hidden(5)
    torch._dynamo.mark_dynamic(x, 1, min=2, max=64)
    found.make(name, module.run, module.Layer(), (x,), {}, 5)
    return found


@pytest.fixture(scope="module", autouse=True)
def _as_the_runner() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    module = module_of(tmp_path_factory.mktemp("source") / "traced.py", "hybridgen_test_traced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        yield module


@pytest.fixture(scope="module")
def kept(traced: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> LayerUnits:
    """One unit, made and saved."""
    found = made(traced, tmp_path_factory.mktemp("kept"))
    assert found.save() is None
    return found


@pytest.fixture
def loaded(kept: LayerUnits) -> LayerUnits:
    """That unit, loaded."""
    found = LayerUnits(kept.directory)
    assert found.load() is None
    return found


def find(found: LayerUnits, layer: nn.Module, x: torch.Tensor, name: str = "prefill_layer") -> Any:
    return found.find(name, layer, (x,), {}, x.shape[1])


@pytest.mark.parametrize("which", ["kept", "loaded"])
def test_a_unit_serves_other_layers_and_lengths_with_their_own_weights(
    which: str, traced: ModuleType, request: pytest.FixtureRequest
) -> None:
    found: LayerUnits = request.getfixturevalue(which)
    for tokens in (5, 2, 64):
        layer, x = traced.Layer(), hidden(tokens)
        torch.testing.assert_close(find(found, layer, x)(layer, x), layer(x))
    assert len(found.units) == 1


def test_a_loaded_unit_is_counted_and_not_traced_again(kept: LayerUnits, traced: ModuleType) -> None:
    assert kept.loaded == 0  # it was made here
    graphs = counters["stats"]["unique_graphs"]
    found = LayerUnits(kept.directory)
    assert found.load() is None
    layer, x = traced.Layer(), hidden(7)
    find(found, layer, x)(layer, x)
    assert found.loaded == 1
    assert counters["stats"]["unique_graphs"] == graphs


def test_what_a_unit_does_not_serve(loaded: LayerUnits, traced: ModuleType) -> None:
    layer, x = traced.Layer(), hidden(5)
    assert find(loaded, layer, x) is not None
    assert find(loaded, layer, x, "decode_layer") is None
    assert find(loaded, traced.Layer(), hidden(1)) is None
    assert find(loaded, traced.Layer(16), hidden(5, 16)) is None
    assert find(loaded, traced.Layer().to(torch.bfloat16), x.to(torch.bfloat16)) is None
    assert find(loaded, traced.Layer(), hidden(65)) is None  # more than was marked


def test_a_layers_numbers_are_checked_at_each_call(loaded: LayerUnits, traced: ModuleType) -> None:
    layer, x = traced.Layer(), hidden(5)
    assert find(loaded, layer, x) is not None
    layer.scale = 3.0
    assert find(loaded, layer, x) is None
    layer.scale = 2.0
    assert find(loaded, layer, x) is not None


def test_a_second_unit_serves_what_the_first_does_not(kept: LayerUnits, traced: ModuleType, tmp_path: Path) -> None:
    directory = tmp_path / "two"
    directory.mkdir()
    found = LayerUnits(directory, units=list(kept.units))
    other, x = traced.Layer(), hidden(5)
    other.scale = 3.0
    assert find(found, other, x) is None
    function = found.make("prefill_layer", traced.run, other, (x,), {}, 5)
    assert find(found, other, x) is function
    assert found.save() is None
    again = LayerUnits(directory)
    assert again.load() is None
    assert (again.loaded, [unit.name for unit in again.units]) == (2, ["prefill_layer"] * 2)
    for layer in (other, traced.Layer()):
        torch.testing.assert_close(find(again, layer, x)(layer, x), layer(x))


def test_a_layer_is_described_once_for_each_name_and_not_kept_alive(
    loaded: LayerUnits, traced: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[nn.Module] = []
    structure_of = units.structure_of
    monkeypatch.setattr(units, "structure_of", lambda layer, *call: described.append(1) or structure_of(layer, *call))
    layer, x = traced.Layer(), hidden(5)
    for name in ("prefill_layer", "decode_layer", "prefill_layer", "decode_layer"):
        find(loaded, layer, x, name)
    assert len(described) == 2
    find(loaded, traced.Layer(), x)
    assert len(described) == 3
    del layer
    gc.collect()
    assert len(loaded._structures) == 0


def test_forgotten_units_serve_nobody(loaded: LayerUnits, traced: ModuleType) -> None:
    loaded.forget()
    assert (loaded.loaded, loaded.units) == (0, [])
    assert find(loaded, traced.Layer(), hidden(5)) is None


def test_a_directory_without_units_is_no_problem(tmp_path: Path) -> None:
    found = LayerUnits(tmp_path)
    assert found.load() is None
    assert (found.loaded, found.units) == (0, [])


def spoil_file(directory: Path) -> None:
    (directory / "prefill_layer-1.bin").write_bytes(b"no unit")


def lose_file(directory: Path) -> None:
    (directory / "prefill_layer-1.bin").unlink()


def spoil_index(directory: Path) -> None:
    (directory / INDEX).write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (spoil_file, "UnpicklingError: invalid load key"),
        (lose_file, "FileNotFoundError: .* No such file"),
        (spoil_index, "KeyError: 'units'"),
    ],
)
def test_of_a_spoilt_directory_nothing_is_used(kept: LayerUnits, tmp_path: Path, spoil: Any, error: str) -> None:
    directory = tmp_path / "spoilt"
    directory.mkdir()
    assert LayerUnits(directory, units=kept.units * 2).save() is None
    spoil(directory)
    found = LayerUnits(directory)
    problem = found.load()
    assert problem is not None
    assert re.match(rf"compiled units cannot be loaded \({error}", problem)
    assert (found.loaded, found.units) == (0, [])


def test_units_whose_source_changed_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, directory = tmp_path / "edited.py", tmp_path / "aot"
    directory.mkdir()
    module = module_of(path, "hybridgen_test_edited")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert made(module, directory).save() is None
    path.write_text(LAYER.replace("return 0", "return 1"))  # nothing traced it
    assert LayerUnits(directory).load() is None
    for old, new in (("* self.scale", "/ self.scale"), ("forward(self, x)", "forward(self, x, y=1)")):
        path.write_text(LAYER.replace(old, new))
        found = LayerUnits(directory)
        problem = found.load()
        assert problem is not None
        assert re.match(r"hybridgen_test_edited, line \d+, was traced and has changed since", problem)
        assert (found.loaded, found.units) == (0, [])


def test_the_index_names_what_was_traced(kept: LayerUnits, traced: ModuleType) -> None:
    (row,) = json.loads((kept.directory / INDEX).read_text())["units"]
    assert (row["file"], row["name"]) == ("prefill_layer-0.bin", "prefill_layer")
    assert row["structure"] == kept.units[0].structure
    assert {source["module"] for source in row["sources"]} == {traced.__name__, nn.Linear.__module__}
    assert changed_source([row]) is None
    gone = [{"module": "hybridgen_test_gone", "first": 1, "last": 2, "sha256": "0" * 64}]
    assert changed_source([row, {"sources": gone}]) == "hybridgen_test_gone, line 1,"


def test_units_that_cannot_all_be_kept_leave_nothing_behind(kept: LayerUnits, tmp_path: Path) -> None:
    def broken(path: str) -> None:
        raise TypeError("cannot pickle this\nand more lines")

    directory = tmp_path / "aot"
    shutil.copytree(kept.directory, directory)
    unit = Unit("decode_layer", "", SimpleNamespace(save_compiled_function=broken))
    found = LayerUnits(directory, units=[*kept.units, unit])
    assert found.save() == "compiled units cannot be kept (TypeError: cannot pickle this)"
    assert list(directory.iterdir()) == []
    assert len(found.units) == 2  # this process goes on with them
    directory.rmdir()
    assert str(found.save()).startswith("compiled units cannot be kept (")


def guard(kind: str, *derived: str, is_global: bool = False) -> SimpleNamespace:
    return SimpleNamespace(guard_type=kind, derived_guard_types=derived, is_global=is_global)


def test_guards_that_another_process_cannot_check_are_not_kept() -> None:
    entries = [
        guard("EQUALS_MATCH"),
        guard("TENSOR_MATCH"),
        guard("ID_MATCH"),
        guard("TYPE_MATCH", "ID_MATCH"),
        guard("EQUALS_MATCH", is_global=True),
        guard("SHAPE_ENV"),
    ]
    assert units._kept_guards(entries) == [True, False, False, False, False, True]


def test_a_units_guards_are_among_those(traced: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_guards, seen = units._kept_guards, []
    monkeypatch.setattr(units, "_kept_guards", lambda entries: seen.extend(entries) or kept_guards(entries))
    made(traced, tmp_path)
    assert set(kept_guards(seen)) == {True, False}
