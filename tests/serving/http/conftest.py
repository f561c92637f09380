"""HTTP doors for the tests, in threads of this process, before servers in processes of their own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from waiting import HANGS, until
from wire import Process

from hybridgen.demo import model_path
from hybridgen.loading.files import given_tokenizer
from hybridgen.serving.async_client import AsyncClient
from hybridgen.serving.http.app import make_app
from hybridgen.serving.http.jobs import Served
from hybridgen.serving.http.text import Text

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'function' %}{{ raise_exception('no functions') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ c.function.arguments['x'] }})]{% endfor %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if tools %}tools: {% for t in tools %}{{ t.function.name }} {% endfor %}{{ '\\n' }}{% endif %}"
    "{% if mood is defined %}{{ mood + '\\n' }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def text() -> Text:
    """The demo model's tokenizer, with a template for chats."""
    tokenizer = given_tokenizer(str(model_path()), False, True)
    tokenizer.chat_template = TEMPLATE
    return Text(tokenizer)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an application on a free port; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(HANGS)
        assert not thread.is_alive()


@pytest.fixture
def door(text: Text) -> Iterator[Callable[..., str]]:
    """Opens doors before a socket; returns their URLs."""
    opened: list[Any] = []

    def start(path: Path, **options: Any) -> str:
        words = options.pop("text", text)

        def served(max_context: int) -> Served:
            return Served(name="demo", text=words, max_context=max_context, default_tokens=24)

        context = listening(make_app(served, AsyncClient(path, wait=0.0, brief=True), **options))
        url = context.__enter__()
        opened.append(context)
        return url

    yield start
    for context in opened:
        context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def url(demo: Process, text: Text) -> Iterator[str]:
    """A door before the demo model."""

    def served(max_context: int) -> Served:
        return Served(name="demo", text=text, max_context=max_context, default_tokens=24)

    with listening(make_app(served, AsyncClient(demo.path, wait=0.0, brief=True))) as found:
        yield found


@pytest.fixture(scope="session")
def api(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=HANGS) as client:
        yield client
