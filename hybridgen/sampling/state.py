"""What the sampler knows of each slot, on the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybridgen.device.rows import SentRows
from hybridgen.sampling.history import History, make_history
from hybridgen.sampling.own import OwnProcessors, OwnRows
from hybridgen.sampling.processors import AT_BEGIN, EARLY_END, FORCED_FIRST, FORCED_LAST
from hybridgen.sampling.random import gumbel_noise
from hybridgen.sampling.resolve import ResolvedSampling

_RANKED = (64, 256, 1024)
"""Widths of a partial sort. Few of them, so that a compiled sampler has few variants."""

_FAR = 1e30
"""Parameters beyond it, or above 0 and below its inverse, act as it does."""


_CONTEXT = 4096
"""Tokens of a sequence, where nobody says how many."""
_LARGEST = 2**31 - 1


class SamplerPlan(NamedTuple):
    """Which parts of the sampler a set of rows needs, as the host knows without asking the device. Hashable."""

    sample: bool = False
    """Some row draws."""
    ranked: int = 0
    """How many of the largest logits top-k and top-p sort on a CPU; 0: no row has either."""
    nucleus: bool = False
    """Some row has top-p."""
    min_p: bool = False
    """Some row has min-p."""
    penalties: bool = False
    """Some row has a repetition, presence or frequency penalty."""
    bias: bool = False
    """Some row has a logit bias."""
    by_length: bool = False
    """Some row bans or forces ids by the number of generated tokens: a minimum length, what it begins or ends with."""
    top_k: bool = False
    """Some row has top-k."""
    history: bool = False
    """Some row's logits depend on the order of its tokens: sequences with a bias, bad words, repeated n-grams."""
    cuts: bool = False
    """Some row has typical-p, epsilon or eta cutoff."""
    sampled_logprobs: bool = False
    """Some row wants log-probabilities of the distribution that it draws from."""
    logprobs: int | None = None
    """The largest number of top log-probabilities that a row wants; None: no row wants any."""

    @property
    def filter(self) -> bool:
        """Whether some row has top-k, top-p or min-p."""
        return self.ranked > 0 or self.min_p

    @property
    def processes(self) -> bool:
        """Whether some row's logits are changed before a token is chosen."""
        return self.penalties or self.bias or self.by_length or self.history

    @property
    def greedy(self) -> bool:
        """Whether every row takes its largest logit as the model gives it."""
        return not (self.sample or self.processes)

    def covers(self, other: SamplerPlan) -> bool:
        """Whether a step with this plan gives rows that need `other` the tokens that they would get from it."""
        wanted = (-1 if plan.logprobs is None else plan.logprobs for plan in (self, other))
        switches = zip(self[:-1], other[:-1], strict=True)
        return all(mine >= others for mine, others in switches) and next(wanted) >= next(wanted)


def plan_of(params: ResolvedSampling, vocab_size: int) -> SamplerPlan:
    """The plan of one request alone."""
    draws = not params.greedy
    nucleus = draws and params.top_p < 1
    ranked = 0
    if draws and params.top_k:
        ranked = next((width for width in _RANKED if params.top_k <= width < vocab_size), vocab_size)
    elif nucleus:
        ranked = vocab_size
    return SamplerPlan(
        sample=draws,
        ranked=ranked,
        nucleus=nucleus,
        min_p=draws and params.min_p > 0,
        penalties=params.penalizes,
        bias=bool(params.logit_bias or params.allowed_token_ids),
        by_length=_goes_by_length(params),
        top_k=draws and params.top_k > 0,
        history=params.reads_history,
        cuts=draws and params.cuts,
        sampled_logprobs=params.logprobs is not None and params.logprobs_of == "sampled",
        logprobs=None if params.logprobs is None else min(params.logprobs, vocab_size),
    )


def _goes_by_length(params: ResolvedSampling) -> bool:
    early = params.min_new_tokens and params.stop_token_ids
    return bool(early or params.begin_suppress_tokens or params.forced_first or params.forced_last)


def every_kind(vocab_size: int) -> list[SamplerPlan]:
    """A plan for each set of kernels that sampling has on CUDA."""
    plans = [SamplerPlan(), SamplerPlan(sample=True), SamplerPlan(sample=True, min_p=True)]
    for top_k, nucleus in ((True, False), (False, True), (True, True)):
        plans.append(SamplerPlan(sample=True, ranked=vocab_size, top_k=top_k, nucleus=nucleus))
    return [*plans, *(plan._replace(penalties=True, bias=True, history=True) for plan in plans)]


