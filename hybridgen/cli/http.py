"""`hybridgen http`: OpenAI's protocol for a server that runs."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

from hybridgen.cli.options import add_model, model_of
from hybridgen.cli.output import note, say_json
from hybridgen.serving.http.options import DEFAULT, HttpOptions


def add_command(commands: Any) -> None:
    """Add `http`."""
    parser = commands.add_parser("http", help="speak OpenAI's HTTP for a server (hybridgen serve)")
    parser.set_defaults(run=run)
    add_model(parser)
    parser.add_argument("--socket", metavar="PATH", help="where the server listens (default: as hybridgen serve)")
    parser.add_argument("--listen", default=DEFAULT, metavar="HOST:PORT", help=f"where to listen ({DEFAULT})")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what is to be said of the door, beside its address."""
    group = parser.add_argument_group("HTTP")
    group.add_argument("--api-key-file", type=Path, metavar="PATH", help="keys, one in each line; asked for if given")
    group.add_argument("--origin", action="append", metavar="URL", help="pages of it may call (CORS); again for more")
    group.add_argument("--no-page", dest="page", action="store_false", help="no page to chat and watch at /")
    group.add_argument("--name", metavar="NAME", help="what the model is called (default: its directory or hub id)")
    group.add_argument("--chat-template", type=Path, metavar="PATH", help="a template in place of the tokenizer's")
    group.add_argument("--default-tokens", type=int, metavar="N", help="at most for a chat that does not say (4096)")


def options_of(arguments: argparse.Namespace, listen: str) -> HttpOptions:
    """The options that were given.

    Raises:
        ConfigError: a value cannot be used.
    """
    names = ("api_key_file", "name", "chat_template", "default_tokens")
    values = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return HttpOptions(listen=listen, page=arguments.page, origins=tuple(arguments.origin or ()), **values)


def run(arguments: argparse.Namespace) -> int:
    """Listen until it is told to end; returns the exit status."""
    from hybridgen.demo import model_path
    from hybridgen.serving.http.run import check_extra, require_socket, run_http

    options, model = options_of(arguments, arguments.listen), model_of(arguments)
    check_extra()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if not arguments.child:
        require_socket(arguments.socket)

    def listens(url: str) -> None:
        if arguments.child:
            say_json({"url": url})

    def ready(url: str) -> None:
        if arguments.child:
            say_json({"ready": True})
        else:
            note(f"hybridgen: OpenAI's protocol at {url}/v1")

    if model is None:
        options = dataclasses.replace(options, name=options.name or "demo")
    return run_http(
        model or str(model_path()), options, arguments.socket, listens=listens, ready=ready, child=arguments.child
    )
