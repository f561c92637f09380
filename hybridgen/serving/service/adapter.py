"""The only place of the server that touches the engine: plain calls, all from the thread that owns the GPU."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from hybridgen.core import TokenEvent
from hybridgen.params import SamplingParams

logger = logging.getLogger(__name__)

PHASES = ("prefill", "decode")
"""Phases of steps. All have their counts from the start, so that a rate over them is known."""
Handle: TypeAlias = Any
"""One running completion, as the model keeps it; a key of dictionaries."""


class Model(Protocol):
    """What the generator thread runs; tests put others in its place."""

    description: dict[str, Any]
    """What the hello tells of it."""

    def encode(self, prompt: Any, index: int) -> Any:
        """What `submit` takes for a prompt of text or a chat. From other threads than the rest, while steps run.

        Args:
            index: the prompt's place in its request, for errors.
        """

    def read_grammar(self, params: SamplingParams) -> None:
        """Make ready what a request's grammar needs, so that `submit` takes no time for it. From other threads, too."""

    def submit(self, prompts: list[Any], sampling: list[SamplingParams], *, events: bool) -> list[Handle]:
        """Check and queue prompts, all or none. Without `events`, only the last event is kept."""

    def prompt_ids(self, handle: Handle) -> tuple[int, ...]:
        """The ids of its prompt."""

    def events(self) -> Iterator[tuple[Handle, TokenEvent]]:
        """What came since the last call, and of whom. The last event of each completion has it."""

    def step(self) -> None:
        """One step of everything that runs. Raises `EngineError` when there will be no other."""

    def cancel(self, handles: list[Handle]) -> None:
        """End these; each gets its last event."""

    def busy(self) -> bool:
        """Whether `step()` has something to do."""

    def idle(self) -> bool:
        """Do a piece of work that was put off; False when nothing is left."""

    def stats(self) -> dict[str, Any]:
        """The engine's statistics as JSON values."""

    def close(self) -> None:
        """Free everything."""


class EngineModel:
    """A `Model` around a `hybridgen.Engine`."""

    def __init__(self, load: Callable[[], Any]) -> None:
        """`load` makes the engine; it is called here, so that one thread does all."""
        self._engine = load()
        self._loop = self._engine.open_loop()
        self._loop.on_end(lambda request: self._ended.append(request))
        self._ended: list[Handle] = []
        """That ended since the last look."""
        self._streams: dict[Handle, None] = {}
        """That make an event for each token and have not ended."""
        config = self._engine.config
        self.description = {
            "model": self._engine.checkpoint.name,
            "mode": str(self._engine.mode),
            "max_batch": config.max_batch,
            "max_context": self._engine.max_context,
        }
        self._settle_tokenizer()

    def _settle_tokenizer(self) -> None:
        """Encode something once: a fast tokenizer changes its settings at the first call, and then no more.

        It may do so only while no other thread uses it. What renders chats is started too.
        """
        tokenizer = self._engine.checkpoint.tokenizer
        if tokenizer is None:
            return
        try:
            tokenizer("a")
        except Exception:  # anybody's; a request that needs it is told
            logger.warning("the tokenizer failed at a first try", exc_info=True)
        if getattr(tokenizer, "chat_template", None):
            from hybridgen.text.chat_templates import ChatTemplateError, start_renderer

            try:
                start_renderer()
            except ChatTemplateError as error:
                logger.warning("chats will be refused: %s", error)

    def encode(self, prompt: Any, index: int) -> Any:
        # It imports torch, which the clients do without.
        from hybridgen.text.prompts import encode_pair, encode_prompt, is_pair

        how = self._engine.checkpoint.encoding
        if not is_pair(prompt):
            return encode_prompt(prompt, index, **how)
        ids, start = encode_pair(prompt, index, **how)
        return {"prompt": ids[:start], "completion": ids[start:]}

    def read_grammar(self, params: SamplingParams) -> None:
        from hybridgen.engine.requests import read_grammar

        read_grammar(params, self._engine.checkpoint)

    def submit(self, prompts: list[Any], sampling: list[SamplingParams], *, events: bool) -> list[Handle]:
        requests: list[Handle] = self._engine.make_requests(prompts, sampling, {})
        self._loop.submit(requests, keep_events=events)
        if events:
            self._streams |= dict.fromkeys(requests)
        return requests

    def prompt_ids(self, handle: Handle) -> tuple[int, ...]:
        return tuple(handle.prompt_ids)

    def events(self) -> Iterator[tuple[Handle, TokenEvent]]:
        # Called after every step: only those are looked at that may have something to tell.
        for request in list(self._streams):
            events = request.output.events
            while events:
                event = events.popleft()
                if event.completion is not None:
                    del self._streams[request]
                yield request, event
        ended, self._ended = self._ended, []
        for request in ended:
            if not request.output.keep_events:
                yield (
                    request,
                    TokenEvent(
                        token_id=None,
                        text="",
                        index=request.index,
                        choice=request.choice,
                        completion=request.completion,
                    ),
                )

    def step(self) -> None:
        self._loop.step()

    def cancel(self, handles: list[Handle]) -> None:
        self._loop.cancel(handles)

    def busy(self) -> bool:
        return bool(self._loop.scheduler.busy)

    def idle(self) -> bool:
        more: bool = self._engine.record_missing()
        return more

    def stats(self) -> dict[str, Any]:
        values: dict[str, Any] = plain(self._engine.stats().as_dict())
        return values

    def close(self) -> None:
        self._engine.close()


