"""Runs steps: builds what a call needs, calls the model, samples, and hands back the launched step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hybridgen.execution.compiled import CompiledLayers
from hybridgen.execution.launch import LaunchedStep
from hybridgen.execution.state import DeviceState, SlotRows, to_device
from hybridgen.kvcache import LayerPages
from hybridgen.models import BoundModel, StepMetadata
from hybridgen.models.attention import Phase
from hybridgen.sampling import ResolvedSampling, SamplerState, record, sample

WARM_UP_RUN = 7
"""Tokens of the warm-up prefill: few enough for the first page, and no dimension of a model."""

WARM_UP_ROWS = 3


class PrefillChunk(NamedTuple):
    """A run of consecutive prompt tokens of one request."""

    slot: int
    tokens: Sequence[int]
    start: int
    """Position of the first of them."""
    rope_length: int
    """Tokens of the whole prefill: the prompt, and what was generated before when a request is prefilled again."""
    generated: int
    """Tokens generated before (above 0 when a request is prefilled again)."""
    last: bool
    """Whether the prompt ends here, so that a token is sampled."""


class ModelRunner:
    """Launches prefill and decode calls of one model on one device."""

    def __init__(
        self,
        bound: BoundModel,
        *,
        vocab_size: int,
        max_batch: int,
        max_pages: int,
        token_budget: int,
        compile_backend: str | None,
        fall_back: Callable[[str], None] = warnings.warn,
    ) -> None:
        """`compile_backend` None runs every step eagerly; `fall_back` is told when a layer does, and why."""
        device = bound.model.device
        self._bound = bound
        self.device = device
        self._token_budget = token_budget
        self.state = DeviceState(max_batch, max_pages, device)
        self.sampler = SamplerState(max_batch, vocab_size, device)
        empty = torch.zeros(1, dtype=torch.int64, device=device)
        starts = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self._step = StepMetadata(self.state.block_table.tensor, empty.int(), empty, starts, empty)
        self.compiled: CompiledLayers | None = None
        if compile_backend is not None:
            self.compiled = CompiledLayers(
                bound.layers,
                self._step,
                backend=compile_backend,
                max_batch=max_batch,
                token_budget=token_budget,
                fall_back=fall_back,
            )

    def attach(self, pages: tuple[LayerPages, ...]) -> None:
        """Use these pages from now on."""
        self._bound.attach(pages, self._step)

    @torch.inference_mode()
    def admit(self, slot: int, pages: Sequence[int], sampling: ResolvedSampling, prompt_ids: Sequence[int]) -> None:
        """Give a slot to a new request."""
        self.state.block_table.assign(slot, pages)
        self.sampler.assign(slot, sampling, prompt_ids, ())

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[PrefillChunk]) -> LaunchedStep | None:
        """Run the chunks in one call; sample for those that end their prompt (None when none does)."""
        ids = self._stage_prefill(chunks)
        ends, total = [], 0
        for chunk in chunks:
            total += len(chunk.tokens)
            if chunk.last:
                ends.append(total - 1)
        keep = to_device(ends or [0], torch.int64, self.device)
        logits = self._forward(ids, keep)
        finished = [chunk for chunk in chunks if chunk.last]
        if not finished:
            return None
        slots = tuple(chunk.slot for chunk in finished)
        lengths = [chunk.start + len(chunk.tokens) for chunk in finished]
        counts = to_device([slots, lengths, [chunk.generated for chunk in finished]], torch.int64, self.device)
        return self._sample(logits, slots, *counts.unbind(0))

    @torch.inference_mode()
    def decode(self, slots: tuple[int, ...]) -> LaunchedStep:
        """Run one decode step of these slots and sample a token for each."""
        rows, index = self.state.index(slots)
        state = self.state.read(rows)
        lengths = state.lengths + 1
        self._set_step(Phase.DECODE, index, state.lengths, lengths)
        logits = self._forward(state.last_tokens, None)
        return self._sample(logits, slots, rows, lengths, state.generated)

    def _sample(
        self,
        logits: torch.Tensor,
        slots: tuple[int, ...],
        rows: torch.Tensor,
        lengths: torch.Tensor,
        generated: torch.Tensor,
    ) -> LaunchedStep:
        """Sample the token after `lengths` tokens for each row, and advance the rows."""
        plan = self.sampler.needs(slots)
        sampled = sample(logits, self.sampler, rows, lengths, generated, plan)
        step = LaunchedStep(sampled)  # before the state changes, so that a step that fails can run again
        if plan.penalties:
            record(self.sampler, rows, sampled.tokens)
        self.state.write(rows, SlotRows(sampled.tokens, lengths, generated + 1))
        return step

    def _forward(self, ids: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        return self._bound.forward(ids, self._step, keep)

    def _set_step(self, phase: Phase, slots: torch.Tensor, positions: torch.Tensor, rope: torch.Tensor) -> None:
        step = self._step
        step.phase, step.slots, step.positions, step.rope_lengths = phase, slots, positions, rope

    def _stage_prefill(self, chunks: Sequence[PrefillChunk]) -> torch.Tensor:
        """Set the step's metadata for the chunks; returns their token ids, packed."""
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        rope: list[int] = []
        starts = [0]
        for chunk in chunks:
            count = len(chunk.tokens)
            ids += chunk.tokens
            slots += [chunk.slot] * count
            positions += range(chunk.start, chunk.start + count)
            rope += [chunk.rope_length] * count
            starts.append(len(ids))
        block = to_device([ids, positions, rope, slots], torch.int64, self.device)
        starts += [len(ids)] * (self.state.max_batch + 1 - len(starts))
        self._step.query_starts = to_device(starts, torch.int32, self.device)
        # One token alone is a decode step: a compiled prefill has a dynamic length, and 1 is always a special case.
        phase = Phase.DECODE if len(ids) == 1 else Phase.PREFILL
        self._set_step(phase, block[3].int(), block[1], block[2])
        return block[0]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile prefill, decode of several rows and of one. Writes to the dummy page only."""
        if self.compiled is None:
            return
        self.compiled.install()
        length = min(WARM_UP_RUN, self._token_budget)
        run = PrefillChunk(0, [0] * length, 0, length, 0, True)
        with self.compiled.warming_up():
            self._bound.forward(self._stage_prefill([run]), self._step, None)
            for count in {min(WARM_UP_ROWS, self.state.max_batch), 1}:
                index = to_device(list(range(count)), torch.int32, self.device)
                positions = torch.zeros(count, dtype=torch.int64, device=self.device)
                self._set_step(Phase.DECODE, index, positions, positions + 1)
                self._bound.forward(torch.zeros_like(positions), self._step, None)

    @torch.inference_mode()
    def measure_activations(self, max_context: int) -> int:
        """Bytes that the largest prefill call allocates at its peak on CUDA (0 elsewhere).

        Runs with every slot's pages unset, so it writes to the dummy page only.
        """
        if self.device.type != "cuda":
            return 0
        count = min(self._token_budget, max_context)
        runs = [PrefillChunk(0, [0] * count, 0, count, 0, True)]
        ids = self._stage_prefill(runs)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        logits = self._bound.forward(ids, self._step, to_device([0], torch.int64, self.device))
        peak = torch.cuda.max_memory_allocated(self.device) - before
        # The sampler works on [max_batch, vocab_size] in float32: logits, processed, sorted values and ids, noise.
        sampling = 8 * 4 * self.state.max_batch * logits.shape[-1]
        torch.cuda.empty_cache()
        return peak + sampling

    def disable_compilation(self) -> None:
        """Run every later step eagerly."""
        if self.compiled is not None:
            self.compiled.remove()
            self.compiled = None
