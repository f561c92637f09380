"""`offline_compile=True` on a GPU: what was warmed is enough, and a kernel that is missing is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest

from hybridgen.compilation.store.manifest import Manifest

pytestmark = pytest.mark.gpu

CHILD = """
import json, sys
import hybridgen
given = json.loads(sys.argv[1])
with hybridgen.Engine.load(given["model"], device="cuda", **given["config"]) as engine:
    greedy = engine.generate([list(range(5, 38)), [7]], max_new_tokens=12, ignore_eos=True)
    sampled = engine.generate([[9, 8, 7]], max_new_tokens=12, temperature=1.0, top_k=5, seed=1, ignore_eos=True)
    fallbacks = engine.stats().fallbacks
print(json.dumps({"tokens": [list(out.token_ids) for out in [*greedy, *sampled]], "fallbacks": fallbacks}))
"""
CONFIG = {"mode": "hybrid", "max_batch": 4, "page_size": 16, "token_budget": 96, "kv_memory": "64MiB"}


def run(model: Path, store: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    given = {"model": str(model), "config": {**CONFIG, "compile_cache": str(store), **changes}}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, json.dumps(given)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


def found(process: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def remove_kernel(store: Path, name: str) -> None:
    """Leave a kernel out of the entry, as if it had never been compiled."""
    (entry,) = (store / "entries").iterdir()
    manifest = Manifest.read(entry, entry.name)
    gone = {Path(file).parent for file in manifest.files if Path(file).name == f"{name}.json"}
    assert gone
    for directory in gone:
        shutil.rmtree(entry / directory)
    files = {file: value for file, value in manifest.files.items() if Path(file).parent not in gone}
    Manifest(manifest.key, files).write(entry)


def test_what_was_warmed_is_enough_and_what_is_missing_is_refused(tmp_path: Path) -> None:
    model, store = families.write("llama", tmp_path), tmp_path / "store"
    cold = found(run(model, store))
    offline = found(run(model, store, offline_compile=True))
    assert offline == cold
    remove_kernel(store, "copy_kernel")
    refused = run(model, store, offline_compile=True)
    assert refused.returncode != 0
    assert "CacheMissError" in refused.stderr
    assert "copy_kernel" in refused.stderr
    assert found(run(model, store)) == cold
