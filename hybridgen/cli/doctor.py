"""`hybridgen doctor`: what this machine can do, and why not what it cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridgen._version import __version__
from hybridgen.cli import options
from hybridgen.cli.output import check_output_is_open, say, say_json
from hybridgen.errors import HybridgenError, described

if TYPE_CHECKING:
    from hybridgen.engine import Engine
    from hybridgen.telemetry.statistics import EngineStats

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "accelerate")


class Finding(NamedTuple):
    """One thing looked at."""

    name: str
    ok: bool
    detail: str


def add_command(commands: Any) -> None:
    """Add `doctor`."""
    parser = commands.add_parser("doctor", help="say what this machine can do, and why not")
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options.add_model(parser, default="no model; with one, also go through docs/production.md")
    options.add_engine(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; returns the exit status."""
    check_output_is_open()
    model = options.model_of(arguments)
    findings = examine()
    if model is not None:
        findings += examine_model(model, options.given(arguments, options.ENGINE))
    if arguments.json:
        say_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            say(f"{'ok' if finding.ok else 'no':<3} {finding.name:<13} {finding.detail}")
    return 0


def examine() -> list[Finding]:
    """Look at everything; takes a few seconds, because it compiles and runs one small function."""
    return [*_packages(), _cuda(), _compiler(), _compile_cache(), *_modes()]


