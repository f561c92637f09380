"""Python processes that start within milliseconds: forks of one that has imported torch, transformers and hybridgen.

`Popen` and `run` are those of `subprocess` for commands of this Python: `-m`, `-c` and scripts. The process is a child
of this one, with a pid, pipes, signals and an exit status like any other. At its end it does not take down what was
imported. Whatever else is asked for (options of Python, variables that libraries read when they are imported, other
programs) starts as always. What a test is about process starts, imports or a fresh environment takes `subprocess`.

`command()` is for shells: what it returns stands before `-m`, `-c` or a script, and starts a fork too, which ends with
it and as it does.

This file is also the script of the server and of what shells start.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_AT_IMPORT = ("CUDA", "HF_", "LD_", "PYTHON", "TORCH", "TRANSFORMERS", "TRITON", "TOKENIZERS")
"""Variables that are read at import begin so."""
_LATER = ("PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""But not these."""
INSIDE = "HYBRIDGEN_TEST_FORKS"
"""A variable with which what a fork starts is a fork too."""
OWN = "own-server"
"""An option of `Server.command`: what this module starts in the fork is forked from that."""
_PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_CHILD_SUBREAPER = 36
_PYTHON = sys.executable
_SHOWN = 4000
"""Characters of a command that `ps` can show of a fork."""


class Server:
    """The process that forks."""

    def __init__(self, environment: Mapping[str, str], *, compiles: bool = False) -> None:
        """Start it, with this environment; it ends with this process.

        Args:
            compiles: have Inductor compile something before anything is forked; see `ahead`.
        """
        import hybridgen

        self._directory = tempfile.mkdtemp(prefix="hybridgen-forks-")
        self.path = f"{self._directory}/s"
        self.owner = os.getpid()
        package = str(Path(hybridgen.__path__[0]).parent)
        self._environment = {**environment, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
        self._life, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [_PYTHON, __file__, "serve", self.path, str(theirs.fileno()), str(int(compiles)), " " * _SHOWN],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self.close)
        assert self._process.stdout is not None
        self.runs = self._process.stdout.readline() == b"ready\n"
        """Whether it could start. Where libraries have threads as soon as they are imported, nothing can be forked."""

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether it runs, and what it has imported is as this environment would have it."""

        def read(values: Mapping[str, str]) -> dict[str, str]:
            return {k: v for k, v in values.items() if k.startswith(_AT_IMPORT) and k not in _LATER}

        return self.runs and read(environment) == read(self._environment)

    def command(self, *options: str) -> list[str]:
        """What a shell, or another program, starts instead of `python`."""
        return [_PYTHON, "-I", "-S", __file__, "run", self.path, *options] if self.runs else [_PYTHON]

    def close(self) -> None:
        """End it, if this process started it; what it forked goes on."""
        if os.getpid() == self.owner:
            self._process.kill()
            self._process.communicate()
            self._life.close()
            shutil.rmtree(self._directory, ignore_errors=True)


_server: Server | None = None


def server() -> Server:
    """That of this process; the first call starts it."""
    global _server
    if _server is None or _server.owner != os.getpid():
        _server = Server(os.environ)
    return _server


def command() -> list[str]:
    """What a shell starts instead of `python`."""
    return server().command() if sys.platform == "linux" else [_PYTHON]


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A child process; a fork where that comes to the same."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
        """As in CPython 3.11 to 3.14."""
        (close_fds, pass_fds, cwd, env, _, _, shell, *pipes), more = rest[:13], rest[13:]
        *ids, umask, session, group = more[1:]
        environment = dict(os.environ if env is None else env)
        plain = (
            sys.platform == "linux"
            and close_fds
            and not any((executable, preexec_fn, pass_fds, shell))
            and [*ids, umask, group] == [None, None, None, -1, -1]
            and isinstance(args, Sequence)
            and not isinstance(args, str)
            and len(args) > 1
            and str(args[0]) == _PYTHON
            and (args[1] in ("-m", "-c") or not str(args[1]).startswith("-"))
            and server().serves(environment)
        )
        if not plain:
            super()._execute_child(args, executable, preexec_fn, *rest)  # type: ignore[misc]
            return
        request = {
            "args": [os.fsdecode(arg) for arg in args[1:]],
            "cwd": os.getcwd() if cwd is None else os.fsdecode(cwd),
            "env": environment,
            "session": bool(session),
            "parent": os.getpid(),
            "ignored": _ignored(),
        }
        files = [pipes[0], pipes[3], pipes[5]]
        _adopt(True)
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(server().path)
                _send(connection, request, [number if given == -1 else given for number, given in enumerate(files)])
                self.pid = int(_receive(connection)[0])
        finally:
            _adopt(False)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(
    args: Sequence[Any],
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, by a fork."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    check = options.pop("check", False)
    with Popen(args, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, args, out, err)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def _ignored() -> list[int]:
    """Signals that are ignored here, and so in what is started."""
    return [number for number in _PASSED_ON if signal.getsignal(number) is signal.SIG_IGN]


def _adopt(wanted: bool) -> None:
    """Whether orphans among this process's descendants become its children."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _send(connection: socket.socket, value: Any, files: Sequence[int] = ()) -> None:
    body = json.dumps(value).encode()
    head = struct.pack(">I", len(body))
    if files:
        socket.send_fds(connection, [head], files)
    else:
        connection.sendall(head)
    connection.sendall(body)


