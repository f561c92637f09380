"""An engine's start: how long its phases took, and what it reuses from the compile cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hybridgen.compilation.aot import LayerUnits
from hybridgen.compilation.steps import CompiledSteps
from hybridgen.compilation.store import Entry
from hybridgen.compilation.store.files import write_whole
from hybridgen.compilation.store.session import CompileCache
from hybridgen.config import EngineConfig, GraphOwner
from hybridgen.device.failures import is_fatal
from hybridgen.errors import CacheMissError, UnsupportedModelError, described
from hybridgen.execution import ModelRunner
from hybridgen.execution.fused_executors import compare_rows, compare_with_layers, make_fused, tune_fused
from hybridgen.execution.warm_up import check_numerics, compile_layers, cut_last_layer, last_layer_stays_whole
from hybridgen.fused.decode import FusedDecode
from hybridgen.graphs import capture_plan
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.recorder import Recorder
from hybridgen.kernels.read_ceiling import read_ceiling
from hybridgen.models import BoundModel
from hybridgen.models.decoder import Unfit
from hybridgen.models.measured import Measured
from hybridgen.models.share import Share
from hybridgen.speculation.eagle import EagleDrafter
from hybridgen.telemetry.statistics import ArtifactStats, Counters

logger = logging.getLogger(__name__)

_CEILING = "read-ceiling"
_TUNING = "tuning"
_MEASURED = "measured"
PHASES = (
    "import",
    "open model",
    "load weights",
    "artifacts",
    "fuse projections",
    "allocate cache",
    "compile",
    "tuning",
    "capture",
    "first token",
)


class Startup:
    """Seconds by phase."""

    def __init__(self, importing: float, weights: float, *, opening: float = 0.0) -> None:
        self._seconds = {"import": importing, "open model": opening, "load weights": weights}

    def add(self, phase: str, seconds: float) -> None:
        """Add to a phase."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add what runs inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)

    def seconds(self, first_token: float | None) -> dict[str, float]:
        """Seconds of each phase that there was, in the order of `PHASES`; phases of other names come last."""
        found = dict(self._seconds)
        if first_token is not None:
            found["first token"] = first_token
        names = [phase for phase in PHASES if phase in found]
        return {name: found[name] for name in [*names, *(name for name in found if name not in PHASES)]}