def plain(value: Any) -> Any:
    """The value as JSON has it: tuples as lists, keys as text, floats that are not finite as their names."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if value != value else "inf" if value > 0 else "-inf"
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def graph_counts(stats: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Steps by phase and by what graphs did for them: `hit` (without padding), `padded_hit` or `miss`; zeros where
    the engine tells none."""
    found: dict[tuple[str, str], int] = {}
    for phase in PHASES:
        counts = _phases(stats).get(phase, {})
        hits, padded = int(counts.get("hits", 0)), int(counts.get("padded_hits", 0))
        found |= {(phase, "hit"): hits - padded, (phase, "padded_hit"): padded}
        found[phase, "miss"] = int(counts.get("misses", 0))
    return found


def hit_rates(stats: Mapping[str, Any]) -> dict[str, float]:
    """By phase, the share of steps that a graph ran, from 0 to 1; phases without steps are left out."""
    rates = {phase: counts.get("hit_rate") for phase, counts in _phases(stats).items()}
    return {phase: float(rate) for phase, rate in rates.items() if rate is not None}


def read_share(stats: Mapping[str, Any]) -> float | None:
    """Bytes that decode steps read as a share of what the device reads at best, 0 to 1; None where nobody measures."""
    decode = stats.get("decode")
    share = decode.get("mbu") if isinstance(decode, Mapping) else None
    return float(share) if isinstance(share, (int, float)) else None


def graph_values(stats: Mapping[str, Any]) -> dict[str, int]:
    """`capture_failures`, `evictions`, `lazy_captures`, `bytes`, `held` (graphs) and `failed` (sizes that run without
    one because a capture failed or a graph was wrong); zeros where the engine tells none."""
    graphs = stats.get("graphs")
    graphs = graphs if isinstance(graphs, Mapping) else {}
    names = ("capture_failures", "evictions", "lazy_captures", "bytes")
    found = {name: int(graphs.get(name, 0)) for name in names}
    return found | {"held": len(graphs.get("graphs", ())), "failed": len(graphs.get("failures", ()))}


def _phases(stats: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    graphs = stats.get("graphs")
    phases = graphs.get("phases", {}) if isinstance(graphs, Mapping) else {}
    return phases if isinstance(phases, Mapping) else {}
