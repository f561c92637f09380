"""Export, clear, import: what comes back is what was there; what is no bundle brings nothing in."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from hybridgen.compilation.store import Key, Store
from hybridgen.compilation.store.bundle import export_bundle, import_bundle
from hybridgen.compilation.store.files import sha256
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


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE])
def test_members_that_are_no_files(tmp_path: Path, kind: bytes) -> None:
    digest = KEYS[0].digest
    header = f'{{"format": 1, "entries": ["{digest}"]}}'.encode()
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as bundle:
        info = tarfile.TarInfo("hybridgen-cache.json")
        info.size = len(header)
        bundle.addfile(info, io.BytesIO(header))
        info = tarfile.TarInfo(f"{digest}/ready")
        info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.LNKTYPE else ""
        bundle.addfile(info)
    other = Store(tmp_path / "other")
    with pytest.raises(CacheError):
        import_bundle(other, tmp_path / "b.tgz", trust=True)
    assert list(other.entries_directory.iterdir()) == []


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


def forge(path: Path, header: bytes, members: list[tuple[str, bytes]], **pax: str) -> None:
    """A bundle as nobody's export writes it."""
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, pax_headers=pax) as bundle:
        for name, data in [("hybridgen-cache.json", header), *members]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            bundle.addfile(info, io.BytesIO(data))


def entry_of(manifest: dict[str, Any] | bytes, *others: tuple[str, bytes]) -> list[tuple[str, bytes]]:
    """The members of the first key's entry."""
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    members = [*others, ("manifest.json", data), ("ready", sha256(data).encode())]
    return [(f"{KEYS[0].digest}/{name}", data) for name, data in members]


def manifest_of(**changes: Any) -> dict[str, Any]:
    key = KEYS[0]
    return {"format": 1, "key": key.digest, "parts": dict(key.parts), "created": 1.0, "files": {}} | changes


HEADER = json.dumps({"format": 1, "entries": [KEYS[0].digest]}).encode()
FILE = {"bytes": 1, "sha256": sha256(b"x")}


@pytest.mark.parametrize(
    ("header", "members"),
    [
        (b"[" * 100_000, []),
        (b'{"format": 1, "entries": "ab"}', []),
        (b'{"format": 1}', []),
        (b" " * 2**21, []),
        (HEADER, entry_of(b"[" * 100_000)),
        (HEADER, entry_of(b"[" * (2**24 + 1))),
        (HEADER, entry_of(manifest_of(created=10**400))),
        (HEADER, entry_of(manifest_of(files={"aot/x": {"bytes": 1e999, "sha256": "0"}}))),
        (HEADER, entry_of(manifest_of(files={"aot/\ud800": FILE}))),
        (HEADER, entry_of(manifest_of(files={"aot/a\0b": FILE}))),
        (HEADER, entry_of(manifest_of(files={"aot/x": FILE, "aot/x/y": FILE}), ("aot/x", b"x"))),
        (HEADER, entry_of(manifest_of(files={"aot/x": FILE}), ("aot/x", b"x"), ("aot/more", b"y"))),
        (HEADER, entry_of(manifest_of(), ("evil.pth", b"y"))),
    ],
)
def test_hostile_bundles_are_one_of_our_errors(tmp_path: Path, header: bytes, members: list[tuple[str, bytes]]) -> None:
    forge(tmp_path / "b.tgz", header, members)
    store = Store(tmp_path / "other")
    with pytest.raises(CacheError, match="no bundle of a compile cache, or damaged"):
        import_bundle(store, tmp_path / "b.tgz", trust=True)
    assert list(store.entries_directory.iterdir()) == []


def test_every_damaged_byte_is_one_of_our_errors_or_harmless(store: Store, tmp_path: Path) -> None:
    export_bundle(store, tmp_path / "b.tgz")
    data = (tmp_path / "b.tgz").read_bytes()
    other = Store(tmp_path / "other")
    for position in range(0, len(data), 7):
        (tmp_path / "bad.tgz").write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        try:
            import_bundle(other, tmp_path / "bad.tgz", trust=True)
        except CacheError:
            continue
    assert all(info.problem is None for info in other.entries())


def test_a_header_of_a_member_is_read_with_a_limit(tmp_path: Path) -> None:
    """`tarfile` reads a pax header as a whole: 64 MiB of one letter are 64 KiB in a bundle."""
    forge(tmp_path / "b.tgz", HEADER, [], comment="a" * 2**26)
    tracemalloc.start()
    try:
        with pytest.raises(CacheError, match="a header of"):
            import_bundle(Store(tmp_path / "other"), tmp_path / "b.tgz", trust=True)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_manifest_of_zeros_is_read_with_a_limit(tmp_path: Path) -> None:
    """256 MiB of a member that says it has 2 GiB; 256 KiB in a bundle."""
    info = tarfile.TarInfo("hybridgen-cache.json")
    info.size = len(HEADER)
    with gzip.open(tmp_path / "b.tgz", "wb", 1) as file:
        file.write(info.tobuf() + HEADER + bytes(-len(HEADER) % 512))
        info = tarfile.TarInfo(f"{KEYS[0].digest}/manifest.json")
        info.size = 2**31
        file.write(info.tobuf())
        for _ in range(64):
            file.write(bytes(2**22))
    other = Store(tmp_path / "other")
    tracemalloc.start()
    try:
        with pytest.raises(CacheError):
            import_bundle(other, tmp_path / "b.tgz", trust=True)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert list(other.entries_directory.iterdir()) == []


def test_no_more_comes_in_than_the_store_may_hold(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(store, tmp_path / "b.tgz")
    other = Store(tmp_path / "other")
    monkeypatch.setenv("HYBRIDGEN_CACHE_MAX_BYTES", "100")
    with pytest.raises(CacheError, match="more than 100 bytes, which is the size cap"):
        import_bundle(other, tmp_path / "b.tgz", trust=True)
    assert list(other.entries_directory.iterdir()) == []
    size = sum(info.bytes for info in store.entries())
    monkeypatch.setenv("HYBRIDGEN_CACHE_MAX_BYTES", str(size + 100))
    older = Key({"number": "older"})
    with other.open(older) as entry:
        (entry.inductor / "code").write_bytes(b"x" * 200)
        other.publish(entry)
    os.utime(other.path_of(older.digest) / "ready", (1, 1))
    import_bundle(other, tmp_path / "b.tgz", trust=True)
    assert {info.digest for info in other.entries()} == {key.digest for key in KEYS}
