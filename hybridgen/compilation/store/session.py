"""The compile cache of one engine, from before its weights are read until it is closed."""

from __future__ import annotations

import contextvars
import importlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from hybridgen.compilation.layers import missing_compiler, switched_off
from hybridgen.compilation.steps import compiles_behind, compiles_whole, import_loader
from hybridgen.compilation.store import environment, refusal
from hybridgen.compilation.store.entry import Entry, MemoryEntry
from hybridgen.compilation.store.key import Key
from hybridgen.compilation.store.key_parts import device_name, key_of
from hybridgen.compilation.store.location import SWITCH
from hybridgen.compilation.store.store import Explanation, Store, Update
from hybridgen.config import EngineConfig, GraphOwner, Mode, ResolvedConfig
from hybridgen.errors import CacheMissError
from hybridgen.loading import Checkpoint

logger = logging.getLogger(__name__)


class CompileCache:
    """An engine's entry, and what became of it. Where nothing is kept, the entry lives in memory."""

    def __init__(self, entry: Entry | MemoryEntry, store: Store | None, config: EngineConfig) -> None:
        """Use `open()`."""
        self.entry = entry
        self.store = store
        self.notes: list[str] = []
        """What is not as it could be, in words."""
        self.seconds = 0.0
        """What opening the entry took, waiting for other processes included."""
        self._config = config
        self._build = ExitStack()
        self._use = ExitStack()
        self._refused: list[str] = []

    @classmethod
    def open(cls, checkpoint: Checkpoint, config: EngineConfig, resolved: ResolvedConfig) -> CompileCache:
        """Find the entry for what an engine needs, and direct compilers to it. Trouble with the store is a miss.

        Raises:
            CacheMissError: `offline_compile=True` and there is none that can be used.
        """
        cache = cls._find(checkpoint, config, resolved)
        if checkpoint.device.type == "cuda":
            cache.refuse_kernels()
        return cache

    @classmethod
    def _find(cls, checkpoint: Checkpoint, config: EngineConfig, resolved: ResolvedConfig) -> CompileCache:
        start, mode = time.perf_counter(), resolved.mode
        off = why_off(config, mode, checkpoint.device.type)
        if off is not None:
            _refuse_if_offline(config, mode, off)
            return cls(MemoryEntry(off), None, config)
        key = key_for(checkpoint, config, resolved)
        store, problems = Store.find(config.compile_cache, device=device_name(checkpoint.device))
        if store is None:
            _refuse_if_offline(config, mode, "; ".join(problems))
            cache = cls(MemoryEntry("; ".join(problems)), None, config)
            cache.notes += problems
            return cache
        # No waiting for another process that compiles the same, if nothing is compiled before the first request.
        waits = not config.offline_compile and not compiles_behind(config, mode, checkpoint.device.type)
        cache = cls._open(store, key, config, waits=waits)
        cache.notes += problems
        if not cache.entry.hit:
            try:
                _refuse_if_offline(config, mode, cache.entry.reason)
            except CacheMissError:
                cache.close()
                raise
        cache.seconds = time.perf_counter() - start
        return cache

    @classmethod
    def _open(cls, store: Store, key: Key, config: EngineConfig, *, waits: bool) -> CompileCache:
        build = ExitStack()
        try:
            entry = build.enter_context(store.open(key, wait=waits))
        except OSError as error:  # a full disk, mostly
            cache = cls(MemoryEntry(f"no working copy can be written ({error.strerror})"), None, config)
            cache.notes.append(cache.entry.reason)
            return cache
        cache = cls(entry, store, config)
        cache._build = build
        cache.notes += environment.direct_to(entry)
        logger.info("compile cache %s: %s (%s)", key.digest[:12], "hit" if entry.hit else "miss", entry.reason)
        return cache

    def refuse_kernels(self) -> None:
        """Until `close()`: with `offline_compile=True` and an entry, Triton compiles no kernel of ours."""
        if self._config.offline_compile and self.entry.hit:
            self._refused = self._use.enter_context(refusal.refusing())
        else:
            self._use.enter_context(refusal.allowing())

    @contextmanager
    def unless_refused(self) -> Iterator[None]:
        """For work that an engine can do without: a kernel that is refused inside ends that work, and not the start."""
        before = len(self._refused)
        try:
            yield
        except CacheMissError as error:
            self.notes.append(str(error))
        finally:
            del self._refused[before:]

    @property
    def hit(self) -> bool:
        """Whether the store had the entry."""
        return self.entry.hit

    @property
    def state(self) -> str:
        """`hit`, `miss`, or `off` where nothing is kept."""
        if self.store is None:
            return "off"
        return "hit" if self.entry.hit else "miss"

    def read_document(self, name: str) -> dict[str, Any] | None:
        """A document of the entry; None where there is none."""
        return self.entry.read_document(name)

    def keep_document(self, name: str, document: dict[str, Any]) -> None:
        """Write a document to the entry. Where that fails, the reason is noted and nothing else happens."""
        try:
            self.entry.write_document(name, document)
        except OSError as error:
            self._note(f"the compile cache cannot keep {name}: {error.strerror or error}")

    def distrust(self, reason: str) -> None:
        """What the entry holds is wrong: move it aside, and go on with an empty one.

        Raises:
            CacheMissError: `offline_compile=True`.
        """
        entry = self.entry
        if isinstance(entry, MemoryEntry) or self.store is None:
            return
        self.store.move_aside(entry.key.digest, reason, only=entry.origin)
        # Triton's files and the fused kernels were made by other compilers, are loaded by now, and would not be made
        # again.
        for directory in (entry.inductor, entry.aot, entry.directory / "documents"):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(mode=0o700)
        entry.hit, entry.reason = False, f"the entry was moved aside: {reason}"
        environment.direct_to(entry)
        if self._config.offline_compile:
            raise CacheMissError(f"offline_compile=True, and {entry.reason}; run hybridgen cache warm again")

    def publish(self, updates: Mapping[str, Update] | None = None) -> None:
        """Put what was added into the store. Where that fails, the reason is noted and nothing else happens.

        Args:
            updates: see `Store.publish`.
        """
        if isinstance(self.entry, MemoryEntry) or self.store is None:
            return
        try:
            self.store.publish(self.entry, updates)
        except OSError as error:
            self._note(f"the compile cache cannot keep what was made: {error.strerror or error}")

    def _note(self, reason: str) -> None:
        if reason not in self.notes:
            self.notes.append(reason)
            logger.warning("%s", reason)

    def end_start(self) -> None:
        """Start-up is over: publish, and let processes go on that wait for the entry.

        Raises:
            CacheMissError: a kernel was refused during the start, and the code that asked for it went on without it.
        """
        if self._refused:
            raise CacheMissError(
                "offline_compile=True, and the compile cache does not hold the Triton kernels "
                f"{', '.join(sorted(set(self._refused)))} as this engine calls them; run hybridgen cache warm again "
                "with its settings, or allow compiling"
            )
        try:
            self.publish()
        finally:
            self._build.close()

    def close(self) -> None:
        """The engine is closed, or did not start: nothing of its working copy stays. Closing twice is fine."""
        self._build.close()
        self._use.close()
        if isinstance(self.entry, Entry):
            environment.restore(self.entry)
        self.entry.close()


