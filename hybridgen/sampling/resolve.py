"""From what the caller asked for, and what the model suggests, to parameters without gaps."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from hybridgen.errors import SamplingError
from hybridgen.params import SamplingParams

DEFAULT_MAX_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class ResolvedSampling:
    """`SamplingParams` with every field set; see there for what they mean."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    """0: greedy."""
    top_k: int
    """0: off; otherwise below the size of the vocabulary."""
    top_p: float
    """1: off."""
    min_p: float
    """0: off."""
    repetition_penalty: float
    """1: off."""
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int
    n: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    """All ids that end the request: the model's end-of-sequence ids (unless ignored) and the caller's."""
    ignore_eos: bool
    logprobs: int | None
    skip_special_tokens: bool

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether its logits depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def resolve(
    params: SamplingParams, generation_config: Any, eos_token_ids: Iterable[int] | None, vocab_size: int
) -> ResolvedSampling:
    """Fill in what the caller left open.

    A field that was given stays. Otherwise `max_new_tokens` and `repetition_penalty` are the model's;
    `temperature`, `top_k`, `top_p` and `min_p` are the model's if its `generation_config` samples
    (`do_sample`), else greedy and off. A missing model's value is 128 tokens, temperature 1, and off for the
    rest. That differs from Hugging Face in one point: `generate()` applies `top_k=50` to every sampling call
    that does not set it; here it applies only where the model's `generation_config` or the caller says so.
    Other fields of `generation_config` are not read.

    Args:
        generation_config: a `transformers.GenerationConfig`, anything with such attributes, or None.
        eos_token_ids: the model's end-of-sequence ids; those outside the vocabulary are left out.
        vocab_size: columns of the logits.

    Raises:
        SamplingError: a token id outside the vocabulary, `n` above 1 where the model is greedy,
            `min_new_tokens` above the model's `max_new_tokens`, or a `generation_config` value out of range.
    """
    params = _with_model_defaults(params, generation_config)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    eos = () if params.ignore_eos else tuple(i for i in eos_token_ids or () if 0 <= i < vocab_size)
    values: dict[str, Any] = {f.name: getattr(params, f.name) for f in fields(ResolvedSampling)}
    values.update(
        logit_bias=tuple((token, float(bias)) for token, bias in params.logit_bias.items()),
        stop_token_ids=tuple(dict.fromkeys((*eos, *params.stop_token_ids))),
        top_k=0 if params.top_k is None or params.top_k >= vocab_size else params.top_k,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
    )
    return ResolvedSampling(**values)


def _with_model_defaults(params: SamplingParams, generation_config: Any) -> SamplingParams:
    """`params` with the fields that a model may set, and the model's values validated as the caller's are."""

    def from_model(name: str, missing: float, *, applies: bool = True) -> Any:
        value = getattr(generation_config, name, None) if applies else None
        return missing if value is None else value

    samples = bool(from_model("do_sample", False))
    defaults = {
        "max_new_tokens": from_model("max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
        "temperature": from_model("temperature", 1.0) if samples else 0.0,
        "top_k": from_model("top_k", 0, applies=samples),
        "top_p": from_model("top_p", 1.0, applies=samples),
        "min_p": from_model("min_p", 0.0, applies=samples),
        "repetition_penalty": from_model("repetition_penalty", 1.0),
    }
    missing = {name: value for name, value in defaults.items() if getattr(params, name) is None}
    try:
        return replace(params, **missing)
    except SamplingError as error:
        raise SamplingError(f"{error} (from the model's generation_config where you gave none)") from None


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise SamplingError(
            f"{name} holds {outside}, outside the vocabulary of {vocab_size} ids; give ids below {vocab_size}"
        )
