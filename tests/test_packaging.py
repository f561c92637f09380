"""What is built and installed: contents, metadata, and a run of what was installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


OF_THE_CALLER = {"trl"}
"""Extras that bring what a caller imports, and the library itself does not."""


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment or None, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the sdist, built by setuptools from the files that git knows."""
    pytest.importorskip("setuptools", "77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    for name in listed.stdout.splitlines():
        if name.startswith(("hybridgen/", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta as b; print(b.build_sdist({str(out)!r}), b.build_wheel({str(out)!r}))"
    python("-c", code, cwd=source)
    return out


def files_of_the_package() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "hybridgen"], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(listed.stdout.splitlines())


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("/METADATA"))).decode())
        entry = archive.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    assert {name for name in names if name.startswith("hybridgen/")} == files_of_the_package()
    assert {name.split("/")[0] for name in names} == {"hybridgen", f"hybridgen-{PROJECT['version']}.dist-info"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert metadata["Name"] == "hybridgen"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert "hybridgen = hybridgen.cli:main" in entry
    assert wheel.stat().st_size < 20 * 2**20


def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    (wheel,) = built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    code = f"from setuptools import build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    python("-c", code, cwd=source)
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {i.filename: i.CRC for i in first.infolist() if not i.filename.endswith("RECORD")} == {
            i.filename: i.CRC for i in second.infolist() if not i.filename.endswith("RECORD")
        }


def test_what_is_installed_runs_away_from_the_checkout(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    place = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    environment = {**os.environ, "PYTHONPATH": str(place)}
    assert python("-m", "hybridgen", "--version", cwd=tmp_path, **environment) == f"hybridgen {PROJECT['version']}\n"
    fast = ["--max-new-tokens", "4", "--mode", "eager", "--kv-memory", "16MiB"]
    out = python("-m", "hybridgen", "generate", "def fibonacci(n):", *fast, cwd=tmp_path, **environment)
    assert out.startswith("def fibonacci(n):")
    where = "import hybridgen; print(hybridgen.__file__)"
    assert python("-c", where, cwd=tmp_path, **environment).startswith(str(place))


def test_each_extra_is_named_where_it_is_missing() -> None:
    """Who lacks a package is told which extra brings it."""
    source = "\n".join(path.read_text() for path in (ROOT / "hybridgen").rglob("*.py"))
    named = set(re.findall(r"hybridgen\[([\w-]+)\]", source))
    assert named >= set(PROJECT["optional-dependencies"]) - {"test", "dev", "docs", *OF_THE_CALLER}
    assert named <= set(PROJECT["optional-dependencies"])


def test_every_python_that_is_named_is_one_that_runs_it() -> None:
    named = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", text)]
    assert named[0] == PROJECT["requires-python"].removeprefix(">=")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in named


def test_what_a_release_needs_is_there() -> None:
    from yaml import safe_load  # comes with huggingface-hub

    place = ROOT / ".github"
    assert safe_load((place / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    for form in ("bug.yml", "model.yml"):
        fields = safe_load((place / "ISSUE_TEMPLATE" / form).read_text())["body"]
        wanted = [field for field in fields if "hybridgen doctor --json" in field["attributes"]["label"]]
        assert [field["validations"]["required"] for field in wanted] == [True]
    jobs = safe_load((place / "workflows" / "release.yml").read_text())["jobs"]
    named = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", text)]
    assert jobs["check"]["strategy"]["matrix"]["python"] == named
    assert jobs["publish"]["needs"] == "check"
    assert "private" in (place / "SECURITY.md").read_text()


@pytest.mark.parametrize("script", [".ci/run", ".ci/newest"])
def test_scripts_of_ci_can_be_read_by_bash(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0
