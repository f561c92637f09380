"""The process that renders chat templates. `hybridgen.text.chat_templates` starts it, as a file, with one socket.

It imports neither torch nor this package. What it is asked comes from its parent, which it trusts; the template is a
program of a checkpoint, which it does not: a limit of memory and of processor time ends it with the template.
"""

from __future__ import annotations

import marshal
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

HEADER = struct.Struct(">?I")
"""Of an answer: whether it is the text, or an error; and its bytes."""
LENGTH = struct.Struct(">I")
"""Bytes of a question."""


def main() -> None:
    """Answer questions until the other side is closed."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    seconds, memory, output = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory(memory)
    connection.sendall(HEADER.pack(True, 0))  # it is ready
    with suppress(OSError, EOFError):
        while True:
            (length,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
            arguments = marshal.loads(_exactly(connection, length))
            _limit_time(seconds)
            good, text = _render(render_jinja_template, arguments, output)
            data = text.encode("utf-8", "surrogatepass")
            connection.sendall(HEADER.pack(good, len(data)) + data)


def _render(render: Any, arguments: dict[str, Any], output: int) -> tuple[bool, str]:
    try:
        rendered, _ = render(**arguments)
        text: str = rendered[0]
    except MemoryError:
        return False, "MemoryError: it takes too much memory"
    except RecursionError:
        return False, "RecursionError: it calls itself without end"
    except Exception as error:  # templates raise what they like
        return False, f"{type(error).__name__}: {error}"[:2000]
    if len(text) > output:
        return False, f"it made {len(text)} characters, over the limit of {output}"
    return True, text


def _limit_memory(more: int) -> None:
    """Let the process take that many bytes more than it has."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            present = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + more, present + more))


def _limit_time(seconds: int) -> None:
    """End the process when it computes for longer, also when nobody is there any more to end it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + seconds + 1, hard))


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    main()
