"""The store without compilers: what is read is what was written, whole, ours, and for this key; else it is a miss."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
from waiting import HANGS

from hybridgen.compilation.store import Key, MemoryEntry, Store, entry, location
from hybridgen.compilation.store.files import UnusableError
from hybridgen.compilation.store.manifest import MANIFEST, READY

KEY = Key({"GPU": "H200", "torch": "2.13", "config.max_batch": 8})


def fill(store: Store, key: Key = KEY, **files: bytes) -> Path:
    """An entry with some files; returns its directory."""
    with store.open(key) as opened:
        assert not opened.hit
        for name, data in (files or {"kernel": b"code" * 100, "wrapper": b"more"}).items():
            (opened.inductor / "ab").mkdir(exist_ok=True)
            (opened.inductor / "ab" / name).write_bytes(data)
        opened.write_document("capture-plan", {"graphs": []})
        assert store.publish(opened) > 0
    return store.path_of(key.digest)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", device="H200, driver 570")


def test_an_entry_is_found_again_and_its_copy_is_another_place(store: Store) -> None:
    directory = fill(store)
    with store.open(KEY) as found:
        assert found.hit
        assert (found.inductor / "ab" / "kernel").read_bytes() == b"code" * 100
        assert directory not in (found.inductor / "ab" / "kernel").parents
        assert found.read_document("capture-plan") == {"graphs": []}
        assert found.read_document("choices") is None
        assert found.reads == {"capture-plan": True, "choices": False}
        assert store.publish(found) == 0  # nothing new


def test_what_a_process_adds_comes_in_and_nothing_is_lost(store: Store) -> None:
    fill(store)
    with store.open(KEY) as one, store.open(KEY) as two:
        (one.kernels / "a.cubin").write_bytes(b"1")
        (two.kernels / "b.cubin").write_bytes(b"2")
        (one.triton / "tmp.pid_1_x").mkdir()
        (one.triton / "tmp.pid_1_x" / "half").write_bytes(b"half")
        store.publish(one)
        store.publish(two)
    with store.open(KEY) as found:
        assert sorted(path.name for path in found.kernels.iterdir()) == ["a.cubin", "b.cubin"]
        assert list(found.triton.iterdir()) == []
        assert found.read_document("capture-plan") == {"graphs": []}


def test_triton_finds_the_members_of_a_group_where_the_copy_is(store: Store) -> None:
    with store.open(KEY) as made:
        (made.triton / "HASH").mkdir()
        (made.triton / "HASH" / "k.cubin").write_bytes(b"cubin")
        group = {"child_paths": {"k.cubin": str(made.triton / "HASH" / "k.cubin")}}
        (made.triton / "HASH" / "__grp__k.json").write_text(json.dumps(group))
        store.publish(made)
    text = (store.path_of(KEY.digest) / "triton" / "HASH" / "__grp__k.json").read_text()
    assert str(store.root) not in text
    with store.open(KEY) as found:
        group = json.loads((found.triton / "HASH" / "__grp__k.json").read_text())
        assert Path(group["child_paths"]["k.cubin"]) == found.triton / "HASH" / "k.cubin"


def change_bytes(directory: Path) -> None:
    (directory / "inductor" / "ab" / "kernel").write_bytes(b"evil" * 100)


def cut(directory: Path) -> None:
    (directory / "inductor" / "ab" / "kernel").write_bytes(b"code")


def remove_file(directory: Path) -> None:
    (directory / "inductor" / "ab" / "kernel").unlink()


def link_file(directory: Path) -> None:
    (directory / "inductor" / "ab" / "kernel").rename(directory.parent.parent / "elsewhere")
    (directory / "inductor" / "ab" / "kernel").symlink_to(directory.parent.parent / "elsewhere")


def link_directory(directory: Path) -> None:
    (directory / "inductor" / "ab").rename(directory.parent.parent / "elsewhere")
    (directory / "inductor" / "ab").symlink_to(directory.parent.parent / "elsewhere")


def link_entry(directory: Path) -> None:
    directory.rename(directory.parent.parent / "elsewhere")
    directory.symlink_to(directory.parent.parent / "elsewhere")


def open_to_others(directory: Path) -> None:
    (directory / "inductor" / "ab" / "kernel").chmod(0o666)


def no_marker(directory: Path) -> None:
    (directory / READY).unlink()


def cut_manifest(directory: Path) -> None:
    text = (directory / MANIFEST).read_text()
    (directory / MANIFEST).write_text(text[: len(text) // 2])


def pipe(directory: Path) -> None:
    (directory / "inductor" / "ab" / "kernel").unlink()
    os.mkfifo(directory / "inductor" / "ab" / "kernel", 0o600)


def foreign(directory: Path) -> None:
    os.chown(directory / "inductor" / "ab" / "kernel", 12345, -1)


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (change_bytes, "kernel has other contents than were written"),
    (cut, "kernel has 4 bytes and should have 400"),
    (remove_file, "kernel is missing"),
    (link_file, "kernel is a symbolic link"),
    (link_directory, "inductor/ab is a symbolic link"),
    (link_entry, "the entry is a symbolic link"),
    (open_to_others, "can be written by others"),
    (no_marker, "ready is missing"),
    (cut_manifest, "manifest.json is not the one that ready is for"),
    (pipe, "kernel is not a regular file"),
    pytest.param(
        foreign,
        "kernel belongs to user 12345",
        marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away"),
    ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damage_is_a_miss_with_its_reason(store: Store, damage: Callable[[Path], None], words: str) -> None:
    directory = fill(store)
    damage(directory)
    assert not store.check(KEY).hit
    with store.open(KEY) as found:
        assert not found.hit
        assert words in found.reason
        assert list(found.inductor.iterdir()) == []
        assert found.read_document("capture-plan") is None
        (found.inductor / "new").write_bytes(b"new")
        store.publish(found)
    assert not (directory / "inductor" / "ab").exists()
    (aside,) = (store.root / "quarantine").iterdir()
    if not aside.is_symlink():
        assert words in (aside / "reason.txt").read_text()
    with store.open(KEY) as found:
        assert found.hit


@pytest.mark.parametrize(("part", "value"), [("GPU", "H100"), ("torch", "2.11"), ("config.max_batch", 9)])
def test_an_entry_for_something_else_is_a_miss_that_names_it(store: Store, part: str, value: Any) -> None:
    directory = fill(store)
    other = Key(dict(KEY.parts) | {part: value})
    with store.open(other) as found:
        assert not found.hit
        assert f"differs in {part}: " in found.reason
    assert store.explain(other).differences == {part: (value, KEY.parts[part])}
    # Under the other's name, as a careless copy would put it.
    shutil.copytree(directory, store.path_of(other.digest))
    with store.open(other) as found:
        assert not found.hit
        assert "not for the one that it is named after" in found.reason
    with store.open(KEY) as found:
        assert found.hit


def test_device_documents(store: Store) -> None:
    assert store.documents.read("ceiling") is None
    store.documents.write("ceiling", {"bytes_per_second": 4e12})
    assert Store(store.root, device=store.device).documents.read("ceiling") == {"bytes_per_second": 4e12}
    assert Store(store.root, device="H200, driver 580").documents.read("ceiling") is None


def test_documents_in_memory() -> None:
    memory = MemoryEntry("compile_cache=False")
    assert memory.read_document("choices") is None
    memory.write_document("choices", {"a": [1]})
    memory.read_document("choices")["a"].append(2)
    assert memory.read_document("choices") == {"a": [1]}
    assert memory.kernels.stat().st_mode & 0o077 == 0
    for name in ("../x", "", "A", "a/b"):
        with pytest.raises(ValueError, match="no name of a document"):
            memory.write_document(name, {})


def test_a_full_disk_while_publishing_leaves_what_was_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    from hybridgen.compilation.store import versions as module

    def full(path: Path, data: bytes) -> tuple[int, str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with store.open(KEY) as found:
        (found.inductor / "more").write_bytes(b"x")
        monkeypatch.setattr(module, "_put", full)
        with pytest.raises(OSError, match="No space left"):
            store.publish(found)
    monkeypatch.undo()
    with store.open(KEY) as found:
        assert found.hit
        assert not (found.inductor / "more").exists()
    assert [path.name for path in store.entries_directory.iterdir()] == [KEY.digest]


def test_a_store_that_cannot_be_written_is_read(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill(store)
    monkeypatch.setattr(entry.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    reader = Store(store.root)
    assert not reader.writable
    with reader.open(KEY) as found:
        assert found.hit
        assert store.root not in found.directory.parents
    with reader.open(Key({"other": 1})) as found:  # nobody is waited for
        assert not found.hit


def test_the_least_recently_used_go_first(store: Store) -> None:
    keys = [Key({"number": number}) for number in range(3)]
    for age, key in enumerate(keys):
        marker = fill(store, key, kernel=b"x" * 10_000) / READY
        os.utime(marker, (time.time() - 1000 * (3 - age),) * 2)
    with store.open(keys[0]):  # its last use is now
        pass
    sizes = {info.digest: info.bytes for info in store.entries()}
    assert store.prune(sum(sizes.values()) - 1) == [keys[1].digest]
    assert [info.digest for info in store.entries()] == [keys[0].digest, keys[2].digest]
    assert store.clear() == 2
    assert store.entries() == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o755])
def test_a_directory_that_is_not_private_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(mode)
    with pytest.raises(UnusableError, match=r"open to others|written by others"):
        Store(tmp_path / "store")


def test_links_and_parents_that_others_can_change_are_refused(tmp_path: Path) -> None:
    Store(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UnusableError, match="symbolic link"):
        Store(tmp_path / "link")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(UnusableError, match=r"above .* can be written by others"):
        Store(tmp_path / "shared" / "store")
    found, problems = Store.find(str(tmp_path / "shared" / "store"))
    assert found is None
    assert len(problems) == 1


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYBRIDGEN_CACHE_DIR", str(tmp_path / "named"))
    assert location.candidates() == [tmp_path / "named"]
    assert location.candidates(str(tmp_path / "given")) == [tmp_path / "given"]
    monkeypatch.delenv("HYBRIDGEN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    top = Path(location.__file__).parents[2]  # a checkout, or where packages are installed
    assert location._checkout() == (top if (top / "pyproject.toml").exists() else None)
    monkeypatch.setattr(location, "_checkout", lambda: None)
    assert location.candidates() == [tmp_path / "xdg" / "hybridgen"]
    monkeypatch.setattr(location, "_checkout", lambda: tmp_path)
    assert location.candidates() == [tmp_path / "compile_cache", tmp_path / "xdg" / "hybridgen"]
    Store(tmp_path / "compile_cache")
    assert (tmp_path / "compile_cache" / ".gitignore").read_text().startswith("#")
    assert "code and pickle" in (tmp_path / "compile_cache" / "README.md").read_text()


def test_what_another_process_published_since_is_not_undone(store: Store) -> None:
    fill(store, kernel=b"first")
    with store.open(KEY) as one, store.open(KEY) as two:
        (two.inductor / "ab" / "kernel").write_bytes(b"second")
        two.write_document("tuning", {"tuned": True})
        store.publish(two)
        (one.kernels / "own").write_bytes(b"1")
        store.publish(one)
        (one.kernels / "more").write_bytes(b"2")  # what was left to the store once stays there
        store.publish(one)
    with store.open(KEY) as found:
        assert (found.inductor / "ab" / "kernel").read_bytes() == b"second"
        assert found.read_document("tuning") == {"tuned": True}
        assert {path.name for path in found.kernels.iterdir()} == {"own", "more"}
        (found.inductor / "ab" / "kernel").write_bytes(b"third")
        store.publish(found)
    with store.open(KEY) as found:
        assert (found.inductor / "ab" / "kernel").read_bytes() == b"third"


def test_a_damaged_version_is_replaced_by_a_whole_one(store: Store) -> None:
    fill(store, kernel=b"first")
    with store.open(KEY) as one:
        with store.open(KEY) as two:
            (two.inductor / "ab" / "kernel").write_bytes(b"second")
            store.publish(two)
        (store.path_of(KEY.digest) / "inductor" / "ab" / "kernel").write_bytes(b"evil")
        (one.kernels / "own").write_bytes(b"1")
        store.publish(one)
    with store.open(KEY) as found:
        assert found.hit
        assert (found.inductor / "ab" / "kernel").read_bytes() == b"first"


def test_only_the_version_that_was_seen_is_moved_aside(store: Store) -> None:
    directory = fill(store)
    with store.open(KEY) as bad:
        with store.open(KEY) as other:
            (other.inductor / "more").write_bytes(b"x")
            store.publish(other)
        store.move_aside(KEY.digest, "it computes something else", only=bad.origin)
        assert directory.exists()
        store.move_aside(KEY.digest, "it computes something else", only=other.origin)
        assert not directory.exists()


def test_a_working_copy_in_the_making_is_not_swept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process looks between the making of the lock's file and the lock."""
    original, looked = fcntl.flock, []

    def flock(descriptor: int, kind: int) -> None:
        if not looked:
            looked.append(True)
            entry.sweep(store.work)
        original(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert entry.WorkingDirectory(store.work).path.exists()
    assert looked


BUILDER = """
import os, sys, time
from pathlib import Path
from hybridgen.compilation.store import Key, Store
store = Store(Path(sys.argv[1]))
with store.open(Key({"k": 1})) as entry:
    if not entry.hit:
        with open(sys.argv[2], "a") as log:
            log.write(f"{os.getpid()}\\n")
        time.sleep(float(sys.argv[3]))
        (entry.inductor / "code").write_bytes(b"c" * 100_000)
        store.publish(entry)
    assert (entry.inductor / "code").read_bytes() == b"c" * 100_000
"""


def builder(root: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return forks.Popen([sys.executable, "-c", BUILDER, str(root), str(log), str(seconds)])


def test_of_ten_processes_on_an_empty_store_one_builds(tmp_path: Path) -> None:
    processes = [builder(tmp_path / "store", tmp_path / "log", 0.5) for _ in range(10)]
    assert [process.wait(HANGS) for process in processes] == [0] * 10
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_when_the_builder_dies_another_builds(tmp_path: Path) -> None:
    first = builder(tmp_path / "store", tmp_path / "log", 600)
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
        time.sleep(0.02)
    second = builder(tmp_path / "store", tmp_path / "log", 0)
    first.send_signal(signal.SIGKILL)
    first.wait(HANGS)
    assert second.wait(HANGS) == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 2
    with Store(tmp_path / "store").open(Key({"k": 1})) as found:
        assert found.hit
        # What the killed process left is gone.
        assert [path.name for path in (tmp_path / "store" / "work").iterdir()] == [found.directory.name]


CLOSER = """
import sys, time
from pathlib import Path
from hybridgen.compilation.store import Key, Store
root, name = Path(sys.argv[1]), sys.argv[2]
store = Store(root)
with store.open(Key({"k": 1})) as entry:
    assert entry.hit
    (root.parent / f"open-{name}").touch()
    while not (root.parent / "go").exists():
        time.sleep(0.005)
    (entry.kernels / name).write_bytes(name.encode() * 1000)
    store.publish(entry, {"plan": lambda there: {"uses": (there or {}).get("uses", 0) + 1}})
"""


def test_of_processes_that_close_at_once_nothing_is_lost(tmp_path: Path) -> None:
    store, key, names = Store(tmp_path / "store"), Key({"k": 1}), [f"k{number}" for number in range(8)]
    fill(store, key)
    command = [sys.executable, "-c", CLOSER, str(store.root)]
    processes = [forks.Popen([*command, name]) for name in names]
    while len(list(tmp_path.glob("open-*"))) < len(names):
        assert not any(process.poll() for process in processes)
        time.sleep(0.02)
    (tmp_path / "go").touch()
    assert [process.wait(HANGS) for process in processes] == [0] * len(names)
    with store.open(key) as found:
        assert sorted(path.name for path in found.kernels.iterdir()) == names
        assert found.read_document("plan") == {"uses": len(names)}
        assert found.read_document("capture-plan") == {"graphs": []}
    assert [path.name for path in store.entries_directory.iterdir()] == [key.digest]


KILLED = """
import os, signal, sys
from pathlib import Path
from hybridgen.compilation.store import Key, Store
from hybridgen.compilation.store import versions as module
store, place = Store(Path(sys.argv[1])), sys.argv[2]
calls = 0
def dying(name):
    original = getattr(module, name) if hasattr(module, name) else getattr(module.os, name)
    def call(*arguments):
        global calls
        calls += 1
        if place == f"before {name} {calls}":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments)
        if place == f"after {name} {calls}":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
with store.open(Key({"k": 1})) as entry:
    assert entry.hit
    (entry.kernels / "new").write_bytes(b"n")
    name = place.split()[1]
    setattr(module if hasattr(module, name) else module.os, name, dying(name))
    store.publish(entry)
"""


@pytest.mark.parametrize(
    ("place", "published"),
    [
        ("before _put 1", False),
        ("after _put 2", False),
        ("before rename 1", False),
        ("after rename 1", False),  # neither version has the entry's name
        ("after rename 2", True),
        ("before remove 1", True),
    ],
)
def test_killed_while_it_publishes(tmp_path: Path, place: str, published: bool) -> None:
    store, key = Store(tmp_path / "store"), Key({"k": 1})
    fill(store, key)
    process = forks.run([sys.executable, "-c", KILLED, str(store.root), place])
    assert process.returncode == -signal.SIGKILL
    assert store.check(key).hit
    with store.open(key) as found:
        assert found.hit
        assert (found.inductor / "ab" / "kernel").read_bytes() == b"code" * 100
        assert (found.kernels / "new").exists() == published
        (found.kernels / "later").write_bytes(b"l")
        assert store.publish(found) > 0
    # An entry that is deleted or moved aside does not come back as an older version.
    assert store.delete(key.digest)
    with store.open(key) as found:
        assert not found.hit


def test_what_a_killed_process_left_is_put_back_before_leftovers_go(tmp_path: Path) -> None:
    store, key = Store(tmp_path / "store"), Key({"k": 1})
    directory = fill(store, key)
    old = directory.rename(directory.with_name(f".old-{key.digest}-0123456789ab"))
    os.utime(old, (0, 0))
    fill(store, Key({"k": 2}))  # publishing deletes leftovers
    assert store.check(key).hit
    assert directory.exists()


PUBLISHER = """
import itertools, sys
from pathlib import Path
from hybridgen.compilation.store import Key, Store
store = Store(Path(sys.argv[1]))
with store.open(Key({"k": 1})) as entry:
    assert entry.hit, entry.reason
    print("open", flush=True)
    for number in itertools.count():
        (entry.kernels / "k").write_bytes(str(number).encode())
        store.publish(entry)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    store, key = Store(tmp_path / "store"), Key({"k": 1})
    fill(store, key)
    for number in range(12):
        process = forks.Popen([sys.executable, "-c", PUBLISHER, str(store.root)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        time.sleep(0.003 * number)
        process.kill()
        process.wait(HANGS)
        process.stdout.close()
        assert store.check(key).hit
    assert not (store.root / "quarantine").exists()


@pytest.mark.parametrize("name", ["inductor/ab/kernel", "manifest.json", "ready"])
@pytest.mark.parametrize("kind", ["directory", "fifo", "a link to itself", "a link out"])
def test_what_is_no_file_is_moved_aside(store: Store, name: str, kind: str) -> None:
    path = fill(store) / name
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "a link to itself" else "/etc/passwd")
    before = len(os.listdir("/proc/self/fd"))
    assert not store.check(KEY).hit
    assert len(store.entries()) == 1
    with store.open(KEY) as opened:
        assert not opened.hit
        assert f"{name} is {'a symbolic link' if 'link' in kind else 'not a regular file'}" in opened.reason
        opened.close()
    assert store.entries() == []
    assert len(list((store.root / "quarantine").iterdir())) == 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_entry_that_is_a_file_is_moved_aside(store: Store) -> None:
    directory = fill(store)
    shutil.rmtree(directory)
    directory.write_bytes(b"no directory")
    with store.open(KEY) as opened:
        assert not opened.hit
    fill(store)
    assert store.check(KEY).hit


def test_a_closed_or_dropped_working_copy_leaves_nothing(store: Store) -> None:
    fill(store)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for close in (True, False):
        for _ in range(3):
            with store.open(KEY) as opened:
                assert opened.hit
                if close:
                    opened.close()
                    opened.close()
            del opened
    gc.collect()
    assert list(store.work.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_miss_after_hybridgen_changed_says_so(store: Store) -> None:
    old = Key({**KEY.parts, "hybridgen sources": "a" * 64})
    fill(store, old)
    found = store.check(Key({**KEY.parts, "hybridgen sources": "b" * 64}))
    assert "hybridgen sources: aaaa" not in found.reason
    assert "hybridgen sources: bbbbbbbbbbbb here, aaaaaaaaaaaa there" in found.reason
    assert "own code has changed" in found.reason
    assert set(found.differences or {}) == {"hybridgen sources"}