def _merge(plans: Sequence[SamplerPlan]) -> SamplerPlan:
    """What covers all of them."""
    return SamplerPlan(
        sample=any(plan.sample for plan in plans),
        ranked=max((plan.ranked for plan in plans), default=0),
        nucleus=any(plan.nucleus for plan in plans),
        min_p=any(plan.min_p for plan in plans),
        penalties=any(plan.penalties for plan in plans),
        bias=any(plan.bias for plan in plans),
        by_length=any(plan.by_length for plan in plans),
        top_k=any(plan.top_k for plan in plans),
        history=any(plan.history for plan in plans),
        cuts=any(plan.cuts for plan in plans),
        sampled_logprobs=any(plan.sampled_logprobs for plan in plans),
        logprobs=max((plan.logprobs for plan in plans if plan.logprobs is not None), default=None),
    )


class SamplerState:
    """Sampling parameters and token histories, one row per slot.

    The parameters live in two small tables, so that a new request costs two copies; the properties are views
    of their columns. Larger tensors are allocated when the first request needs them and kept:

    - `bias` float32 [slots, V]: added to the logits;
    - `rules` uint8 [slots, V]: ids that are banned or forced by the number of generated tokens
      (`processors.apply_rules`);
    - `prompt_seen` bool [slots, V] and `output_counts` int32 [slots, V]: for penalties;
    - `history`: the tokens of each slot by position, and the sequences that are looked for in them
      (`sampling.history`).
    """

    def __init__(
        self,
        max_batch: int,
        vocab_size: int,
        device: torch.device | str,
        max_context: int = _CONTEXT,
        *,
        keeps_text: bool = False,
    ) -> None:
        """Allocate the rows of `max_batch` slots for logits [B, vocab_size] on a device, and for sequences of
        `max_context` tokens. `keeps_text`: every request's tokens are in the history, for those who draft."""
        self.max_batch = max_batch
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.device = torch.device(device)
        self.reals = torch.zeros(max_batch, 9, dtype=torch.float32, device=self.device)
        self.integers = torch.zeros(max_batch, 9, dtype=torch.int64, device=self.device)
        self._real_rows, self._integer_rows = SentRows(self.reals), SentRows(self.integers)
        self.bias: Tensor | None = None
        self.rules: Tensor | None = None
        self.history: History | None = None
        self.prompt_seen: Tensor | None = None
        self.output_counts: Tensor | None = None
        self.noise: Callable[[Tensor, Tensor, int], Tensor] = gumbel_noise
        """Where the noise comes from on a CPU; on CUDA it is a part of `choice.choose_sampled`. Eagerly it is about 45
        small kernels; `torch.compile` makes one of them, so a runner that compiles may put its function here."""
        self._plans: list[SamplerPlan | None] = [None] * max_batch
        self._own: dict[int, OwnProcessors] = {}
        self._keeps_text = keeps_text
        if keeps_text:
            self.allocate(SamplerPlan(history=True))

    def assign(
        self,
        slot: int,
        params: ResolvedSampling,
        prompt_ids: Sequence[int] = (),
        generated_ids: Sequence[int] = (),
    ) -> None:
        """Give a slot to a request. Nothing of its former owner stays. Waits for nothing on the device.

        Args:
            prompt_ids: the prompt.
            generated_ids: what it has generated so far, when it comes back.

        Raises:
            ValueError: there is no such slot.
        """
        self.assign_all([(slot, params, prompt_ids, generated_ids)])

    def assign_all(self, requests: Sequence[tuple[int, ResolvedSampling, Sequence[int], Sequence[int]]]) -> None:
        """`assign` for several slots, each once, in hardly more launches than for one."""
        slots = [slot for slot, *_ in requests]
        for slot in slots:
            if not 0 <= slot < self.max_batch:
                raise ValueError(f"slot {slot} is not one of 0 to {self.max_batch - 1}")
        self._real_rows.write(slots, np.array([_real_row(params) for _, params, *_ in requests], np.float32))
        self._integer_rows.write(slots, np.array([_integer_row(params) for _, params, *_ in requests], np.int64))
        for slot, params, prompt_ids, generated_ids in requests:
            self.allocate(self._note(slot, params, prompt_ids, generated_ids))
        tables = [self.bias, self.rules, self.prompt_seen, self.output_counts]
        tables += [None if self.history is None else self.history.ends]
        cleared = [table for table in tables if table is not None]
        if cleared:
            index = self._on_device(slots, torch.int64)
            for table in cleared:
                table.index_fill_(0, index, 0)
            for request in requests:
                self._fill_tables(*request)

    def _note(
        self, slot: int, params: ResolvedSampling, prompt_ids: Sequence[int], generated_ids: Sequence[int]
    ) -> SamplerPlan:
        """What the host knows of a slot."""
        plan = self._plans[slot] = plan_of(params, self.vocab_size)
        self._own.pop(slot, None)
        if params.has_own:
            lengths = len(prompt_ids), len(generated_ids)
            self._own[slot] = OwnProcessors(params.logits_processors, params.constraint, *lengths)
        return plan

    def _fill_tables(
        self, slot: int, params: ResolvedSampling, prompt_ids: Sequence[int], generated_ids: Sequence[int]
    ) -> None:
        """A slot's rows of the larger tables, which are zero."""
        plan = plan_of(params, self.vocab_size)
        if plan.bias and self.bias is not None:
            if params.allowed_token_ids:
                self.bias[slot].fill_(-math.inf).index_fill_(0, self._ids(params.allowed_token_ids), 0.0)
            ids = self._on_device([token for token, _ in params.logit_bias], torch.int64)
            values = [bias if bias == -math.inf else _finite(bias) for _, bias in params.logit_bias]
            self.bias[slot].index_copy_(0, ids, self._on_device(values, torch.float32))
        if plan.by_length and self.rules is not None:
            self.rules[slot].copy_(self._stage(self._rules_row(params), torch.uint8), non_blocking=True)
        if plan.penalties and self.prompt_seen is not None and self.output_counts is not None:
            self.prompt_seen[slot].index_fill_(0, self._ids(prompt_ids), True)
            generated = self._ids(generated_ids)
            self.output_counts[slot].scatter_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
        if (plan.history or self._keeps_text) and self.history is not None:
            text = np.concatenate((np.asarray(prompt_ids, np.int64), np.asarray(generated_ids, np.int64)))
            self._write_history(self.history, slot, params, text)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a step may read or write, by name."""
        tables = {
            "bias": self.bias,
            "rules by length": self.rules,
            "prompt tokens": self.prompt_seen,
            "output counts": self.output_counts,
        }
        parameters = {"sampling reals": self.reals, "sampling integers": self.integers}
        if self.history is not None:
            tables |= {f"history {name}": table for name, table in self.history._asdict().items()}
        return parameters | {name: table for name, table in tables.items() if table is not None}

    def needs(self, slots: Sequence[int]) -> SamplerPlan:
        """Which parts of the sampler a step of these slots needs.

        Raises:
            ValueError: a slot was never assigned.
        """
        plans = []
        for slot in slots:
            plan = self._plans[slot]
            if plan is None:
                raise ValueError(f"slot {slot} was not assigned")
            plans.append(plan)
        return _merge(plans)

    def own(self, slots: Sequence[int]) -> OwnRows | None:
        """Which rows of a step of these slots have functions or a grammar of their own; None: no row has."""
        if not self._own:
            return None
        found = [(row, slot, self._own[slot]) for row, slot in enumerate(slots) if slot in self._own]
        return OwnRows(found) if found else None

    def failure(self, slot: int) -> str | None:
        """Why a slot's own functions or its grammar left nothing to choose, if they did."""
        own = self._own.get(slot)
        return None if own is None else own.failure

    @property
    def temperature(self) -> Tensor:
        """float32 [slots]; 0: greedy."""
        return self.reals[:, 0]

    @property
    def top_p(self) -> Tensor:
        """float32 [slots]; 1: off."""
        return self.reals[:, 1]

    @property
    def log_min_p(self) -> Tensor:
        """float32 [slots]: the logarithm of min-p, taken on the host so that it does not depend on the
        batch."""
        return self.reals[:, 2]

    @property
    def repetition_penalty(self) -> Tensor:
        """float32 [slots]; 1: off."""
        return self.reals[:, 3]

    @property
    def presence_penalty(self) -> Tensor:
        """float32 [slots]; 0: off."""
        return self.reals[:, 4]

    @property
    def frequency_penalty(self) -> Tensor:
        """float32 [slots]; 0: off."""
        return self.reals[:, 5]

    @property
    def seed(self) -> Tensor:
        """int64 [slots]; 0 for greedy requests."""
        return self.integers[:, 0]

    @property
    def top_k(self) -> Tensor:
        """int64 [slots]; 0: off."""
        return self.integers[:, 1]

    @property
    def limits(self) -> Tensor:
        """int64 [slots, 4], see `processors.apply_rules`."""
        return self.integers[:, 2:6]

    @property
    def ngrams(self) -> Tensor:
        """int64 [slots], the size of n-grams that may not come twice; 0: off."""
        return self.integers[:, 6]

    @property
    def of_sampled(self) -> Tensor:
        """int64 [slots]; 1: log-probabilities are those of the distribution that is drawn from."""
        return self.integers[:, 7]

    @property
    def most_new(self) -> Tensor:
        """int64 [slots]: tokens that each request may generate."""
        return self.integers[:, 8]

    @property
    def typical_p(self) -> Tensor:
        """float32 [slots]; 1: off."""
        return self.reals[:, 6]

    @property
    def epsilon_cutoff(self) -> Tensor:
        """float32 [slots]; 0: off."""
        return self.reals[:, 7]

    @property
    def eta_cutoff(self) -> Tensor:
        """float32 [slots]; 0: off."""
        return self.reals[:, 8]

    def allocate(self, plan: SamplerPlan) -> None:
        """Allocate the tables that a plan needs and that are not there yet; they stay where they are."""
        # Requests may be admitted in inference mode; a tensor made there could not be written to outside of
        # it.
        with torch.inference_mode(False):
            if (plan.bias or plan.history) and self.bias is None:
                self.bias = self._zeros(torch.float32)
            if plan.by_length and self.rules is None:
                self.rules = self._zeros(torch.uint8)
            if plan.history and self.history is None:
                self.history = make_history(self.max_batch, self.max_context, self.device)
            if plan.penalties and self.prompt_seen is None:
                self.prompt_seen = self._zeros(torch.bool)
                self.output_counts = self._zeros(torch.int32)

    def _write_history(self, history: History, slot: int, params: ResolvedSampling, ids: np.ndarray) -> None:
        known = torch.from_numpy(ids).clamp(max=_LARGEST)  # an id that no sequence has
        history.text[slot, : len(ids)].copy_(self._stage(known, torch.int32), non_blocking=True)
        if not params.sequence_bias:
            return
        tokens = [token for sequence, _ in params.sequence_bias for token in sequence]
        ends = [0, *itertools.accumulate(len(sequence) for sequence, _ in params.sequence_bias)]
        ends += [ends[-1]] * (history.ends.shape[1] - len(ends))
        values = [value if value == -math.inf else _finite(value) for _, value in params.sequence_bias]
        history.tokens[slot, : len(tokens)].copy_(self._stage(tokens, torch.int32), non_blocking=True)
        history.ends[slot].copy_(self._stage(ends, torch.int32), non_blocking=True)
        history.values[slot, : len(values)].copy_(self._stage(values, torch.float32), non_blocking=True)

    def _rules_row(self, params: ResolvedSampling) -> Tensor:
        """The bits of each id, on the host."""
        row = torch.zeros(self.vocab_size, dtype=torch.uint8)
        groups = (
            (EARLY_END, params.stop_token_ids),
            (AT_BEGIN, params.begin_suppress_tokens),
            (FORCED_FIRST, params.forced_first),
            (FORCED_LAST, params.forced_last),
        )
        for bit, ids in groups:
            row[list(dict.fromkeys(ids))] |= bit
        return row

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.max_batch, self.vocab_size, dtype=dtype, device=self.device)

    def _stage(self, values: Sequence[float] | Tensor, dtype: torch.dtype) -> Tensor:
        """On the host, in pinned memory where the device is CUDA.

        Torch's pinned allocator keeps a freed block until the copies that read it are done.
        """
        host = torch.as_tensor(values, dtype=dtype, device="cpu")
        return host.pin_memory() if self.device.type == "cuda" else host

    def _on_device(self, values: Sequence[float] | Tensor, dtype: torch.dtype) -> Tensor:
        return self._stage(values, dtype).to(self.device, non_blocking=True)

    def _ids(self, ids: Sequence[int]) -> Tensor:
        """int64 on the device. Ids without a logit are left out: they cannot be chosen (a model can embed
        more)."""
        host = torch.from_numpy(np.array(ids, np.int64))  # a prompt's ids are an array, which this copies at once
        return self._on_device(host[(host >= 0) & (host < self.vocab_size)], torch.int64)


def _finite(value: float, low: float = -_FAR) -> float:
    """Within what float32 holds: a larger double would become infinite there, and infinity times 0 is NaN."""
    return min(max(value, low), _FAR)


def _real_row(params: ResolvedSampling) -> list[float]:
    return [
        0.0 if params.greedy else _finite(params.temperature, 1 / _FAR),
        params.top_p,
        math.log(params.min_p) if params.min_p > 0 else -math.inf,
        _finite(params.repetition_penalty, 1 / _FAR),
        _finite(params.presence_penalty),
        _finite(params.frequency_penalty),
        params.typical_p,
        params.epsilon_cutoff,
        params.eta_cutoff,
    ]


def _integer_row(params: ResolvedSampling) -> list[int]:
    return [
        0 if params.greedy else params.seed,
        params.top_k,
        params.min_new_tokens,
        params.begin if params.begin_suppress_tokens else -1,
        0 if params.forced_first else -1,
        params.max_new_tokens - 1 if params.forced_last else -1,
        params.no_repeat_ngram_size,
        int(params.logprobs_of == "sampled"),
        params.max_new_tokens,
    ]
