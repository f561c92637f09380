"""Export, clear, import: what comes back is what was there; what is no bundle brings nothing in."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from hybridgen.compilation.store import Key, Store
from hybridgen.compilation.store.bundle import export_bundle, import_bundle
from hybridgen.errors import CacheError

KEYS = [Key({"number": number}) for number in range(2)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    for key in KEYS:
        with made.open(key) as entry:
            (entry.inductor / "code").write_bytes(key.digest.encode())
            made.publish(entry)
    return made


def test_there_and_back(store: Store, tmp_path: Path) -> None:
    assert set(export_bundle(store, tmp_path / "b.tgz")) == {key.digest for key in KEYS}
    assert store.clear() == 2
    with pytest.raises(CacheError, match="no usable entry"):
        export_bundle(store, tmp_path / "none.tgz")
    imported, left = import_bundle(store, tmp_path / "b.tgz", trust=True)
    assert (set(imported), left) == ({key.digest for key in KEYS}, {})
    for key in KEYS:
        with store.open(key) as entry:
            assert entry.hit
            assert (entry.inductor / "code").read_bytes() == key.digest.encode()
    assert set(import_bundle(store, tmp_path / "b.tgz", trust=True)[1].values()) == {"the store has it already"}


def test_one_entry(store: Store, tmp_path: Path) -> None:
    assert export_bundle(store, tmp_path / "b.tgz", [KEYS[0].digest[:6]]) == [KEYS[0].digest]
    with pytest.raises(CacheError, match="no usable entry 'zzz'"):
        export_bundle(store, tmp_path / "c.tgz", ["zzz"])
    with pytest.raises(CacheError, match="exists; name another"):
        export_bundle(store, tmp_path / "b.tgz")


def test_trust_is_asked_for_and_why(store: Store, tmp_path: Path) -> None:
    export_bundle(store, tmp_path / "b.tgz")
    store.clear()
    with pytest.raises(CacheError, match=r"code and pickle.*--trust"):
        import_bundle(store, tmp_path / "b.tgz", trust=False)
    assert store.entries() == []


def test_damage(store: Store, tmp_path: Path) -> None:
    export_bundle(store, tmp_path / "b.tgz")
    store.clear()
    data = (tmp_path / "b.tgz").read_bytes()
    for name, content in (("cut", data[: len(data) // 2]), ("text", b"no bundle"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CacheError, match="no bundle of a compile cache, or damaged"):
            import_bundle(store, tmp_path / name, trust=True)
    assert store.entries() == []
    assert [path.name for path in store.entries_directory.iterdir()] == []


@pytest.mark.parametrize(
    "member", ["../../evil", "/evil", "{digest}/../../evil", "{digest}/link", "unknown/inductor/x"]
)
def test_members_that_no_bundle_has(store: Store, tmp_path: Path, member: str) -> None:
    digest = KEYS[0].digest
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as bundle:
        header = f'{{"format": 1, "entries": ["{digest}"]}}'.encode()
        info = tarfile.TarInfo("hybridgen-cache.json")
        info.size = len(header)
        bundle.addfile(info, io.BytesIO(header))
        info = tarfile.TarInfo(member.format(digest=digest))
        if member.endswith("link"):
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        bundle.addfile(info, io.BytesIO(b""))
    store.clear()
    with pytest.raises(CacheError, match="a member that no bundle has"):
        import_bundle(store, tmp_path / "b.tgz", trust=True)
    assert not (tmp_path / "evil").exists()
    assert store.entries() == []


def test_a_bundle_comes_in_whatever_the_umask(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    export_bundle(store, path)
    mask = os.umask(0o002)
    try:
        imported, left = import_bundle(Store(tmp_path / "other"), path, trust=True)
    finally:
        os.umask(mask)
    assert imported
    assert not left