class Starter:
    """Reads from an entry of the compile cache what a start can reuse, and adds what the start made."""

    def __init__(self, cache: CompileCache, startup: Startup, counters: Counters) -> None:
        self._cache = cache
        self._startup = startup
        self._counters = counters
        self._units: LayerUnits | None = None
        self._steps: CompiledSteps | None = None
        self._planned = (0, 0)
        self.fused: dict[str, str] = {}
        """What serves which decode sizes in place of the model's own layers, or why nothing does."""
        self.drafting: str | None = None
        """What runs the passes of a head that drafts; None: PyTorch's operators, and nothing else was tried."""
        self.chosen: dict[str, str] = {}
        """What trials at the start left as it was because that is as fast, with both times."""
        for note in cache.notes:
            counters.fall_back(f"compile cache: {note}")

    def note_choice(self, part: str, slower: Sequence[str]) -> None:
        """Keep what a trial measured of a part of the model that stays as it was. Nobody asked for another way: it is
        no fallback, and is shown among what is fused."""
        if slower:
            self.chosen[part] = f"as the model does it: {'; '.join(slower)}"

    def measured(self) -> Measured:
        """What trials of earlier starts of the entry chose by time."""
        return Measured(self._cache.read_document(_MEASURED))

    def keep_measured(self, measured: Measured) -> None:
        """Have the entry's next start choose the same."""
        if measured.is_new:
            self._cache.keep_document(_MEASURED, dict(measured.known))

    def load_units(self) -> LayerUnits | None:
        """The entry's compiled layer functions; None where nothing is kept."""
        entry = self._cache.entry
        if not isinstance(entry, Entry):
            return None
        self._units = LayerUnits(entry.aot)
        problem = self._units.load()
        if problem is not None:
            self._counters.fall_back(f"compile cache: {problem}")
            self._cache.distrust(problem)
        return self._units

    def find_steps(self, offline: bool) -> CompiledSteps:
        """The entry's compiled steps; where nothing is kept, none and a place for none."""
        entry = self._cache.entry
        directory = entry.aot if isinstance(entry, Entry) else None
        self._steps = CompiledSteps(directory, offline=offline, fall_back=self._counters.fall_back)
        return self._steps

    def check_steps(self) -> None:
        """What follows the start's captures of compiled steps.

        Raises:
            CacheMissError: `offline_compile=True`, and one of them is not there, or none is.
        """
        steps = self._steps
        if steps is None or not steps.offline:
            return
        if steps.missing or steps.empty:
            lacks = f"{steps.missing} compiled steps that this start needs" if steps.missing else "any compiled step"
            raise CacheMissError(
                f"offline_compile=True, and the compile cache does not hold {lacks}; run hybridgen cache warm with the "
                "same config, or allow compiling"
            )

    def compile(self, runner: ModelRunner, *, cuts: bool = False) -> None:
        """Make the compiled layers ready. Those from the entry are compared with uncompiled ones; the others are
        compiled and added to the entry.

        Args:
            cuts: whether the last layer of long prefills is cut, if that is right.

        Raises:
            CacheMissError: `offline_compile=True`, and something is missing or wrong.
        """
        compile_layers(runner)
        units, compiled = self._units, runner.compiled
        if units is not None and compiled is not None and units.loaded:
            wrong = check_numerics(runner)
            if wrong is not None:
                self._counters.fall_back(f"compile cache: {wrong}")
                units.forget()
                self._cache.distrust(wrong)
                compile_layers(runner)
        if cuts and last_layer_stays_whole(runner) is None:
            wrong = cut_last_layer(runner)
            if wrong is not None:
                self._counters.fall_back(f"prefills run their last layer for all tokens: {wrong}")
        if compiled is None or compiled.units is None or compiled.compiles == 0:
            return
        units = compiled.units
        problem = units.save()
        if problem is not None:
            self._counters.fall_back(problem)

    def read_ceiling(self, device: torch.device) -> float | None:
        """Bytes per second at which the device's memory can be read (`kernels.read_ceiling`); None on a CPU. Where
        there is a store, they are measured once per device and driver."""
        if device.type != "cuda":
            return None
        store = self._cache.store
        known = None if store is None else store.documents.read(_CEILING)
        if known is not None and isinstance(known.get("bytes_per_second"), (int, float)):
            return float(known["bytes_per_second"])
        measured = None
        with self._startup.timed("tuning"), self._cache.unless_refused():
            measured = read_ceiling(device)
        if measured is not None and store is not None:
            store.documents.write(_CEILING, {"bytes_per_second": measured})
        return measured

    def fuse_decode(
        self,
        runner: ModelRunner,
        bound: BoundModel,
        config: EngineConfig,
        max_context: int,
        begin: Callable[[int, bool], Share] | None = None,
    ) -> None:
        """Make the fused decode kernels, with the choices of an earlier start or of the tuner.

        Args:
            begin: has the other ranks do the same, where the model is a rank's share, for which nothing is tuned.

        Raises:
            CacheMissError: `offline_compile=True`, and a kernel is not kept.
            UnsupportedModelError: `equal_bits=True`, and the kernel for that does not serve the model or the device.
        """
        if not config.fused_decode:
            self.fused = {"fused decode": "none: fused_decode=False"}
            return
        if config.graphs is GraphOwner.TREES:
            self.fused = {"fused decode": 'none: graphs="trees" records the compiled layers'}
            return
        tuned = (self._cache.read_document(_TUNING) or {}) if begin is None else {}

        def kept(key: str, make: Callable[[], bytes]) -> bytes:
            if config.offline_compile and not (self._cache.entry.kernels / f"{key}.cubin").exists():
                raise CacheMissError(
                    "offline_compile=True, and the compile cache does not hold the fused decode kernel; run "
                    "hybridgen cache warm again, or set fused_decode=False"
                )
            return self._kept_kernel(key, make)

        with self._startup.timed("compile"):
            share = None if begin is None else begin(max_context, config.equal_bits)
            equal_bits = config.equal_bits
            fused = make_fused(runner, max_context, equal_bits=equal_bits, tuned=tuned, kept=kept, share=share)
        for failure in fused.failures:
            self._counters.fall_back(failure)
        self.fused = fused.notes
        if config.equal_bits:
            _check_equal_bits(fused)
        elif begin is None and config.tune_seconds and not tuned.get("tuned") and not config.offline_compile:
            with self._startup.timed("tuning"):
                try:
                    chosen = tune_fused(runner, config.tune_seconds)
                except Exception as error:
                    if is_fatal(error):
                        raise
                    self._counters.fall_back(f"the tuner's choice of fused kernels is not used: {described(error)}")
                    self.fused = make_fused(runner, max_context, kept=kept).notes
                else:
                    self._cache.keep_document(_TUNING, {**chosen, "tuned": True})

    def fuse_drafter(self, runner: ModelRunner, drafter: object, config: EngineConfig, max_context: int) -> None:
        """Run the passes of a head that drafts as a chain of kernels, where they compute it. A model that drafts runs
        its own layers."""
        if not isinstance(drafter, EagleDrafter) or not config.fused_decode:
            return
        rows, most = runner.state.max_batch, runner.state.query_len - 1
        with self._startup.timed("compile"):
            try:
                # Imported here: Triton is not there everywhere.
                from hybridgen.speculation.head_chain import fuse_head

                fuse_head(drafter, max_context, rows=rows, most=most)
            except Exception as error:
                if is_fatal(error):
                    raise
                self.drafting = f"PyTorch's operators: {error if isinstance(error, Unfit) else described(error)}"
                if not isinstance(error, Unfit):
                    logger.debug("a head's kernels failed", exc_info=True)
                    self._counters.fall_back(f"the drafter {drafter.name} runs by {self.drafting}")
            else:
                self.drafting = "a chain of Triton kernels"

    def choose_decode(
        self,
        runner: ModelRunner,
        sizes: Sequence[int],
        *,
        compiled: bool,
        recorder: Callable[[], Recorder | None] = lambda: None,
    ) -> None:
        """Decode with fused kernels for several rows where they are faster than what else would serve, measured once:
        the persistent one against the chain, the chain against the compiled layers.

        Args:
            sizes: batch sizes to measure at.
            compiled: whether the layers are compiled; else the kernels are used as they are.
            recorder: makes who records what is measured, where that is not this process alone.
        """
        if compiled and runner.fused is not None and runner.fused.rows is not None:
            self._choose_rows(runner, runner.fused, list(sizes), recorder)
        fused = runner.fused
        if fused is None or fused.chain is None or not compiled:
            return
        chain = fused.chain
        sizes = [size for size in sizes if chain.least <= size <= chain.most]
        if not sizes:
            return
        tuned = self._chosen(fused)
        most, why = tuned.get("chain_rows"), tuned.get("chain_why")
        if isinstance(most, int) and isinstance(why, str) and tuned.get("chain_sizes") == sizes:
            fused.use_chain_up_to(min(most, chain.most), why)
        else:
            with self._startup.timed("tuning"):
                try:
                    why = compare_with_layers(runner, sizes, recorder())
                except Exception as error:
                    if is_fatal(error):
                        raise
                    self._counters.fall_back(f"fused and compiled decode were not compared: {described(error)}")
                else:
                    chosen = {"chain_rows": chain.most, "chain_why": why, "chain_sizes": sizes}
                    self._keep_chosen(fused, {**tuned, **chosen})
        self.fused = fused.notes

    def _chosen(self, fused: FusedDecode) -> dict[str, Any]:
        """What an earlier start chose; nothing for a rank's share, which is another model than the entry's."""
        return (self._cache.read_document(_TUNING) or {}) if fused.share is None else {}

    def _keep_chosen(self, fused: FusedDecode, chosen: dict[str, Any]) -> None:
        if fused.share is None:
            self._cache.keep_document(_TUNING, chosen)

    def _choose_rows(
        self,
        runner: ModelRunner,
        fused: FusedDecode,
        sizes: list[int],
        recorder: Callable[[], Recorder | None],
    ) -> None:
        rows = fused.rows
        if rows is None:
            return
        tuned = self._chosen(fused)
        kept = tuned.get("rows")
        if isinstance(kept, dict) and kept.get("sizes") == sizes and kept.get("most", 0) <= rows.widest:
            if (kept["least"], kept["most"]) != (rows.least, rows.most):
                fused.use_rows(kept["least"], kept["most"], kept["why"])
        else:
            with self._startup.timed("tuning"):
                try:
                    why = compare_rows(runner, sizes, recorder())
                except Exception as error:
                    if is_fatal(error):
                        raise
                    self._counters.fall_back(f"fused and compiled decode were not compared: {described(error)}")
                else:
                    chosen = {"least": rows.least, "most": rows.most, "why": why, "sizes": sizes}
                    self._keep_chosen(fused, {**tuned, "rows": chosen})
        self.fused = fused.notes

    def _kept_kernel(self, key: str, make: Callable[[], bytes]) -> bytes:
        """A kernel's machine code: the entry's, or made now and added to the entry."""
        path = self._cache.entry.kernels / f"{key}.cubin"
        try:
            return path.read_bytes()
        except FileNotFoundError:
            code = make()
        try:
            write_whole(path, code)
        except OSError as error:
            self._counters.fall_back(f"compile cache: the fused kernel is not kept: {error.strerror or error}")
        return code

    def planned(self, runner: ModelRunner, keys: Sequence[GraphKey], *, only_kept: bool = False) -> list[GraphKey]:
        """Which graphs to record before the first request. On a cold start all of these; on a warm one the buckets
        that the user named, and of the others those that earlier processes used.

        Args:
            only_kept: on a cold start only the buckets that the user named, because each is compiled.
        """
        served = runner.router.served
        keys = list(map(served, keys))
        # What another executor serves now than then is not known.
        plan = capture_plan.read(self._cache.read_document(capture_plan.DOCUMENT))
        plan = [graph for graph in plan if served(graph.key) == graph.key]
        runner.graphs.know({graph.key: graph.times for graph in plan if graph.times is not None})
        # Without recording while idle, what is left out now would never be recorded.
        settings = runner.graphs.settings
        if not settings.lazy:
            chosen = list(keys)
        elif only_kept and not plan:
            chosen = [key for key in keys if key.phase in settings.named]
        else:
            chosen = capture_plan.first(keys, plan, named=settings.named)
        chosen = chosen[: settings.max_graphs]
        known = {graph.key for graph in plan}
        hits = sum(key in known for key in chosen)
        self._planned = hits, len(chosen) - hits
        return chosen

    def keep_plan(self, runner: ModelRunner) -> None:
        """Add the recorded graphs, and how often they were used, to the entry's list. The list is read again first,
        because other processes add theirs. Does nothing where nothing was recorded."""

        def plan(there: dict[str, Any] | None) -> dict[str, Any]:
            document = self._cache.read_document(capture_plan.DOCUMENT) if there is None else there
            return capture_plan.write(runner.graphs, capture_plan.read(document))

        self._cache.publish({capture_plan.DOCUMENT: plan} if runner.graphs.recordings else None)

    def stats(self, runner: ModelRunner | None) -> ArtifactStats:
        """What came from the cache so far."""
        cache, entry = self._cache, self._cache.entry
        hits: dict[str, int] = {}
        misses: dict[str, int] = {}
        if cache.store is None or not isinstance(entry, Entry):
            return ArtifactStats(state=cache.state, reason=entry.reason, notes=tuple(cache.notes))
        documents = [found for name, found in entry.reads.items() if name != capture_plan.DOCUMENT]
        compiled = runner.compiled.compiles if runner is not None and runner.compiled is not None else 0
        loaded = self._units.loaded if self._units is not None else 0
        if self._steps is not None:
            loaded, compiled = self._steps.loaded, self._steps.compiled
        for phase, found, missed in (
            ("artifacts", int(entry.hit), int(not entry.hit)),
            ("tuning", sum(documents), len(documents) - sum(documents)),
            ("compile", loaded, compiled),
            ("capture", *self._planned),
        ):
            hits[phase], misses[phase] = found, missed
        return ArtifactStats(
            state=cache.state,
            reason=entry.reason,
            key=entry.key.digest,
            path=str(cache.store.root),
            hits=hits,
            misses=misses,
            notes=tuple(cache.notes),
        )


def _check_equal_bits(fused: FusedDecode) -> None:
    if fused.rows is None:
        raise UnsupportedModelError(
            "equal_bits=True needs the persistent kernel for several columns, which does not serve this model here: "
            f"{'; '.join(fused.notes.values())}; leave equal_bits out"
        )
