"""Where the socket may be, and who may own it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import short_directory
from wire import Raw

from hybridgen import Client, ServerError
from hybridgen.serving.unix import address
from hybridgen.serving.unix.address import Lease, socket_path


@pytest.fixture
def directory() -> Iterator[Path]:
    return short_directory()


def test_the_default_is_in_the_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert socket_path(None) == socket_path("unix:") == Path("/run/user/7/hybridgen/server.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert socket_path(None).parent.name == f"hybridgen-{os.getuid()}"


def test_the_scheme_is_cut_off(tmp_path: Path) -> None:
    assert socket_path(f"unix:{tmp_path}/a") == tmp_path / "a" == socket_path(tmp_path / "a")


def test_a_long_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"has \d+ bytes and an address holds"):
        socket_path(tmp_path / ("x" * 120))
    with pytest.raises(ServerError, match="is not a path"):
        socket_path("a\0b")


def test_makes_private_things_and_takes_them_away(directory: Path) -> None:
    path = directory / "new" / "x.sock"
    lease = Lease(path)
    listener = lease.listen()
    assert stat.S_IMODE(os.lstat(path.parent).st_mode) == 0o700
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    lease.release()
    lease.release()
    listener.close()
    assert list(path.parent.iterdir()) == []


def test_one_owner_at_a_time(directory: Path) -> None:
    first = Lease(directory / "x.sock")
    with pytest.raises(ServerError, match="another server has"):
        Lease(directory / "x.sock")
    first.release()
    Lease(directory / "x.sock").release()


def test_a_socket_that_answers_is_left_alone_even_without_its_lock(directory: Path) -> None:
    path = directory / "x.sock"
    first = Lease(path)
    listener = first.listen()
    (directory / "x.sock.lock").unlink()
    with pytest.raises(ServerError, match="another server has"):
        Lease(path)
    assert path.exists()
    listener.close()
    first.release()


def test_a_socket_that_nobody_answers_is_replaced(directory: Path) -> None:
    path = directory / "x.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    lease = Lease(path)
    assert not path.exists()
    lease.listen().close()
    lease.release()


def test_takes_away_only_its_own_socket(directory: Path) -> None:
    path = directory / "x.sock"
    lease = Lease(path)
    listener = lease.listen()
    path.unlink()
    path.write_text("of somebody else")
    lease.release()
    listener.close()
    assert path.read_text() == "of somebody else"


def test_what_is_no_socket_is_refused(directory: Path) -> None:
    path = directory / "x.sock"
    path.write_text("precious")
    with pytest.raises(ServerError, match="is not a socket of yours"):
        Lease(path)
    assert path.read_text() == "precious"
    with pytest.raises(ServerError, match="is not a socket"):
        Client(path)


def test_symbolic_links_are_refused(directory: Path) -> None:
    real = directory / "real"
    real.mkdir(mode=0o700)
    (directory / "link").symlink_to(real)
    with pytest.raises(ServerError, match="symbolic links are refused"):
        Lease(directory / "link" / "x.sock")
    (real / "x.sock").symlink_to(real / "elsewhere")
    with pytest.raises(ServerError, match="is not a socket of yours"):
        Lease(real / "x.sock")
    (real / "y.sock.lock").symlink_to(real / "elsewhere")
    with pytest.raises(ServerError, match="cannot be used"):
        Lease(real / "y.sock")
    assert not (real / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o777])
def test_a_directory_that_others_can_use_is_refused(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    with pytest.raises(ServerError, match=f"has mode {mode:04o}"):
        Lease(directory / "x.sock")


def test_a_parent_that_others_can_replace_is_refused(directory: Path) -> None:
    inner = directory / "shared" / "mine"
    inner.mkdir(mode=0o700, parents=True)
    inner.parent.chmod(0o777)
    with pytest.raises(ServerError, match="other users can replace"):
        Lease(inner / "x.sock")


def test_a_missing_parent_is_an_error(directory: Path) -> None:
    with pytest.raises(ServerError, match="No such file"):
        Lease(directory / "a" / "b" / "x.sock")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_directory_of_somebody_else_is_refused(directory: Path) -> None:
    os.chown(directory, 65534, 65534)
    with pytest.raises(ServerError, match="belongs to another user"):
        Lease(directory / "x.sock")


def test_the_peer_is_known() -> None:
    one, two = socket.socketpair(socket.AF_UNIX)
    with one, two:
        assert address.peer_uid(one) == os.getuid()


def test_a_client_refuses_a_server_of_somebody_else(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "x.sock"))
        listener.listen()
        monkeypatch.setattr(address, "peer_uid", lambda connection: os.getuid() + 1)
        with pytest.raises(ServerError, match="belongs to another user"):
            Client(directory / "x.sock")


def test_nobody_there(directory: Path) -> None:
    with pytest.raises(ServerError, match=r"no server answers.*hybridgen serve"):
        Client(directory / "x.sock")


STRANGER = """
import socket, struct, sys, os
os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(sys.argv[1])
body = b'{"type": "hello", "version": 1}'
try: s.sendall(struct.pack(">I", len(body)) + body)
except BrokenPipeError: pass
data = b""
try:
    while part := s.recv(4096): data += part
except ConnectionResetError: pass  # after the answer
sys.stdout.buffer.write(data[4:])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused_when_accepted(toy, directory: Path) -> None:
    server = toy(at=directory)
    reached = subprocess.run([sys.executable, "-c", STRANGER, str(server.path)], capture_output=True, text=True)
    assert "PermissionError" in reached.stderr  # the directory alone keeps others out
    for path, mode in ((directory, 0o711), (server.path.parent, 0o711), (server.path, 0o666)):
        path.chmod(mode)
    done = subprocess.run([sys.executable, "-c", STRANGER, str(server.path)], capture_output=True, text=True)
    assert '"code":"user"' in done.stdout, done.stderr
    assert '"hello"' not in done.stdout
    assert "a client of user 65534 was refused" in server.log()
    Raw(server.path).close()
