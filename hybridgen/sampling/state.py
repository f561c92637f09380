"""What the sampler knows of each slot, on the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.params import ResolvedSampling
from hybridgen.sampling.random import gumbel_noise

_RANKED = (64, 256, 1024)
"""Widths of a partial sort. Few of them, so that a compiled sampler has few variants."""

_FAR = 1e30
"""Parameters beyond it, or above 0 and below its inverse, act as it does."""


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
    min_tokens: bool = False
    """Some row has a minimum length."""
    top_k: bool = False
    """Some row has top-k."""
    logprobs: int | None = None
    """The largest number of top log-probabilities that a row wants; None: no row wants any."""

    @property
    def filter(self) -> bool:
        """Whether some row has top-k, top-p or min-p."""
        return self.ranked > 0 or self.min_p

    @property
    def processes(self) -> bool:
        """Whether some row's logits are changed before a token is chosen."""
        return self.penalties or self.bias or self.min_tokens

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
        bias=bool(params.logit_bias),
        min_tokens=bool(params.min_new_tokens and params.stop_token_ids),
        top_k=draws and params.top_k > 0,
        logprobs=None if params.logprobs is None else min(params.logprobs, vocab_size),
    )


def every_kind(vocab_size: int) -> list[SamplerPlan]:
    """A plan for each set of kernels that sampling has on CUDA."""
    switches = (False, True)
    processed = {"penalties": True, "bias": True}
    plans = [SamplerPlan(), SamplerPlan(**processed)]
    for top_k, nucleus, processes in itertools.product(switches, repeat=3):
        ranked = vocab_size if top_k or nucleus else 0
        plan = SamplerPlan(sample=True, ranked=ranked, top_k=top_k, nucleus=nucleus)
        plans.append(plan._replace(**processed) if processes else plan)
    return plans


def _merge(plans: Sequence[SamplerPlan]) -> SamplerPlan:
    """What covers all of them."""
    return SamplerPlan(
        sample=any(plan.sample for plan in plans),
        ranked=max((plan.ranked for plan in plans), default=0),
        nucleus=any(plan.nucleus for plan in plans),
        min_p=any(plan.min_p for plan in plans),
        penalties=any(plan.penalties for plan in plans),
        bias=any(plan.bias for plan in plans),
        min_tokens=any(plan.min_tokens for plan in plans),
        top_k=any(plan.top_k for plan in plans),
        logprobs=max((plan.logprobs for plan in plans if plan.logprobs is not None), default=None),
    )


class SamplerState:
    """Sampling parameters and token histories, one row per slot.

    The parameters live in two small tables, so that a new request costs two copies; the attributes are views
    of their columns. Tensors of the vocabulary's width are allocated when the first request needs them and
    kept:

    - `bias` float32 [slots, V]: added to the logits;
    - `banned` bool [slots, V]: ids that end the request, for its minimum length;
    - `prompt_seen` bool [slots, V] and `output_counts` int32 [slots, V]: for penalties.
    """

    def __init__(self, max_batch: int, vocab_size: int, device: torch.device | str) -> None:
        """Allocate the rows of `max_batch` slots for logits [B, vocab_size] on a device."""
        self.max_batch = max_batch
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.reals = torch.zeros(max_batch, 6, dtype=torch.float32, device=self.device)
        self.integers = torch.zeros(max_batch, 3, dtype=torch.int64, device=self.device)
        self.bias: Tensor | None = None
        self.banned: Tensor | None = None
        self.prompt_seen: Tensor | None = None
        self.output_counts: Tensor | None = None
        self.noise: Callable[[Tensor, Tensor, int], Tensor] = gumbel_noise
        """Where the noise comes from on a CPU; on CUDA it is a part of `choice.choose_sampled`. Eagerly it is about 45
        small kernels; `torch.compile` makes one of them, so a runner that compiles may put its function here."""
        self._plans: list[SamplerPlan | None] = [None] * max_batch

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
        if not 0 <= slot < self.max_batch:
            raise ValueError(f"slot {slot} is not one of 0 to {self.max_batch - 1}")
        self.reals[slot].copy_(self._stage(_real_row(params), torch.float32), non_blocking=True)
        self.integers[slot].copy_(self._stage(_integer_row(params), torch.int64), non_blocking=True)
        plan = self._plans[slot] = plan_of(params, self.vocab_size)
        self.allocate(plan)
        for table in (self.bias, self.banned, self.prompt_seen, self.output_counts):
            if table is not None:
                table[slot].zero_()
        if plan.bias and self.bias is not None:
            ids = self._on_device([token for token, _ in params.logit_bias], torch.int64)
            values = [bias if bias == -math.inf else _finite(bias) for _, bias in params.logit_bias]
            self.bias[slot].index_copy_(0, ids, self._on_device(values, torch.float32))
        if plan.min_tokens and self.banned is not None:
            self.banned[slot].index_fill_(0, self._ids(params.stop_token_ids), True)
        if plan.penalties and self.prompt_seen is not None and self.output_counts is not None:
            self.prompt_seen[slot].index_fill_(0, self._ids(prompt_ids), True)
            generated = self._ids(generated_ids)
            self.output_counts[slot].scatter_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a step may read or write, by name."""
        tables = {
            "bias": self.bias,
            "banned ids": self.banned,
            "prompt tokens": self.prompt_seen,
            "output counts": self.output_counts,
        }
        parameters = {"sampling reals": self.reals, "sampling integers": self.integers}
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
        """int64 [slots]."""
        return self.integers[:, 0]

    @property
    def top_k(self) -> Tensor:
        """int64 [slots]; 0: off."""
        return self.integers[:, 1]

    @property
    def min_new_tokens(self) -> Tensor:
        """int64 [slots]."""
        return self.integers[:, 2]

    def allocate(self, plan: SamplerPlan) -> None:
        """Allocate the tables that a plan needs and that are not there yet; they stay where they are."""
        # Requests may be admitted in inference mode; a tensor made there could not be written to outside of
        # it.
        with torch.inference_mode(False):
            if plan.bias and self.bias is None:
                self.bias = self._zeros(torch.float32)
            if plan.min_tokens and self.banned is None:
                self.banned = self._zeros(torch.bool)
            if plan.penalties and self.prompt_seen is None:
                self.prompt_seen = self._zeros(torch.bool)
                self.output_counts = self._zeros(torch.int32)

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.max_batch, self.vocab_size, dtype=dtype, device=self.device)

    def _stage(self, values: Sequence[float] | Tensor, dtype: torch.dtype) -> Tensor:
        """On the host, in pinned memory where the device is CUDA.

        Torch's pinned allocator keeps a freed block until the copies that read it are done.
        """
        host = torch.as_tensor(values, dtype=dtype)
        return host.pin_memory() if self.device.type == "cuda" else host

    def _on_device(self, values: Sequence[float] | Tensor, dtype: torch.dtype) -> Tensor:
        return self._stage(values, dtype).to(self.device, non_blocking=True)

    def _ids(self, ids: Sequence[int]) -> Tensor:
        """int64 on the device. Ids without a logit are left out: they cannot be chosen (a model can embed
        more)."""
        host = torch.as_tensor(ids, dtype=torch.int64)
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
    ]


def _integer_row(params: ResolvedSampling) -> list[int]:
    return [params.seed, params.top_k, params.min_new_tokens]
