"""The public surface: the names, and a description of each."""

import dataclasses
import inspect
import pkgutil
import pydoc
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import hybridgen
from hybridgen.fields import fields_of

NAMES = [
    "AsyncClient",
    "CacheError",
    "CacheMissError",
    "CheckpointError",
    "Client",
    "Comparison",
    "Completion",
    "ConfigError",
    "DeviceError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "FinishReason",
    "GraphEvent",
    "HybridgenError",
    "Interrupted",
    "LoadError",
    "Mode",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "PromptError",
    "Replicas",
    "RequestError",
    "SamplingError",
    "SamplingParams",
    "Score",
    "ServerBusyError",
    "ServerError",
    "StepSummary",
    "Timing",
    "TokenEvent",
    "TokenLogprob",
    "TokenizerError",
    "UnsupportedModelError",
    "attach",
    "compare",
    "generate",
    "score",
    "stream",
    "unload",
]


def test_the_names() -> None:
    assert hybridgen.__all__ == NAMES
    assert all(hasattr(hybridgen, name) for name in NAMES)  # some are imported when they are first used
    public = {name for name, value in vars(hybridgen).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public == set(NAMES)


def test_a_client_needs_no_torch() -> None:
    code = "import sys, hybridgen; hybridgen.Client, hybridgen.generate; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_command_needs_neither_torch_nor_matplotlib_to_start() -> None:
    code = "import sys, hybridgen.cli; hybridgen.compare; print({'torch', 'matplotlib', 'tabulate'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("name", NAMES)
def test_each_is_documented(name: str) -> None:
    thing = getattr(hybridgen, name)
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{name}(")  # what a dataclass without a docstring gets
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if inspect.isfunction(value) and member[0] != "_":
                assert value.__doc__, f"{name}.{member}"


def dataclasses_of(thing: Any, found: dict[str, type]) -> dict[str, type]:
    """The public dataclasses, and those of ours that their fields hold."""
    if dataclasses.is_dataclass(thing) and thing.__name__ not in found:
        found[thing.__name__] = thing
        for kind in typing.get_type_hints(thing).values():
            for each in (kind, *typing.get_args(kind), *(a for k in typing.get_args(kind) for a in typing.get_args(k))):
                if inspect.isclass(each) and each.__module__.startswith("hybridgen"):
                    dataclasses_of(each, found)
    return found


DATACLASSES: dict[str, type] = {}
for public in NAMES:
    dataclasses_of(getattr(hybridgen, public), DATACLASSES)


def test_all_dataclasses_are_found() -> None:
    assert {"SamplingParams", "EngineConfig", "Completion", "GraphRow", "CompareConfig", "CellResult"} <= set(
        DATACLASSES
    )


@pytest.mark.parametrize("owner", DATACLASSES.values(), ids=DATACLASSES)
def test_help_describes_each_field(owner: type) -> None:
    text = " ".join(pydoc.render_doc(owner, renderer=pydoc.plaintext).replace(" |  ", " ").split())
    for field in fields_of(owner):
        assert len(field.about) > 3
        assert f"{field.name} ({field.type}" in text
        assert " ".join(field.about.split()) in text


def test_all_errors_are_ours() -> None:
    for name in NAMES:
        thing = getattr(hybridgen, name)
        if inspect.isclass(thing) and issubclass(thing, BaseException):
            assert issubclass(thing, hybridgen.HybridgenError)
            assert name in hybridgen.errors.__doc__


@pytest.mark.parametrize("owner", [hybridgen.EngineConfig, hybridgen.Completion])
def test_the_usage_page_has_every_field(owner: type) -> None:
    page = Path(__file__).parents[1] / "docs" / "usage.md"
    text = page.read_text()
    for field in dataclasses.fields(owner):
        if field.name != "prompt_token_ids":
            assert f"`{field.name}`" in text, field.name


def documented() -> set[str]:
    """Dotted names below `hybridgen` in the docs, and in docstrings of the public names."""
    root = Path(__file__).parents[1]
    texts = [path.read_text() for path in (root / "README.md", *(root / "docs").glob("*.md"))]
    texts += [inspect.getdoc(getattr(hybridgen, name)) or "" for name in NAMES]
    return {name for text in texts for name in re.findall(r"\bhybridgen(?:\.[A-Za-z_]\w*)+", text)}


def test_every_documented_path_leads_somewhere() -> None:
    found = documented()
    assert {"hybridgen.comparison.config.CompareConfig", "hybridgen.comparison.results.read"} <= found
    missing = set()
    for name in found - {"hybridgen.__all__"}:
        try:
            pkgutil.resolve_name(name)
        except hybridgen.ConfigError as error:
            if "pip install 'hybridgen[" not in str(error):  # else an extra that is not installed
                missing.add(name)
        except (ImportError, AttributeError):
            missing.add(name)
    assert sorted(missing) == []
