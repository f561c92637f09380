"""What a request asks for: how its tokens are chosen, and when it stops. Checks of a call's arguments.

`SamplingParams` is what a caller gives; `resolve()` fills in what was left open with what the model suggests. Nothing
here needs a model or torch.
"""

from __future__ import annotations

import difflib
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hybridgen.errors import ConfigError, SamplingError, shown

DEFAULT_MAX_NEW_TOKENS = 128
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


def sampling_per_prompt(
    count: int, sampling: SamplingParams | Iterable[SamplingParams] | None, fields: dict[str, Any]
) -> list[SamplingParams]:
    """One `SamplingParams` per prompt, with the fields set in all of them.

    Raises:
        SamplingError: a list of another length, something that is no `SamplingParams`, or a bad value.
    """
    check_keywords(fields, SamplingParams.field_names())
    listed = sampling_list(sampling)
    given = listed if isinstance(listed, list) else [listed or SamplingParams()] * count
    for params in given:
        if not isinstance(params, SamplingParams):
            raise SamplingError(f"sampling holds {shown(params)}, which is no SamplingParams; give one per prompt")
    if len(given) != count:
        raise SamplingError(
            f"sampling has {len(given)} entries for {count} prompt(s); give one per prompt, or one for all"
        )
    return [replace(params, **fields) for params in given] if fields else given


def sampling_list(
    sampling: SamplingParams | Iterable[SamplingParams] | None,
) -> SamplingParams | list[SamplingParams] | None:
    """A call's `sampling=` in a form that can be read twice: an iterator becomes a list; its items are not checked.

    Raises:
        SamplingError: it is nothing that can hold `SamplingParams`.
    """
    if sampling is None or isinstance(sampling, (SamplingParams, list)):
        return sampling
    if isinstance(sampling, (str, bytes, Mapping)) or not isinstance(sampling, Iterable):
        raise SamplingError(
            f"sampling={shown(sampling)} is not a SamplingParams; give SamplingParams(...), a list with one per "
            "prompt, or its fields as keywords"
        )
    return list(sampling)


def check_keywords(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise for the first unknown keyword, naming the nearest known one.

    Raises:
        ConfigError: a keyword is not known.
    """
    names = sorted(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}"
            raise ConfigError(f"unknown keyword {shown(name)}; {hint}")


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
