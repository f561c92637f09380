"""`hybridgen cache` on stores without compiled code; `artifacts/test_warm_start.py` has those with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hybridgen.cli.main import main
from hybridgen.compilation.store import Key, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    with made.open(Key({"dtype": "float32", "model class": "x.LlamaForCausalLM", "GPU": "H200"})) as entry:
        (entry.inductor / "code").write_bytes(b"x" * 2**20)
        made.publish(entry)
    return made


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["cache", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list(capsys: pytest.CaptureFixture[str], store: Store) -> None:
    code, out, _ = run(capsys, "list", "--dir", store.root)
    assert code == 0
    assert "1 entries, 1.0 MiB" in out
    assert "LlamaForCausalLM" in out
    (store.path_of(store.entries()[0].digest) / "ready").unlink()
    assert "not usable: ready is missing" in run(capsys, "list", "--dir", store.root)[1]


def test_explain_names_what_differs_without_reading_weights(capsys: pytest.CaptureFixture[str], store: Store) -> None:
    code, out, _ = run(capsys, "explain", "--dir", store.root, "--mode", "hybrid", "--device", "cpu")
    assert code == 1
    assert out.startswith("miss: ")
    for part in ("GPU", "dtype", "model.hidden_size", "config.slots"):
        assert f"\n  {part}\n    here:  " in out
    code, out, _ = run(capsys, "explain", "--dir", store.root, "--mode", "eager", "--device", "cpu")
    assert (code, out) == (1, "off: mode eager on a CPU compiles nothing\n")


def test_warm_says_when_there_is_nothing_to_keep(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(
        capsys, "warm", "--dir", tmp_path / "s", "--mode", "eager", "--device", "cpu", "--kv-memory", "16MiB"
    )
    assert code == 2
    assert "nothing to keep: mode eager on a CPU" in err
    code, _, err = run(capsys, "warm", "--dir", tmp_path / "s", "--buckets", "1,x")
    assert (code, "--buckets 1,x: give numbers" in err) == (2, True)


def test_export_clear_import(capsys: pytest.CaptureFixture[str], store: Store, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.tgz"
    assert run(capsys, "export", bundle, "--dir", store.root)[:2] == (0, f"1 entries in {bundle}\n")
    assert run(capsys, "clear", "--dir", store.root)[:2] == (0, f"1 entries deleted from {store.root}\n")
    code, _, err = run(capsys, "import", bundle, "--dir", store.root)
    assert (code, "--trust" in err) == (2, True)
    assert store.entries() == []
    assert run(capsys, "import", bundle, "--dir", store.root, "--trust")[0] == 0
    assert len(store.entries()) == 1
    assert "deleted" in run(capsys, "prune", "--dir", store.root, "--max-size", "1KiB")[1]
    assert store.entries() == []


def test_a_store_that_is_not_private(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    code, _, err = run(capsys, "list", "--dir", tmp_path / "open")
    assert (code, "chmod 700" in err) == (2, True)


def test_looking_at_files_needs_no_torch(store: Store) -> None:
    code = (
        "import sys; from hybridgen.cli.main import main; "
        f"main(['cache', 'list', '--dir', {str(store.root)!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