def _packages() -> Iterator[Finding]:
    yield Finding("hybridgen", True, f"{__version__} in {Path(__file__).parents[1]}")
    yield Finding("python", True, f"{platform.python_version()} on {platform.machine()}")
    for name in PACKAGES:
        try:
            yield Finding(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            needed = "mode jit on CUDA and the CUDA kernels need it" if name == "triton" else f"pip install {name}"
            yield Finding(name, False, f"not installed; {needed}")


def _cuda() -> Finding:
    import torch

    if torch.version.cuda is None:
        return Finding("cuda", False, f"this build of torch ({torch.__version__}) has no CUDA; models run on the CPU")
    if not torch.cuda.is_available():
        return Finding("cuda", False, f"torch has CUDA {torch.version.cuda} but sees no device; check the driver")
    parts = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        parts.append(
            f"cuda:{index} {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    return Finding("cuda", True, f"CUDA {torch.version.cuda}; " + "; ".join(parts))


def _compiler() -> Finding:
    """The C++ compiler that Inductor's CPU kernels, and Triton's launchers, are built with."""
    from hybridgen.compilation.layers import COMPILERS

    names = [os.environ["CXX"]] if "CXX" in os.environ else COMPILERS
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None and "CXX" in os.environ:
        why = "is not found" if len(names[0].split()) == 1 else "is not one program, and Inductor runs it as one"
        return Finding("compiler", False, f'CXX="{names[0]}" {why}; set CXX to a compiler alone, or unset it for g++')
    if found is None:
        return Finding("compiler", False, f"no {' or '.join(names)}; install g++ or set CXX (mode jit needs it)")
    return Finding("compiler", True, found)


def _compile_cache() -> Finding:
    """Where what is compiled is kept for later processes, as an engine of this process would find it."""
    from hybridgen.compilation.store import Store
    from hybridgen.compilation.store.location import SWITCH

    if os.environ.get(SWITCH) == "0":
        return Finding("compile cache", False, f"off: {SWITCH}=0; nothing is kept for later processes")
    store, problems = Store.find(True)
    if store is None:
        return Finding("compile cache", False, "; ".join(problems))
    entries = store.entries()
    size = sum(entry.bytes for entry in entries) / 2**20
    unused = "".join(f"; not used: {problem}" for problem in problems)
    return Finding("compile cache", not problems, f"{store.root}, {len(entries)} entries, {size:,.1f} MiB{unused}")


def _modes() -> Iterator[Finding]:
    yield Finding("mode eager", True, "runs everywhere")
    cannot_compile = _try_compile()
    yield Finding("mode jit", cannot_compile is None, cannot_compile or "torch.compile made and ran a function")
    recorded, how = _try_capture()
    yield Finding("mode graph", recorded, how)
    yield Finding("mode hybrid", recorded and cannot_compile is None, cannot_compile or how)
    yield Finding("mode auto", True, _auto())


def _auto() -> str:
    """What mode auto runs here."""
    import torch

    from hybridgen.compilation.store.session import why_not_behind
    from hybridgen.config import EngineConfig, Mode

    if torch.cuda.is_available():
        return f"{Mode.AUTO.on('cuda')} on CUDA"
    why = why_not_behind(EngineConfig())
    if why is not None:
        return f"eager: {why}"
    return "hybrid: runs as eager at first; steps are compiled in another process, kept, and taken between calls"


def _try_capture() -> tuple[bool, str]:
    """Record and replay a small step the way the engine does; whether that worked, and what was used or went wrong."""
    import torch

    from hybridgen.graphs import Recorder, StandInRecorder
    from hybridgen.graphs.key import GraphKey

    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    total = torch.zeros(4, device=device)
    recorder: Recorder = StandInRecorder()

    def step() -> None:
        total.add_(1)

    try:
        if on_cuda:
            from hybridgen.graphs.cuda import CudaGraphRecorder

            recorder = CudaGraphRecorder(device)
        recorded = recorder.record(GraphKey.decode(1, None), step, None)
        before = total.tolist()
        recorded.replay()
        moved = total.tolist() == [value + 1 for value in before]
        recorded.release()
        recorder.close()
    except Exception as error:  # whatever the driver raises is the finding
        return False, f"the capture failed: {described(error)}"
    if not moved:
        return False, "a replay gave another result than the step; the driver or this build of torch is broken"
    return True, "a CUDA graph was captured and replayed" if on_cuda else "with a stand-in: a CPU has no graphs"


def _try_compile() -> str | None:
    """Compile and run a small function; what went wrong, or None."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed; Inductor needs it on CUDA"

    def double(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * 2

    x = torch.arange(16, dtype=torch.float32, device=device)
    try:
        compiled = torch.compile(double, fullgraph=True)(x)
    except Exception as error:  # whatever the tool chain raises is the finding
        return f"torch.compile failed: {described(error)}"
    if not torch.allclose(compiled, double(x)):
        return "torch.compile gave another result than eager; the tool chain is broken"
    return None


# What a model in production is looked at for; docs/production.md has the same ten points.

_PROMPTS = (10, 50, 100)
"""Tokens of the prompts that the checklist runs, each alone and all together."""
_NEW_TOKENS = 16
_LEAST_HIT_RATE = 0.9
"""Share of decode steps that graphs should run."""
_LARGEST_ERROR = {"float32": 1e-3}
_LARGEST_ERROR_HALF = 0.25
"""Largest difference of log-probabilities to mode eager's: half precision rounds otherwise in another kernel."""


@dataclass(frozen=True)
class Checked:
    """An engine that ran a few prompts, and what is known of it."""

    engine: Engine
    stats: EngineStats
    """After the prompts."""
    error: float | None
    """Largest difference of log-probabilities to mode eager's; None where no token could be compared."""
    share: float
    """Tokens that equal mode eager's."""
    events: Counter[str]
    """Of `on_graph_event`, by kind."""
    busy: str
    """How busy processor and device were in a call."""


class Point(NamedTuple):
    """One point of the checklist."""

    name: str
    call: str
    """What shows it on a running engine, as Python."""
    look: Callable[[Checked], tuple[bool, str]]
    """Whether it is well, and what was seen."""


def examine_model(model: str, fields: Mapping[str, Any]) -> list[Finding]:
    """Load a model, run a few prompts in it and in mode eager, and go through the checklist for production.

    Args:
        fields: of `EngineConfig`.
    """
    try:
        checked = _run_model(model, fields)
    except HybridgenError as error:
        return [Finding("model", False, f"{type(error).__name__}: {error}")]
    with checked.engine:
        found = [(point, *point.look(checked)) for point in CHECKLIST]
    return [Finding(point.name, ok, f"{seen} [{point.call}]") for point, ok, seen in found]


def _run_model(model: str, fields: Mapping[str, Any]) -> Checked:
    from hybridgen.comparison.data.checks import REPORTED, logit_error
    from hybridgen.comparison.data.statistics import agreement
    from hybridgen.engine import Engine

    greedy: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    with Engine.load(model, **{**fields, "mode": "eager"}) as engine:
        prompts = _prompts(engine)
        expected = engine.generate(prompts, logprobs=REPORTED, **greedy)
    events: Counter[str] = Counter()
    given = {**fields, "validate": True, "on_graph_event": lambda event: events.update([str(event.kind)])}
    engine = Engine.load(model, **given)
    try:
        for prompt in prompts:
            engine.generate(prompt, **greedy)
        engine.generate(prompts, **greedy)
        stats = engine.stats()
        found = engine.generate(prompts, logprobs=REPORTED, **greedy)
        tokens, reference = ([list(out.token_ids) for out in outs] for outs in (found, expected))
        error, share = logit_error(found, expected), agreement(tokens, reference).share
        busy = _busy(engine, lambda: engine.generate(prompts[0], **greedy))
    except BaseException:
        engine.close()
        raise
    return Checked(engine, stats, error, share, events, busy)


def _prompts(engine: Engine) -> list[list[int]]:
    """Prompts of ids that any vocabulary has, as long as the context allows."""
    room = min(engine.max_context, engine.cache_tokens // len(_PROMPTS)) - _NEW_TOKENS
    vocabulary = engine.checkpoint.vocab_size
    return [[(7 * i + length) % vocabulary for i in range(max(1, min(length, room)))] for length in _PROMPTS]


def _busy(engine: Engine, call: Callable[[], object]) -> str:
    from hybridgen.comparison.measuring.utilisation import cpu_of, cuda_probe, device_shares

    device = engine.checkpoint.device
    probe = cuda_probe(device)
    if device.type != "cuda":
        return f"CPU {cpu_of(call, 3, lambda: None) or 0:.0%} (100 % is one busy core) in a call"
    cpu = cpu_of(call, 3, probe.wait)
    found: dict[str, float] = {}
    device_shares({"call": call}, probe, found)
    shown = f"{found['call']:.0%}" if found else "unknown"
    return f"CPU {cpu or 0:.0%} (100 % is one busy core), GPU {shown} in a call"


def _capture_sizes(checked: Checked) -> tuple[bool, str]:
    stats = checked.stats
    if not stats.graphs.graphs:
        return not stats.graphs.failures, f"mode {stats.mode} holds no graphs"
    sizes = {
        phase: sorted({row.tokens for row in stats.graphs.graphs if row.phase == phase})
        for phase in ("decode", "prefill")
    }
    shown = [f"{phase} {', '.join(map(str, found)) or 'none'}" for phase, found in sizes.items()]
    return not stats.graphs.failures, "; ".join(shown)


def _pool(checked: Checked) -> tuple[bool, str]:
    graphs, limit = checked.stats.graphs, checked.engine.config.max_graph_memory
    bound = "no max_graph_memory" if limit is None else f"max_graph_memory={limit}"
    return not graphs.evictions, f"{graphs.bytes / 2**20:,.1f} MiB for all graphs, {bound}, {graphs.evictions} evicted"


def _fallback(checked: Checked) -> tuple[bool, str]:
    stats = checked.stats
    missed = [f"{count} steps without a graph: {reason}" for reason, count in stats.graphs.misses.items()]
    other = [f"{count} times: {reason}" for reason, count in stats.fallbacks.items()]
    return not other, "; ".join([*missed, *other]) or "nothing ran another way than asked for"


def _hit_rate(checked: Checked) -> tuple[bool, str]:
    phases = checked.stats.graphs.phases
    if not phases:
        return True, f"mode {checked.stats.mode} records no steps"
    decode = phases["decode"].hit_rate if "decode" in phases else None
    shown = [f"{phase} {counts.hit_rate:.1%}" for phase, counts in phases.items() if counts.hit_rate is not None]
    return decode is not None and decode >= _LEAST_HIT_RATE, ", ".join(shown)


def _alerts(checked: Checked) -> tuple[bool, str]:
    failures = checked.stats.graphs.capture_failures
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(checked.events.items())) or "nothing"
    return not failures, f"{failures} captures failed; on_graph_event told of {told}; hybridgen serve --metrics PORT"


def _validation(checked: Checked) -> tuple[bool, str]:
    graphs = checked.stats.graphs
    wrong = [what for what, why in graphs.failures.items() if "gave other values" in why]
    replayed = sum(row.hits > 0 for row in graphs.graphs)
    return not wrong, f"{replayed} graphs compared at their first replay, {len(wrong)} wrong"


def _numerics(checked: Checked) -> tuple[bool, str]:
    largest = _LARGEST_ERROR.get(checked.stats.dtype, _LARGEST_ERROR_HALF)
    ok = checked.error is not None and checked.error <= largest
    error = (
        "no tokens compared" if checked.error is None else f"log-probabilities differ by at most {checked.error:.2g}"
    )
    return ok, f"{checked.share:.1%} of tokens equal mode eager's, {error} (limit {largest:g})"


def _profiling(checked: Checked) -> tuple[bool, str]:
    return True, f"decode: {checked.stats.decode.summary()}; {checked.busy}"


def _warm_up(checked: Checked) -> tuple[bool, str]:
    stats = checked.stats
    parts = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in stats.startup.items() if seconds >= 0.05)
    later = f"{stats.late_compiles} functions compiled and {stats.graphs.lazy_captures} graphs captured after it"
    return not stats.late_compiles, f"{parts or 'at once'}; {later}"


def _memory(checked: Checked) -> tuple[bool, str]:
    from hybridgen.device.memory import taken  # needs torch

    stats = checked.stats
    used = taken(checked.engine.checkpoint.device)
    whole = "" if used is None else f"; {used / 2**30:,.2f} GiB taken in all"
    pages = f"{stats.free_pages} of {stats.pages} pages free after the calls"
    return stats.free_pages == stats.pages, f"KV cache {stats.cache_bytes / 2**20:,.0f} MiB, {pages}{whole}"


CHECKLIST = (
    Point("capture sizes", "engine.stats().graphs.graphs", _capture_sizes),
    Point("pool", "engine.stats().graphs.bytes", _pool),
    Point("fallback", "engine.stats().fallbacks", _fallback),
    Point("hit rate", "engine.stats().graphs.hit_rate", _hit_rate),
    Point("alerts", "engine.stats().graphs.capture_failures", _alerts),
    Point("validation", "engine.stats().graphs.failures", _validation),
    Point("numerics", "engine.generate(prompts, temperature=0, logprobs=5)", _numerics),
    Point("profiling", "engine.stats().decode", _profiling),
    Point("warm-up", "engine.stats().startup", _warm_up),
    Point("memory", "engine.stats().cache_bytes", _memory),
)
"""The ten points, in the order of docs/production.md."""
