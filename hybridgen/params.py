"""What a request asks for: how its tokens are chosen, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hybridgen.errors import SamplingError, shown

MAX_LOGPROBS = 64
MAX_INT = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it stops.

    `None` in a field with a default from the model means: take the model's `generation_config`, else the
    value named in the field's description. Processors apply in this order: logit bias, repetition, presence
    and frequency penalty, minimum length, temperature, top-k, top-p, min-p (Hugging Face's order).

    Raises:
        SamplingError: a value is out of its range.
    """

    max_new_tokens: int | None = None
    """Tokens to generate at most. Else the model's `max_new_tokens`, else 128."""
    min_new_tokens: int = 0
    """End-of-sequence and stop token ids cannot be chosen before this many tokens."""
    temperature: float | None = None
    """0 takes the most likely token (greedy). Else the model's value if it samples, else 0."""
    top_k: int | None = None
    """Sample from the k most likely tokens (ties with the k-th stay in). 0: off."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens whose probability reaches p. 1: off."""
    min_p: float | None = None
    """Drop tokens less likely than min_p times the most likely one. 0: off."""
    repetition_penalty: float | None = None
    """Divide positive and multiply negative logits of tokens in prompt and output (CTRL, arXiv:1909.05858). 1: off."""
    presence_penalty: float = 0.0
    """Subtract this from the logit of each token that the output already has."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit for each time that the output has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; -inf bans a token."""
    seed: int | None = None
    """Draws depend on (seed, position) alone. Without one, a seed is drawn and reported in the completion."""
    n: int = 1
    """Completions per prompt; choice i draws with `seed + i`."""
    stop: Sequence[str] = ()
    """Strings that end the text; the text stops before the first of them. One string is taken as a list of one."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the request, besides the model's end-of-sequence ids."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence ids."""
    logprobs: int | None = None
    """Report the log-probability of each chosen token and of this many most likely ones (0: chosen only)."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, Sequence):
                raise SamplingError(f"{name}={shown(value)} is not a list; give a list")
            object.__setattr__(self, name, tuple(value))
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingError(
                f"logit_bias={shown(self.logit_bias)} is not a mapping; give a dict of token id to number"
            )
        _check_int("max_new_tokens", self.max_new_tokens, low=1, optional=True)
        _check_int("min_new_tokens", self.min_new_tokens, low=0)
        _check_real("temperature", self.temperature, low=0.0, what="0 is greedy, 1 the model's own distribution")
        _check_int("top_k", self.top_k, low=0, optional=True)
        _check_real("top_p", self.top_p, low=0.0, high=1.0, low_open=True, what="1 switches it off")
        _check_real("min_p", self.min_p, low=0.0, high=1.0, what="0 switches it off")
        _check_real("repetition_penalty", self.repetition_penalty, low=0.0, low_open=True, what="1 switches it off")
        _check_real("presence_penalty", self.presence_penalty, optional=False, what="0 switches it off")
        _check_real("frequency_penalty", self.frequency_penalty, optional=False, what="0 switches it off")
        _check_int("seed", self.seed, low=0, optional=True)
        _check_int("n", self.n, low=1)
        _check_int("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise SamplingError(f"stop holds {shown(text)}; give non-empty strings (ids go in stop_token_ids)")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, low=0)
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, low=0)
            if not _is_finite(bias) and not (isinstance(bias, float) and bias == -math.inf):
                raise SamplingError(
                    f"logit_bias[{token}]={shown(bias)}; give a finite number, or -inf to ban the token"
                )
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(f"{name}={shown(getattr(self, name))}; give True or False")
        limit = self.max_new_tokens
        if limit is not None and self.min_new_tokens > limit:
            raise SamplingError(f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={limit}; lower it")
        if self.n > 1 and self.temperature == 0:
            raise SamplingError(f"n={self.n} with temperature=0 gives equal texts; set a temperature or n=1")

    @classmethod
    def field_names(cls) -> frozenset[str]:
        """The names that `generate()` accepts as keywords for sampling."""
        return frozenset(f.name for f in fields(cls))


def _check_int(name: str, value: Any, *, low: int, high: int = MAX_INT, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise SamplingError(f"{name}={shown(value)} is not an integer; give one of at least {low}")
    if not low <= value <= high:
        raise SamplingError(f"{name}={shown(value)} is out of range; give an integer from {low} to {high}")


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer above the largest float
        return False


def _check_real(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    optional: bool = True,
    what: str,
) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not _is_finite(value):
        raise SamplingError(f"{name}={shown(value)} is not a finite number; {what}")
    if value < low or value > high or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise SamplingError(f"{name}={shown(value)} is outside {bracket}{low:g}, {high:g}]; {what}")