def mode_of(checkpoint: Checkpoint, config: EngineConfig) -> Mode:
    """The mode that an engine of this checkpoint and config runs: what `auto` stands for, else the one that is given.

    On a CPU `auto` is `hybrid` where steps can be compiled behind and kept: it starts and runs as `eager` does until a
    step is there, and takes it between calls.
    """
    mode = config.mode_on(checkpoint.device.type)
    if config.mode is Mode.AUTO and checkpoint.device.type == "cpu" and why_not_behind(config, checkpoint) is None:
        return Mode.HYBRID
    return mode


def why_not_behind(config: EngineConfig, checkpoint: Checkpoint | None = None) -> str | None:
    """Why `auto` on a CPU stays `eager`, in words; None where it compiles steps behind."""
    if config.tensor_parallel > 1:
        return "tensor_parallel"
    if config.offline_compile:
        return "offline_compile=True"
    if config.graphs is not GraphOwner.MANUAL:
        return f'graphs="{config.graphs}"'
    off = why_off(config, Mode.HYBRID, "cpu")
    if off is not None:
        return off
    if not compiles_whole(config, Mode.HYBRID, "cpu"):
        return switched_off() or "steps with drafts are not compiled whole"
    if checkpoint is not None and checkpoint.module is not None:
        return "the model is a live module, whose weights its owner changes"
    if checkpoint is not None and checkpoint.formats != "dense":
        return "eager computes quantised weights in another way"
    return missing_compiler()


