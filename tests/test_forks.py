"""The helper with which tests start Python processes: a fork is like a process that started afresh."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from waiting import HANGS, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes start as always")
FORKED = "'torch' in sys.modules"


def run(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return forks.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=HANGS, **options)


def test_it_is_a_child_with_its_arguments_place_and_environment(tmp_path: Path) -> None:
    code = f"import os, sys; print(os.getppid(), {FORKED}, sys.argv, os.getcwd(), os.environ['A'], sys.stdin.read())"
    done = run(code, "x y", cwd=tmp_path, env={**os.environ, "A": "b"}, input="in")
    assert done.stdout == f"{os.getpid()} True ['-c', 'x y'] {tmp_path} b in\n"
    assert run("import os; print('A' in os.environ, sorted(os.listdir('/proc/self/fd'))[:4])").stdout == (
        "False ['0', '1', '2', '3']\n"  # the last is that of the directory itself
    )


def test_scripts_and_modules(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("name = 'beside'\n")
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\nif __name__ == '__main__': print(beside.name, __file__, sys.argv)\n")
    done = forks.run([sys.executable, str(script), "1"], capture_output=True, text=True)
    assert done.stdout == f"beside {script} {[str(script), '1']}\n"
    done = forks.run([sys.executable, "-m", "script", "1"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"beside {script} {[str(script), '1']}\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import atexit, os; atexit.register(os._exit, 7)", 7),
        ("import sys; sys.exit(True)", 1),
        ("import sys; sys.exit(-1)", 255),
        ("import os, sys; os.close(1); os.open('/dev/full', os.O_WRONLY); print('x')", 120),
    ],
)
def test_the_end(code: str, status: int) -> None:
    assert run(code).returncode == status


def test_an_exception() -> None:
    done = run("1 / 0")
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_what_is_done_at_the_end() -> None:
    code = (
        "import atexit, sys, threading, time\n"
        "atexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n"
        "sys.exit('why')\n"
    )
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (1, "thread\nat exit\n", "why\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(number: int) -> None:
    code = "import time; print('ready', flush=True); time.sleep(600)"
    process = forks.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(HANGS) == -number
    process.stdout.close()


def test_an_interrupt() -> None:
    code = "import time\ntry:\n print('ready', flush=True); time.sleep(600)\nexcept KeyboardInterrupt: print('caught')"
    process = forks.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HANGS)[0] == "caught\n"


def test_a_session_of_its_own() -> None:
    code = "import os; print(os.getpgrp() == os.getpid())"
    assert run(code, start_new_session=True).stdout == "True\n"
    assert run("import os; print(os.getpgrp())").stdout == f"{os.getpgrp()}\n"


def test_what_libraries_read_at_import_starts_afresh() -> None:
    code = f"import sys; print({FORKED})"
    assert run(code, env={**os.environ, "TRITON_INTERPRET": "1"}).stdout == "False\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"
    assert forks.run([sys.executable, "-I", "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_what_a_fork_starts() -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; print({FORKED})'])"
    code = code.replace("'torch'", '"torch"')
    assert run(code).stdout == "False\n"
    assert run(code, env={**os.environ, forks.INSIDE: "1"}).stdout == "True\n"


def shell(script: str) -> subprocess.CompletedProcess[str]:
    python = shlex.join(forks.command())
    script = script.replace("PYTHON", python)
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=HANGS)


def test_in_a_shell() -> None:
    done = shell(
        "echo in | PYTHON -c 'import sys; print(sys.stdin.read(), end=\"\"); sys.exit(3)' | cat; echo ${PIPESTATUS[1]}"
    )
    assert done.stdout == "in\n3\n"
    assert shell("PYTHON -c 'for i in range(10**6): print(i)' 2>/dev/null | head -n 1").stdout == "0\n"


def test_a_shells_job_that_is_told_to_end() -> None:
    sleeping = "PYTHON -c 'import os, time; print(os.getpid(), flush=True); time.sleep(600)' >pid & p=$!; "
    sleeping = "cd $(mktemp -d); " + sleeping + "until [ -s pid ]; do sleep 0.02; done; "
    for name in ("TERM", "KILL"):
        done = shell(f"{sleeping} kill -{name} $p; wait $p; echo $?; cat pid")
        status, pid = map(int, done.stdout.split())
        assert status == 128 + signal.Signals[f"SIG{name}"]
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists())
