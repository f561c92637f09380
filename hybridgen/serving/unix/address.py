"""Where a server's socket is, who may use it, and how one process at a time owns it."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import sys
import tempfile
import time
from pathlib import Path

from hybridgen.errors import ServerError, shown

SCHEME = "unix:"
_NAME = "server.sock"
_MAX_PATH = 107 if sys.platform == "linux" else 103
"""Bytes that a socket's address holds."""
_CONNECT_SECONDS = 5.0
_AGAIN_SECONDS = 0.1
BACKLOG = 128
"""Clients that may wait to be accepted."""


def default_path() -> Path:
    """`$XDG_RUNTIME_DIR/hybridgen/server.sock`, or the same in a private directory for temporary files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return Path(runtime) / "hybridgen" / _NAME
    return Path(tempfile.gettempdir()) / f"hybridgen-{os.getuid()}" / _NAME


def socket_path(path: str | os.PathLike[str] | None) -> Path:
    """The socket's absolute path; `unix:PATH` is `PATH`, and nothing is the default.

    Raises:
        ServerError: it is longer than a socket's address can be, or no path.
    """
    text = os.fspath(path) if path is not None else ""
    if not isinstance(text, str) or "\0" in text:
        raise ServerError(f"socket={shown(path)} is not a path; give one as text")
    text = text.removeprefix(SCHEME)
    result = Path(os.path.abspath(os.path.expanduser(text))) if text else default_path()
    length = len(os.fsencode(result))
    if length > _MAX_PATH:
        raise ServerError(
            f"the socket's path {shown(str(result))} has {length} bytes and an address holds {_MAX_PATH}; choose a "
            "shorter one"
        )
    return result


class Lease:
    """The right to listen on a path, held by one process at a time until `release()` or its death."""

    def __init__(self, path: Path) -> None:
        """Take it; the directory is made if its parent exists.

        Raises:
            ServerError: another server has the path, something else is there, or the directory is not private.
        """
        self.path = path
        self._bound: tuple[int, int] | None = None
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            check_directory(path.parent)
            self._lock_path = path.with_name(path.name + ".lock")
            self._lock = self._take()
        except OSError as error:
            raise ServerError(f"the socket {path} cannot be used: {error.strerror}; choose another --socket") from error
        try:
            self._remove_stale()
        except BaseException:
            self.release()
            raise

    def _take(self) -> int:
        import fcntl  # not everywhere, and clients do without

        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open(self._lock_path, flags, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same(os.fstat(lock), _lstat(self._lock_path)):
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise self._taken() from None
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # its last owner removed the file in between: take the new one

    def _remove_stale(self) -> None:
        """Remove what a server that was killed left behind. The lock is held."""
        found = _lstat(self.path)
        if found is None:
            return
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
            raise ServerError(f"{self.path} is there and is not a socket of yours; choose another --socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink()
                return
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
        raise self._taken()  # it answers, or is too busy to

    def _taken(self) -> ServerError:
        return ServerError(f"another server has {self.path}; end it (hybridgen client --shutdown), or choose another")

    def listen(self) -> socket.socket:
        """Bind and listen; the socket's file is of mode 0600."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self.path))
            # Nobody else can reach it in between: the directory is private.
            os.chmod(self.path, 0o600)
            found = os.lstat(self.path)
            self._bound = (found.st_dev, found.st_ino)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise ServerError(f"cannot listen on {self.path}: {error.strerror}; choose another --socket") from error
        return listener

    def unlink(self) -> None:
        """Remove the socket's file, if it is still the one that `listen()` made."""
        found = _lstat(self.path)
        if found is not None and self._bound == (found.st_dev, found.st_ino):
            self.path.unlink(missing_ok=True)
        self._bound = None

    def release(self) -> None:
        """Remove the socket's file and give the path back. Once is enough."""
        self.unlink()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            self._lock_path.unlink(missing_ok=True)  # before the lock ends: who waits for it sees that it is gone
            os.close(lock)


def check_directory(directory: Path) -> None:
    """Check that nobody else can put a socket into a directory, or put another directory in its place.

    Raises:
        ServerError: it is a symbolic link or no directory, belongs to somebody else, or others can use it.
        OSError: it cannot be looked at.
    """
    found = os.lstat(directory)
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        raise ServerError(f"{directory} is not a directory (symbolic links are refused); choose another --socket")
    if found.st_uid != os.getuid():
        raise ServerError(f"{directory} belongs to another user; put the socket into a directory of your own")
    if found.st_mode & 0o077:
        raise ServerError(
            f"{directory} has mode {stat.S_IMODE(found.st_mode):04o}, so that others can use it; make it private "
            "(chmod 700), or choose another --socket"
        )
    for parent in Path(os.path.realpath(directory)).parents:
        found = os.lstat(parent)
        shared = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
        if shared or found.st_uid not in (0, os.getuid()):
            raise ServerError(f"{directory} is not safe: other users can replace {parent}; choose another --socket")


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end of a Unix socket."""
    if hasattr(socket, "SO_PEERCRED"):
        size = struct.calcsize("3i")
        return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])
    # macOS and the BSDs: struct xucred {version, uid, ...}, option LOCAL_PEERCRED of level SOL_LOCAL
    credentials = connection.getsockopt(0, 1, 128)
    return int(struct.unpack_from("2I", credentials)[1])


def connect(path: str | os.PathLike[str] | None, patience: float = 0.0) -> socket.socket:
    """Connect to the server of this user at a path.

    Args:
        patience: seconds for which it is tried again while nobody listens there.

    Raises:
        ServerError: nobody listens there, or somebody else does.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return _connect(path)
        except ServerError as error:
            if not isinstance(error.__cause__, (FileNotFoundError, ConnectionRefusedError)):
                raise
            if time.monotonic() >= deadline:
                raise
        time.sleep(_AGAIN_SECONDS)


def _connect(path: str | os.PathLike[str] | None) -> socket.socket:
    resolved = socket_path(path)
    found = _lstat(resolved)
    if found is not None and not stat.S_ISSOCK(found.st_mode):
        raise ServerError(f"{resolved} is not a socket; give the path that hybridgen serve listens on")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_CONNECT_SECONDS)
        connection.connect(str(resolved))
        if peer_uid(connection) != os.getuid():
            raise ServerError(f"the server at {resolved} belongs to another user; start one of your own")
        connection.settimeout(None)
    except OSError as error:
        connection.close()
        why = "timed out" if isinstance(error, TimeoutError) else error.strerror
        raise ServerError(f"no server answers at {resolved} ({why}); start one: hybridgen serve") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _same(first: os.stat_result, second: os.stat_result | None) -> bool:
    return second is not None and (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
