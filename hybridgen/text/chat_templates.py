"""Chat templates, rendered in a process of their own.

A template is a program that comes with a checkpoint. Jinja's sandbox keeps it from files, but not from loops without
end, numbers with a billion digits or texts of gigabytes, and none of these can be stopped inside this process. So
another one renders it, and is ended when that takes too long.
"""

from __future__ import annotations

import atexit
import dataclasses
import marshal
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any

from hybridgen.text.chat_template_worker import HEADER, LENGTH

RENDER_SECONDS = 4.0
"""For one chat. Real templates take a thousandth of it."""
START_SECONDS = 60.0
"""For the process to start; it takes less than a second where nothing else runs."""
MEMORY = 512 * 2**20
"""Bytes that a template may take."""
OUTPUT_CHARS = 8 * 2**20
"""Characters that it may make."""
_RENDER = "render_jinja_template"


NOT_VARIABLES = frozenset(
    {
        "self",
        "tokenizer",
        "messages",
        "conversation",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "tokenizer_kwargs",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
    }
)
"""Arguments of `apply_chat_template` that callers may not hand in among a template's variables: some would cut or pad
the prompt, the others are given in another way, or not at all."""


class ChatTemplateError(Exception):
    """A template refused its messages, or was ended."""


def apply_chat_template(tokenizer: Any, messages: Any, **options: Any) -> Any:
    """What `tokenizer.apply_chat_template(messages, **options)` returns, with the template rendered elsewhere.

    Everything but the rendering is the tokenizer's own code. A tokenizer whose class does without transformers' way to
    render is called as it is.

    Raises:
        ChatTemplateError: the template failed, or took too much time, memory or output.
    """
    method = getattr(type(tokenizer), "apply_chat_template", None)
    if (
        not isinstance(method, FunctionType)
        or "apply_chat_template" in vars(tokenizer)
        or _RENDER not in method.__code__.co_names
        or _RENDER not in method.__globals__
    ):
        return tokenizer.apply_chat_template(messages, **options)
    render = _render_to_encode if options.get("tokenize", True) else _renderer.render
    elsewhere = FunctionType(
        method.__code__,
        {**method.__globals__, _RENDER: render},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    elsewhere.__kwdefaults__ = method.__kwdefaults__
    return elsewhere(tokenizer, messages, **options)


class Renderer:
    """A process that renders, started when it is first needed, and again after it was ended."""

    def __init__(self, seconds: float = RENDER_SECONDS, memory: int = MEMORY, output: int = OUTPUT_CHARS) -> None:
        """
        Args:
            seconds: for one chat.
            memory: bytes that a template may take.
            output: characters that it may make.
        """
        self._seconds = seconds
        self._memory = memory
        self._output = output
        self._turn = threading.Lock()
        self._pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def render(self, *, conversations: Sequence[Any], **arguments: Any) -> tuple[list[str], list[Any]]:
        """`transformers.utils.chat_template_utils.render_jinja_template`, for one chat.

        Raises:
            ChatTemplateError: the template failed, or took too much time, memory or output.
        """
        question = marshal.dumps(plain({"conversations": list(conversations), **arguments}))
        with self._turn:
            connection = self._connected()
            deadline = time.monotonic() + self._seconds
            try:
                _send(connection, LENGTH.pack(len(question)) + question, deadline)
                good, data = _answer(connection, deadline, 4 * self._output)
            except TimeoutError:
                self._end()
                raise ChatTemplateError(f"it was ended after {self._seconds:g} s") from None
            except OSError:
                self._end()
                raise ChatTemplateError("its process ended; it may have taken too much memory or time") from None
            except BaseException:  # Ctrl-C: what comes next would be the answer to this question
                self._end()
                raise
        text = data.decode("utf-8", "surrogatepass")
        if not good:
            raise ChatTemplateError(text)
        return [text], []

    def start(self) -> None:
        """Start the process now, so that the first chat need not wait for it.

        Raises:
            ChatTemplateError: it cannot be started.
        """
        with self._turn:
            self._connected()

    def close(self) -> None:
        """End the process."""
        with self._turn:
            self._end()

    def _connected(self) -> socket.socket:
        if self._pid != os.getpid():  # forked: the process is the parent's
            if self._socket is not None:
                self._socket.close()
            self._socket = self._process = None
        if self._socket is None or self._process is None or self._process.poll() is not None:
            self._end()
            return self._start()
        return self._socket

    def _start(self) -> socket.socket:
        if not sys.executable:
            raise ChatTemplateError("there is no Python to render it with (sys.executable is empty)")
        ours, theirs = socket.socketpair()
        worker = Path(__file__).with_name("chat_template_worker.py")
        limits = [str(int(self._seconds) + 1), str(self._memory), str(self._output)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                # -P: the file's directory is not one to import from.
                [sys.executable, "-P", str(worker), str(theirs.fileno()), *limits],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C in the terminal is not for it
                env=environment,
            )
            self._pid = os.getpid()
            self._socket = ours
            theirs.close()
            _answer(ours, time.monotonic() + START_SECONDS, 0)
        except OSError as error:
            self._end()
            ours.close()
            raise ChatTemplateError(f"the process that renders templates does not start ({error})") from error
        except BaseException:
            self._end()
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    def _end(self) -> None:
        connection, process = self._socket, self._process
        self._socket = self._process = None
        if connection is not None:
            connection.close()
        if process is not None and self._pid == os.getpid():
            with suppress(OSError):
                process.kill()
            process.wait()


def plain(value: Any) -> Any:
    """A value of Python's own types, as a template sees it.

    Raises:
        TypeError: it is of a kind that cannot be handed to another process.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    dump: Callable[[], Any] | None = getattr(value, "model_dump", None)
    if callable(dump):  # pydantic
        return plain(dump())
    if type(value).__name__ == "AddedToken":
        return str(value)
    raise TypeError(f"a chat holds a {type(value).__name__}; give text, numbers, lists and objects")


def _send(connection: socket.socket, data: bytes, deadline: float) -> None:
    view = memoryview(data)
    while view:
        connection.settimeout(_left(deadline))
        view = view[connection.send(view[: 2**16]) :]


def _answer(connection: socket.socket, deadline: float, most: int) -> tuple[bool, bytes]:
    good, length = HEADER.unpack(_exactly(connection, HEADER.size, deadline))
    if length > most:
        raise OSError("the answer is too long")
    return good, _exactly(connection, length, deadline)


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    parts = []
    while count:
        connection.settimeout(_left(deadline))
        part = connection.recv(min(count, 2**20))
        if not part:
            raise ConnectionError("it ended")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _render_to_encode(**arguments: Any) -> tuple[list[str], list[Any]]:
    """What `Renderer.render` returns, for a tokenizer.

    Raises:
        ChatTemplateError: the template failed, or there is half a character in its text, which no tokenizer takes.
    """
    texts, spans = _renderer.render(**arguments)
    try:
        texts[0].encode()
    except UnicodeEncodeError:
        raise ChatTemplateError("they hold half a character (a lone surrogate); give valid Unicode") from None
    return texts, spans


_renderer = Renderer()
atexit.register(_renderer.close)


def start_renderer() -> None:
    """Start the process that renders, so that the first chat need not wait for it.

    Raises:
        ChatTemplateError: it cannot be started.
    """
    _renderer.start()