def why_off(config: EngineConfig, mode: Mode, device_type: str) -> str | None:
    """Why nothing is kept, or None."""
    if config.compile_cache is False:
        return "compile_cache=False"
    if config.compile_cache is True and os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if mode.compiles and config.compile_backend != "inductor":
        return f"what the backend {config.compile_backend} makes is not kept"
    if not mode.compiles and device_type != "cuda":
        return f"mode {mode} on a CPU compiles nothing"
    return None


def key_for(checkpoint: Checkpoint, config: EngineConfig, resolved: ResolvedConfig) -> Key:
    """The key of an engine's entry."""
    return key_of(
        checkpoint.hf_config,
        checkpoint.model_class(),
        device=checkpoint.device,
        dtype=checkpoint.dtype,
        config=config,
        weights=checkpoint.formats,
        fuse_projections=config.fuse_projections and checkpoint.joins,
        **resolved._asdict(),
    )


def explain(checkpoint: Checkpoint, config: EngineConfig, key: Key) -> Explanation:
    """Whether an engine would find its entry; its files are checked as a start would, and nothing is moved."""
    store, problems = Store.find(config.compile_cache, device=device_name(checkpoint.device))
    if store is None:
        return Explanation(key, False, "; ".join(problems))
    return store.check(key)


def _refuse_if_offline(config: EngineConfig, mode: Mode, reason: str) -> None:
    if config.offline_compile and mode.compiles:
        raise CacheMissError(
            f"offline_compile=True, and the compile cache has no usable entry: {reason}; fill it with hybridgen cache "
            "warm (same model, config and machine), or allow compiling"
        )


def preload(cache: CompileCache, config: EngineConfig, mode: Mode, device_type: str) -> Callable[[], None]:
    """Import what loading compiled code needs, on a thread, while weights are read. Returns a function that waits until
    that is done; the time it waits is added to the cache's seconds.

    Nothing is imported with cudagraph trees: up to torch 2.11 they work only on the thread that imported them. Nor for
    whole compiled steps that are not in the cache, or that mode `auto` loads between calls: no start waits for those.
    """
    if not mode.compiles or config.compile_backend != "inductor" or config.graphs is not GraphOwner.MANUAL:
        return lambda: None
    whole = compiles_whole(config, mode, device_type)
    if whole and (not cache.hit or config.mode is Mode.AUTO):
        return lambda: None
    # With this thread's context: torch keeps some settings in it.
    work = partial(contextvars.copy_context().run, _import_compiler, import_loader if whole else _import_code_cache)
    thread = threading.Thread(target=work, name="hybridgen-preload", daemon=True)
    thread.start()

    def wait() -> None:
        start = time.perf_counter()
        thread.join()
        cache.seconds += time.perf_counter() - start

    return wait


def _import_code_cache() -> None:
    importlib.import_module("torch._inductor.codecache").torch_key()


def _import_compiler(load: Callable[[], object]) -> None:
    try:
        load()
    except Exception as error:  # it will be raised again where it is needed
        logger.debug("compiler modules could not be imported ahead: %s", error)