def _receive(connection: socket.socket) -> tuple[Any, list[int]]:
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    if len(head) < 4:
        raise EOFError("the server of forks has ended")
    (size,), body = struct.unpack(">I", head), bytearray()
    while len(body) < size:
        part = connection.recv(size - len(body))
        if not part:
            raise EOFError("the server of forks has ended")
        body += part
    return json.loads(body), files


def serve(path: str, life: int, compiles: bool) -> dict[str, Any]:
    """Fork for whoever connects, until `life` is closed. Returns in the forked processes, with what they are to do."""
    import gc

    import ahead

    ahead.load()
    if compiles and shutil.which("g++"):
        ahead.compile_something()
    for each in weakref.finalize._registry:  # type: ignore[attr-defined]
        each.atexit = False  # a fork that ends need not undo what was imported
    gc.collect()
    gc.freeze()
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("a fork would lose the threads that there are")
    listener = _listener(path)
    os.write(1, b"ready\n")
    return _serve(listener, life)


def _listener(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    return listener


def _serve(listener: socket.socket, life: int) -> dict[str, Any]:
    for number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    while True:
        if life in select.select([listener, life], [], [])[0]:
            os._exit(0)
        connection, _ = listener.accept()
        with suppress(EOFError):
            request, files = _receive(connection)
            if os.fork() == 0:
                break
            for file in files:
                os.close(file)
        connection.close()
    # Between the server and the process that is wanted, which is its grandparent's as soon as this one ends.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        if request["parent"] is None:
            _attend(connection, pid)
        os._exit(0)
    for number, file in enumerate(files):
        os.dup2(file, number)
    if request["parent"] is not None:
        deadline = time.monotonic() + 120
        while request["parent"] != os.getppid():
            if time.monotonic() > deadline:
                os._exit(1)  # nobody waits for it any more
            time.sleep(0.001)
        _send(connection, os.getpid())
    path = listener.getsockname()
    for held in (connection, listener):
        held.detach()
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    inside, own = INSIDE in request["env"], OWN in request.get("options", ())
    if inside or own:
        request = _with_own_server(request, f"{path}.{os.getpid()}", inside)
    return request


def _with_own_server(request: dict[str, Any], path: str, inside: bool) -> dict[str, Any]:
    """Give this fork a server of its own: for all that it starts, or for what it starts by this module."""
    global _server
    listener = _listener(path)
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        return _serve(listener, theirs.detach())
    listener.close()
    theirs.close()
    _server = Server.__new__(Server)
    ours.detach()  # it is open as long as this process is there
    _server.path, _server.owner, _server.runs = path, os.getpid(), True
    _server._environment = request["env"]
    if inside:
        subprocess.Popen = Popen  # type: ignore[misc]
    else:
        sys.modules["forks"] = sys.modules["__main__"]
    return request


def _attend(connection: socket.socket, pid: int) -> None:
    """Stand between a shell's command and its fork: signals go down, the status up; one ends with the other."""
    for file in os.listdir("/proc/self/fd"):
        if int(file) != connection.fileno():
            with suppress(OSError):
                os.close(int(file))
    ended = os.pidfd_open(pid)
    while ended not in select.select([connection, ended], [], [])[0]:
        told = connection.recv(1)
        os.kill(pid, told[0] if told else signal.SIGKILL)
        if not told:
            os._exit(0)
    _send(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def become(request: dict[str, Any]) -> None:
    """Run a command in this fork as Python would have run it in a fresh process."""
    import torch

    # A fork makes its thread pool anew at first use. Two threads that come first together find none ("Invalid thread
    # pool!"), so it is made while there is one.
    torch.set_num_threads(torch.get_num_threads())
    # tqdm's lock lies between all forks; one that is killed while it has the lock would stop the others for ever.
    if "tqdm.std" in sys.modules:
        sys.modules["tqdm.std"].tqdm.set_lock(threading.RLock())
    for number in (signal.SIGINT, *_PASSED_ON):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    if request["session"]:
        os.setsid()
    elif "group" in request:
        with suppress(OSError):  # of another session: a shell's of its own
            os.setpgid(0, request["group"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        old = getattr(sys, name)
        # Line by line, as Python has it for terminals and for errors.
        lines = name == "stderr" or os.isatty(old.fileno())
        new = open(  # noqa: SIM115
            old.fileno(), mode, 1 if lines else -1, encoding=old.encoding, errors=old.errors, closefd=False
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    _show([_PYTHON, *request["args"]])
    kind, *rest = request["args"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    paths = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = paths
    try:
        if kind == "-m":
            import runpy

            sys.path.insert(0, os.getcwd())
            sys.argv = ["-m", *rest[1:]]
            runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        elif kind == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.path.insert(0, str(Path(kind).resolve().parent))
            sys.argv = [kind, *rest]
            main.__file__ = kind
            exec(compile(Path(kind).read_bytes(), kind, "exec"), main.__dict__)
    except SystemExit as ended:
        _end(ended.code)
    _end(None)


def _end(code: Any) -> None:
    """End as Python does after `sys.exit(code)`, but for taking all modules down: that is half a second of the
    processor, most of it for pages that the fork shared until then."""
    if not (code is None or isinstance(code, int)):
        print(code, file=sys.stderr)  # noqa: T201
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    status = (code or 0) & 0xFF
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120
    os._exit(status)


def _show(command: Sequence[str]) -> None:
    """Have `ps` and `pgrep` show this command: what was the server's is overwritten."""
    import ctypes

    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    shown = b"\0".join(map(os.fsencode, command))[: end - start - 1]
    ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)


def run_for_shell(path: str, arguments: list[str]) -> int:
    """Stand in for a fork: pass signals on to it, and end as it does."""
    options = [OWN] if arguments[0] == OWN else []
    request = {
        "args": [each for each in arguments[len(options) :] if each != "-u"],  # how Python would buffer its output
        "options": options,
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "session": False,
        "group": os.getpgrp(),
        "parent": None,
        "ignored": _ignored(),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        _send(connection, request, (0, 1, 2))
        for number in _PASSED_ON:
            if number not in request["ignored"]:
                signal.signal(number, lambda number, frame: connection.send(bytes([number])))
        for file in (0, 1):  # so that who reads or writes at the other end sees the fork's end of it alone
            os.close(file)
        status = int(_receive(connection)[0])
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(run_for_shell(sys.argv[2], sys.argv[3:]))
    become(serve(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1"))
