"""`hybridgen cache`: what the compile cache holds, why a start is cold, and how to fill it ahead."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridgen.cli.imports import import_engine
from hybridgen.cli.options import ENGINE, add_engine, add_model, given, model_of
from hybridgen.cli.output import say
from hybridgen.compilation.store import Store
from hybridgen.compilation.store.bundle import export_bundle, import_bundle
from hybridgen.compilation.store.store import EntryInfo
from hybridgen.config import EngineConfig, Mode, parse_bytes
from hybridgen.errors import CacheError, ConfigError

if TYPE_CHECKING:
    from hybridgen.compilation.store.key import Key
    from hybridgen.loading import Checkpoint


def add_command(commands: Any) -> None:
    """Add `cache`, with commands of its own."""
    cache = commands.add_parser("cache", help="look at, fill and move the compile cache")
    actions = cache.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = actions.add_parser(name, help=text)
        parser.set_defaults(run=run)
        parser.add_argument("--dir", metavar="PATH", help="the store (default: as EngineConfig.compile_cache)")
        return parser

    action("list", _list, "the entries, the last used first")
    for name, run, text in (
        ("explain", _explain, "whether a model would start warm, and which part of the key differs"),
        ("warm", _warm, "compile, capture and keep all that a model needs, and exit"),
    ):
        parser = action(name, run, text)
        add_model(parser)
        add_engine(parser, (*ENGINE, "token_budget"))
    parser.add_argument("--modes", metavar="LIST", help="modes to warm, such as hybrid,jit (default: --mode)")
    parser.add_argument("--buckets", metavar="LIST", help="decode batch sizes to record, such as 1,2,4,8")
    parser.add_argument("--prompt-lengths", metavar="LIST", help="prompt lengths to record, such as 64,512")
    parser = action("export", _export, "write entries to a file")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--entry", action="append", help="only this one (the beginning of its key); may be given again")
    parser = action("import", _import, "put the entries of a file into the store")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--trust", action="store_true", help="whoever made the file may run code as you: you trust them"
    )
    parser = action("prune", _prune, "delete the least recently used entries")
    parser.add_argument("--max-size", default=None, help='what may stay, such as "2GiB" (default: the size cap)')
    action("clear", _clear, "delete everything")


def _list(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    infos = store.entries()
    say(f"{store.root}: {len(infos)} entries, {sum(info.bytes for info in infos) / 2**20:,.1f} MiB")
    for info in infos:
        say(f"{info.digest[:12]}  {info.bytes / 2**20:8.1f} MiB  {_when(info.used)}  {_what(info)}")
    return 0


def _what(info: EntryInfo) -> str:
    if info.manifest is None:
        return f"not usable: {info.problem}"
    parts = info.manifest.key.parts
    name = str(parts.get("model class") or parts.get("model.model_type")).rpartition(".")[2]
    sizes = ", ".join(
        f"{label} {parts[part]}"
        for part, label in (("model.num_hidden_layers", "layers"), ("model.hidden_size", "hidden"))
        if parts.get(part) is not None
    )
    where = parts.get("GPU") or parts.get("processor")
    return (
        f"{name} ({sizes}), {parts.get('dtype')}, mode {parts.get('config.mode')}, {where}, torch {parts.get('torch')}"
    )


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _explain(arguments: argparse.Namespace) -> int:
    from hybridgen.compilation.store.session import explain, mode_of, why_off

    checkpoint, config, key = _opened(arguments)
    off = why_off(config, mode_of(checkpoint, config), checkpoint.device.type)
    if off is not None:
        say(f"off: {off}")
        return 1
    found = explain(checkpoint, config, key)
    say(f"{'hit' if found.hit else 'miss'}: {key.digest[:12]}: {found.reason}")
    for part, (here, there) in (found.differences or {}).items():
        say(f"  {part}\n    here:  {here}\n    there: {there}")
    return int(not found.hit)


def _opened(arguments: argparse.Namespace) -> tuple[Checkpoint, EngineConfig, Key]:
    from hybridgen.compilation.store.session import key_for
    from hybridgen.engine.preflight import resolve_config
    from hybridgen.loading import Checkpoint

    config = _config(arguments)
    checkpoint = Checkpoint.open(model_of(arguments), config)
    return checkpoint, config, key_for(checkpoint, config, resolve_config(checkpoint, config))


def _warm(arguments: argparse.Namespace) -> int:
    import_engine()
    from hybridgen.compilation.store.session import why_off
    from hybridgen.engine import Engine

    modes = arguments.modes.split(",") if arguments.modes else [arguments.mode or Mode.AUTO]
    for mode in modes:
        # Without recording while idle, a start records all buckets, not what earlier processes used.
        config = _config(arguments).replace(mode=mode, lazy_capture=False)
        with Engine.load(model_of(arguments), config) as engine:
            off = why_off(config, engine.mode, engine.checkpoint.device.type)
            if off is not None:
                raise CacheError(f"there is nothing to keep: {off}")
            engine.exercise_samplers()
            stats = engine.stats()
            problems = [note for note in stats.artifacts.notes if "cannot keep" in note or "cannot be written" in note]
            problems += [why for why in stats.fallbacks if "compilation failed" in why or "cannot be kept" in why]
            if not stats.graphs.graphs and not stats.compiled:
                problems += stats.graphs.failures.values()
            if stats.artifacts.state == "off" or problems:
                raise CacheError(f"the compile cache was not filled: {'; '.join(problems) or stats.artifacts.reason}")
            say(f"{stats.artifacts.key[:12]}: {stats.artifacts.state} ({stats.artifacts.reason}), mode {engine.mode}")
            for row in stats.startup_table:
                say(f"  {row.phase:<18} {row.seconds:8.2f} s  {row.hits} hits, {row.misses} misses")
    return 0


def _config(arguments: argparse.Namespace) -> EngineConfig:
    fields: dict[str, Any] = given(arguments, (*ENGINE, "token_budget"))
    fields["decode_buckets"] = _numbers("--buckets", getattr(arguments, "buckets", None))
    fields["prefill_buckets"] = _numbers("--prompt-lengths", getattr(arguments, "prompt_lengths", None))
    fields["compile_cache"] = arguments.dir
    return EngineConfig(**{name: value for name, value in fields.items() if value is not None})


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise ConfigError(f"{option} {text}: give numbers with commas between them, such as 1,2,4") from None


def _export(arguments: argparse.Namespace) -> int:
    digests = export_bundle(_store(arguments), arguments.file, arguments.entry)
    say(f"{len(digests)} entries in {arguments.file}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    imported, left = import_bundle(_store(arguments), arguments.file, trust=arguments.trust)
    for digest in imported:
        say(f"{digest[:12]} imported")
    for digest, why in left.items():
        say(f"{digest[:12]} left out: {why}")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    limit = parse_bytes("--max-size", arguments.max_size)
    for digest in _store(arguments).prune(limit):
        say(f"{digest[:12]} deleted")
    return 0


def _clear(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    say(f"{store.clear()} entries deleted from {store.root}")
    return 0


def _store(arguments: argparse.Namespace) -> Store:
    store, problems = Store.find(arguments.dir or True)
    if store is None:
        raise CacheError(f"there is no compile cache that can be used: {'; '.join(problems)}")
    return store
