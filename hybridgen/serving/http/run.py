"""`hybridgen http`: the process of the door, from its first byte to its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from hybridgen.errors import ConfigError, PromptError, ServerError
from hybridgen.serving.async_client import AsyncClient
from hybridgen.serving.http.event_loop import new_event_loop
from hybridgen.serving.http.options import EXTRA, HttpOptions, public_name

logger = logging.getLogger(__name__)

KEEP_ALIVE = 30
"""Seconds that a connection may stand idle."""
END_SECONDS = 110
"""For answers in flight, when it is told to end."""
BACKLOG = 512


def run_http(
    model: str,
    options: HttpOptions,
    path: str | os.PathLike[str] | None,
    *,
    listens: Callable[[str], None],
    ready: Callable[[str], None],
    child: bool,
) -> int:
    """Listen until told to end; returns the exit status.

    Args:
        model: whose tokenizer is read.
        path: the socket of the server; None: the default one.
        listens: called with the URL when it has its address; requests wait from then on.
        ready: called with the URL when it answers. Requests are answered 503 until the server is there.
        child: end when standard input does, which is a pipe from the process that started this one.

    Raises:
        ConfigError: the address cannot be had, or a package of the extra `http` is missing.
        HybridgenError: the tokenizer cannot be loaded.
    """
    check_extra()
    keys, template = options.keys(), options.template()
    listener = listen(*options.address())
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    listens(url)
    # What takes long comes behind it: who started this process goes on meanwhile.
    import uvicorn

    from hybridgen.serving.http.app import make_app
    from hybridgen.serving.http.jobs import Served
    from hybridgen.serving.http.text import Text

    tokenizer = _tokenizer(model)
    if template is not None:
        tokenizer.chat_template = template
    text, name = Text(tokenizer), options.name or public_name(model)
    if template is not None:
        check_template(text)

    def served(max_context: int) -> Served:
        return Served(name=name, text=text, max_context=max_context, default_tokens=options.default_tokens)

    app = make_app(
        served, AsyncClient(path, wait=0.0, brief=True), keys=keys, origins=options.origins, page=options.page
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            http="h11",
            ws="none",
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=END_SECONDS,
        )
    )
    if child:
        threading.Thread(target=_end_with_parent, args=(server,), daemon=True, name="hybridgen-parent").start()
    # A full collection goes through all that imports made: 0.3 s, in which all requests and answers would wait.
    gc.collect()
    gc.freeze()
    ready(url)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(server.serve(sockets=[listener]))
    return 0


def check_template(text: Any) -> None:
    """Raise if the tokenizer's template is none: else every chat would say so to its caller.

    Raises:
        ConfigError: it cannot be parsed.
    """
    try:
        text.encode_chat([{"role": "user", "content": "x"}], add_generation_prompt=True)
    except PromptError as error:  # it may refuse this chat
        if "TemplateSyntaxError" in str(error):
            raise ConfigError(f"--chat-template: {error}; mend it, or leave it out") from None


def check_extra() -> None:
    """
    Raises:
        ConfigError: a package of the extra `http` is missing.
    """
    try:
        import prometheus_client
        import starlette
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"{EXTRA} ({error.name} is missing)") from error
    del prometheus_client, starlette, uvicorn


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; give another HOST:PORT"
        ) from None
    # Connections inherit it. asyncio sets it only on sockets that name their protocol, which these do not: an answer's
    # body then waits 40 ms for the acknowledgement of its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _tokenizer(model: str) -> Any:
    from hybridgen.loading.files import given_tokenizer

    return given_tokenizer(model, False, False)


def _end_with_parent(server: Any) -> None:
    """Wait for the end of standard input: the parent holds its other end, however it ends."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    server.should_exit = True


def require_socket(path: str | os.PathLike[str] | None) -> None:
    """Check that a server listens there.

    Raises:
        ServerError: nobody does.
    """
    from hybridgen.serving.client import Client

    try:
        with Client(path, timeout=10) as client:
            client.ping()
    except ServerError as error:
        raise ServerError(f"{error}; start `hybridgen serve` first, or serve with --http", error.code) from None
