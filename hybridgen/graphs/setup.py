"""From a config to a store: what is recorded, by whom, and what is recorded before the first request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from hybridgen.compilation.steps import CompiledSteps, Loader, compiles_whole
from hybridgen.config import EngineConfig, GraphOwner, Mode, parse_bytes
from hybridgen.graphs.buckets import (
    FEW_PROMPTS,
    MANY_PROMPTS,
    USUAL_PROMPT,
    GraphSettings,
    decode_buckets,
    prefill_buckets,
)
from hybridgen.graphs.compiled_step import CompiledStepRecorder
from hybridgen.graphs.key import LAYERS, GraphKey
from hybridgen.graphs.recorder import Recorder
from hybridgen.graphs.stand_in import StandInRecorder
from hybridgen.graphs.steps import TreeSteps
from hybridgen.models.attention import Phase
from hybridgen.sampling import SamplerPlan

_MOST_LAYER_FLOPS = 1.1e12
"""Of a decoder layer in a prefill call: above it its products alone take 1.5 ms and more (700 TFLOP/s), and its
launches 0.8 ms or less, on an H200 and its host. Then a graph makes nothing faster, and its memory and its capture are
saved."""


@dataclass(frozen=True)
class GraphSetup:
    """What decides about graphs."""

    config: EngineConfig
    mode: Mode
    device: torch.device
    token_budget: int
    max_tokens: int
    """Prompt tokens that one prefill call can have."""
    query_len: int = 1
    """Tokens of a row in a decode step at most."""
    no_prefill: str = ""
    """Why no prefill is recorded, whatever the config says; empty if nothing keeps it from that."""
    layer_weights: int = 0
    """Numbers in the weights of a decoder layer; 0: not known."""

    @property
    def records(self) -> bool:
        """Whether steps are recorded."""
        return self.mode.records

    @property
    def compiles_steps(self) -> bool:
        """Whether decode steps are compiled whole, in place of the layers."""
        return compiles_whole(self.config, self.mode, self.device.type)

    @property
    def spares_first_call(self) -> bool:
        """Whether compiled steps are neither loaded at the start nor recorded at the end of the first call: `auto` on a
        CPU, whose first call takes no longer than that of `eager`."""
        return self.config.mode is Mode.AUTO and self.compiles_steps and self.config.lazy_capture

    def settings(self) -> GraphSettings:
        """Buckets and limits."""
        config = self.config
        decode, prefill = config.decode_buckets, config.prefill_buckets
        if not self.records:
            decode = prefill = ()
        elif self.compiles_steps and prefill is None:
            prefill = ()  # nothing stands in for a compiled prefill, and padding would cost
        why = {}
        if self.no_prefill:
            prefill, why = (), {"no_prefill": self.no_prefill}
        max_bytes = parse_bytes("max_graph_memory", config.max_graph_memory)
        return GraphSettings(
            decode=decode_buckets(config.max_batch) if decode is None else tuple(decode),
            prefill=prefill_buckets(self.max_tokens, self._worth_recording) if prefill is None else tuple(prefill),
            **why,
            max_rows=config.max_batch,
            max_graphs=config.max_graphs,
            max_bytes=max_bytes,
            max_padding_ratio=config.max_padding_ratio,
            lazy=config.lazy_capture,
            capture_after=config.capture_after,
            sample_in_graph=config.sample_in_graph,
            named=frozenset(
                phase
                for phase, sizes in ((Phase.DECODE, config.decode_buckets), (Phase.PREFILL, config.prefill_buckets))
                if sizes is not None and self.mode.records
            ),
            # Nothing is compiled: what is not kept would be asked for in vain.
            improves=not (self.compiles_steps and config.offline_compile),
            exact_when_lazy=config.graphs is GraphOwner.BOTH,
        )

    @property
    def _worth_recording(self) -> int:
        """Tokens of the largest prefill call that launches may keep waiting; 0 where that is not known.

        A CPU has no launches, and trees compile each size for minutes.
        """
        if self.device.type != "cuda" or self.config.graphs is GraphOwner.TREES or not self.layer_weights:
            return 0
        return int(_MOST_LAYER_FLOPS / (2 * self.layer_weights))

    def largest(self) -> int:
        """Tokens of the largest step that may be recorded; 0 where nothing is."""
        settings = self.settings()
        decode = [self.query_len * size for size in settings.decode[-1:]]
        return max((*decode, *settings.prefill[-1:]), default=0) if self.records else 0

    def recorder(
        self, steps: TreeSteps, compiled: CompiledSteps | None = None
    ) -> Callable[[GraphKey, bool], Recorder | None] | None:
        """Who records a step (the flag: while idle, not at warm-up).

        Args:
            compiled: those that are kept, where steps are compiled whole.

        Trees record while idle only what needs no compilation, which takes seconds to minutes.
        """
        if not self.records:
            return None
        if self.device.type != "cuda":
            stand_in = StandInRecorder()
            if compiled is None:
                return lambda key, lazy: stand_in
            loader = Loader() if self.spares_first_call else None
            whole = CompiledStepRecorder(compiled, waits=not self.config.lazy_capture, loader=loader)
            return lambda key, lazy: whole if key.phase is Phase.DECODE and not key.is_rest else stand_in
        # Imported here, because the trees' module takes part of a second and must be imported on this thread.
        from hybridgen.graphs.cuda import CudaGraphRecorder

        manual = CudaGraphRecorder(self.device)
        if self.config.graphs is GraphOwner.MANUAL:
            return lambda key, lazy: manual
        from hybridgen.graphs.trees import TreeRecorder

        trees = TreeRecorder(steps, max_batch=self.config.max_batch, token_budget=self.token_budget)
        if self.config.graphs is GraphOwner.TREES:
            return lambda key, lazy: manual if key.is_rest else trees if not lazy or trees.knows(key) else None
        buckets = self.settings().decode

        def both(key: GraphKey, lazy: bool) -> Recorder:
            # A tree compiles the layers: what another executor serves is recorded by hand, at its own size.
            between = key.phase is Phase.DECODE and key.tokens not in buckets and key.executor == LAYERS
            return trees if between and (not lazy or trees.knows(key)) else manual

        return both


def keys_at_start(
    settings: GraphSettings,
    plans: Iterable[SamplerPlan],
    *,
    any_sampler: bool,
    query_lens: Sequence[int] = (),
    quiet: bool = False,
) -> list[GraphKey]:
    """What is recorded before the first request; no more than may be kept, what serves the most first.

    Every bucket with each of these samplers, prefill for one prompt. And, where `any_sampler` says so or sampling is
    not recorded, every bucket up to the logits, prefill for a few prompts: for all other samplers. Prefill above 512
    tokens is recorded up to the logits alone, for many prompts. Decode buckets with
    drafts, of `query_lens` tokens a row, come behind those without; for other samplers they are left to be wanted, or
    there would be too many. Where drafting can pause, as `quiet` says, so do decode buckets in which it does.
    """
    prefill = [size for size in settings.prefill if size <= USUAL_PROMPT]
    many = min(MANY_PROMPTS, settings.max_rows)
    keys = [GraphKey.prefill(size, many, None) for size in settings.prefill if size > USUAL_PROMPT]
    if any_sampler or not settings.sample_in_graph:
        few = min(FEW_PROMPTS, settings.max_rows)
        lengths = (1,) if settings.sample_in_graph else (1, *query_lens)
        keys += [GraphKey.decode(size, None, query_len=count) for count in lengths for size in settings.decode]
        keys += [GraphKey.prefill(size, few, None) for size in prefill]
    for plan in plans if settings.sample_in_graph else ():
        keys += [GraphKey.decode(size, plan, query_len=count) for count in (1, *query_lens) for size in settings.decode]
        keys += [GraphKey.decode(size, plan, quiet=True) for size in settings.decode if quiet]
        keys += [GraphKey.prefill(size, 1, plan) for size in prefill]
        if settings.exact_when_lazy and settings.decode:
            # One size between the buckets, so that its step is compiled: the largest, which no fused executor serves.
            between = [size for size in range(2, settings.decode[-1]) if size not in settings.decode]
            keys += [GraphKey.decode(size, plan) for size in between[-1:]]
    return keys[: settings.max_graphs]
