"""From what the caller asked for, and what the model suggests, to parameters without gaps."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from hybridgen.errors import SamplingError, shown
from hybridgen.params import SamplingParams
from hybridgen.sampling.grammar import Constraint

DEFAULT_MAX_NEW_TOKENS = 128
MAX_SEQUENCE_TOKENS = 8192
"""Tokens of all sequences of two and more in a request's `sequence_bias` and `bad_words_ids` together."""
_BAN = -float("inf")
_NEVER = -1
_FILTERS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""What a model may say only where it samples, and what switches it off."""
_LISTS = {
    "sequence_bias": "sequence_bias",
    "bad_words_ids": "bad_words_ids",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "forced_bos_token_id": "forced_bos_token_id",
    "forced_eos_token_id": "forced_eos_token_id",
    "stop": "stop_strings",
}
"""Fields that hold lists, and what a `generation_config` calls them."""


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
    typical_p: float
    """1: off."""
    epsilon_cutoff: float
    """0: off."""
    eta_cutoff: float
    """0: off."""
    repetition_penalty: float
    """1: off."""
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    """All that is added to logits whatever the text is: bias of ids and of sequences of one, bans as -inf."""
    allowed_token_ids: tuple[int, ...]
    """All other ids are banned, and have no bias; empty: none is."""
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...]
    """Sequences of two ids and more, bad words with -inf."""
    no_repeat_ngram_size: int
    """0: off."""
    begin_suppress_tokens: tuple[int, ...]
    begin: int
    """Which generated token these cannot be, from 0."""
    forced_first: tuple[int, ...]
    """The first generated token is one of these; empty: any."""
    forced_last: tuple[int, ...]
    """Token `max_new_tokens` is one of these; empty: any."""
    logits_processors: tuple[Callable[..., Any], ...]
    constraint: Constraint | None = None
    """What the text keeps to."""
    stopping_criteria: tuple[Callable[..., Any], ...]
    seed: int
    n: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    """All ids that end the request: the model's end-of-sequence ids (unless ignored) and the caller's."""
    ignore_eos: bool
    logprobs: int | None
    logprobs_of: str
    prompt_logprobs: int | None
    skip_special_tokens: bool
    cache_salt: str | None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether its logits depend on which tokens came so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def reads_history(self) -> bool:
        """Whether its logits depend on the order in which tokens came."""
        return bool(self.sequence_bias or self.logits_processors) or self.no_repeat_ngram_size > 0

    @property
    def has_own(self) -> bool:
        """Whether it brings functions that change its logits, or a grammar."""
        return bool(self.logits_processors) or self.constraint is not None

    @property
    def cuts(self) -> bool:
        """Whether it has typical-p, epsilon or eta cutoff."""
        return (self.typical_p, self.epsilon_cutoff, self.eta_cutoff) != (1.0, 0.0, 0.0)


def resolve(
    params: SamplingParams,
    generation_config: Any,
    eos_token_ids: Iterable[int] | None,
    vocab_size: int,
    prompt_length: int = 0,
) -> ResolvedSampling:
    """Fill in what the caller left open.

    A field that was given stays. Otherwise it is the model's; but temperature and filters (top-k, top-p, min-p,
    typical-p, epsilon and eta cutoff) are the model's only if its `generation_config` samples (`do_sample`), else
    greedy and off. A missing model's value is 128 tokens, temperature 1, and off for the rest. That differs from
    Hugging Face in two points: `generate()` applies `top_k=50` to every sampling call that does not set it; here it
    applies only where the model's `generation_config` or the caller says so. And it ends after 20 tokens where nobody
    says how many.

    Args:
        generation_config: a `transformers.GenerationConfig`, anything with such attributes, or None.
        eos_token_ids: the model's end-of-sequence ids; those outside the vocabulary are left out.
        vocab_size: columns of the logits.
        prompt_length: tokens of the prompt. The model's `max_length` and `min_length` count them.

    Raises:
        SamplingError: a token id outside the vocabulary, `n` above 1 where the model is greedy,
            `min_new_tokens` above the model's `max_new_tokens`, more sequences than `MAX_SEQUENCE_TOKENS`, forced
            tokens that are all suppressed, or a `generation_config` value out of range.
    """
    params = _with_model_defaults(params, generation_config, vocab_size, prompt_length)
    _check_all_ids(params, vocab_size)
    eos = () if params.ignore_eos else tuple(i for i in eos_token_ids or () if 0 <= i < vocab_size)
    bias, sequences = _biases(params, eos)
    first = _forced("forced_bos_token_id", params) if prompt_length == 1 else ()
    values: dict[str, Any] = {f.name: getattr(params, f.name, None) for f in fields(ResolvedSampling)}
    values.update(
        logit_bias=tuple(bias.items()),
        allowed_token_ids=tuple(dict.fromkeys(params.allowed_token_ids or ())),
        sequence_bias=sequences,
        begin=1 if first else 0,
        forced_first=first,
        forced_last=_forced("forced_eos_token_id", params),
        stop_token_ids=tuple(dict.fromkeys((*eos, *params.stop_token_ids))),
        top_k=0 if params.top_k is None or params.top_k >= vocab_size else params.top_k,
        seed=draw_seed() if params.seed is None else params.seed,
    )
    return ResolvedSampling(**values)


def draw_seed() -> int:
    """A seed for a request that has none."""
    return secrets.randbits(63)


def counts_prompt(generation_config: Any) -> bool:
    """Whether the model has lengths that count the prompt. Else `resolve` asks only whether a prompt has one token."""
    return any(getattr(generation_config, name, None) is not None for name in ("max_length", "min_length"))


def _with_model_defaults(
    params: SamplingParams, generation_config: Any, vocab_size: int, prompt_length: int
) -> SamplingParams:
    """`params` with the fields that a model may set, and the model's values validated as the caller's are."""
    told = False

    def from_model(name: str, missing: Any, *, applies: bool = True) -> Any:
        nonlocal told
        value = getattr(generation_config, name, None) if applies else None
        told = told or value is not None
        return missing if value is None else value

    samples = bool(from_model("do_sample", False))
    defaults = {
        "max_new_tokens": from_model("max_new_tokens", None),
        "temperature": from_model("temperature", 1.0) if samples else 0.0,
        "repetition_penalty": from_model("repetition_penalty", 1.0),
        "no_repeat_ngram_size": from_model("no_repeat_ngram_size", 0),
    }
    defaults |= {name: from_model(name, off, applies=samples) for name, off in _FILTERS.items()}
    defaults |= {name: from_model(theirs, ()) or () for name, theirs in _LISTS.items()}
    for name in ("forced_bos_token_id", "forced_eos_token_id"):  # where 0 is an id
        defaults[name] = from_model(name, ())
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        # Some files name ids that only a relative's vocabulary has: nothing to suppress, as for Hugging Face.
        if isinstance(defaults[name], (list, tuple)):
            defaults[name] = tuple(i for i in defaults[name] if not isinstance(i, int) or i < vocab_size)
    if defaults["max_new_tokens"] is None:
        limit = from_model("max_length", None)
        defaults["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS if limit is None else _after_prompt(limit, prompt_length, 1)
    least = from_model("min_new_tokens", None)
    if least is None:
        least = _after_prompt(from_model("min_length", 0), prompt_length, 0)
    missing = {name: value for name, value in defaults.items() if getattr(params, name) is None}
    if not told and params.min_new_tokens is None and params.n == 1:  # nothing that could be wrong
        filled = object.__new__(SamplingParams)
        vars(filled).update(vars(params), **missing, min_new_tokens=0)
        return filled
    try:
        if params.min_new_tokens is not None:
            return replace(params, **missing)
        if type(least) is int and least == 0:  # as nearly always: each replacement checks all fields
            return replace(params, **missing, min_new_tokens=0)
        # As in Hugging Face, the model's minimum gives way to the limit.
        replace(SamplingParams(), min_new_tokens=least)
        filled = replace(params, **missing)
        return replace(filled, min_new_tokens=min(least, cast(int, filled.max_new_tokens)))
    except SamplingError as error:
        raise SamplingError(f"{error} (from the model's generation_config where you gave none)") from None


def _after_prompt(length: Any, prompt_length: int, least: int) -> Any:
    """What is left of a length of prompt and output; a value that is no length comes back, to be refused."""
    if isinstance(length, bool) or not isinstance(length, int) or length < least:
        return length
    return max(least, length - prompt_length)


def _biases(
    params: SamplingParams, eos: tuple[int, ...]
) -> tuple[dict[int, float], tuple[tuple[tuple[int, ...], float], ...]]:
    """The bias of ids, and that of sequences of two ids and more."""
    words = [word for word in params.bad_words_ids or () if len(word) > 1 or word[0] not in eos]
    sequences = [*_pairs(params), *((word, _BAN) for word in words)]
    bias = {token: float(value) for token, value in params.logit_bias.items()}
    for ids, value in sequences:
        if len(ids) == 1:
            bias[ids[0]] = bias.get(ids[0], 0.0) + value
    bias |= dict.fromkeys(params.suppress_tokens or (), _BAN)
    if params.allowed_token_ids is not None:
        allowed = set(params.allowed_token_ids)
        bias = {token: value for token, value in bias.items() if token in allowed}
        if all(bias.get(token) == _BAN for token in allowed):
            raise SamplingError(
                f"allowed_token_ids={shown(list(params.allowed_token_ids))} are all banned by suppress_tokens, "
                "bad_words_ids or logit_bias, so that no token is left; allow another"
            )
    longer = tuple((tuple(ids), value) for ids, value in sequences if len(ids) > 1)
    total = sum(len(ids) for ids, _ in longer)
    if total > MAX_SEQUENCE_TOKENS:
        raise SamplingError(
            f"sequence_bias and bad_words_ids have {total} tokens in sequences of two and more; give at most "
            f"{MAX_SEQUENCE_TOKENS}"
        )
    return bias, longer


def _pairs(params: SamplingParams) -> tuple[tuple[tuple[int, ...], float], ...]:
    """`sequence_bias` as `SamplingParams` keeps it, whatever it was given as."""
    return cast(tuple[tuple[tuple[int, ...], float], ...], params.sequence_bias or ())


def _forced(name: str, params: SamplingParams) -> tuple[int, ...]:
    """The ids that are forced, without those that are suppressed, which comes after, or not allowed."""
    ids = tuple(getattr(params, name) or ())
    suppressed = set(params.suppress_tokens or ())
    left = tuple(token for token in ids if token not in suppressed)
    if ids and not left:
        raise SamplingError(f"{name}={list(ids)} is in suppress_tokens too, so that no token is left; leave one out")
    if params.allowed_token_ids is not None:
        left = tuple(token for token in left if token in params.allowed_token_ids)
        if ids and not left:
            raise SamplingError(f"{name}={list(ids)} is not in allowed_token_ids, so that no token is left; add it")
    return left


def _check_all_ids(params: SamplingParams, vocab_size: int) -> None:
    for name in (
        "stop_token_ids", "logit_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
        "forced_eos_token_id", "allowed_token_ids",
    ):  # fmt: skip
        _check_ids(name, getattr(params, name) or (), vocab_size)
    _check_ids("sequence_bias", (i for ids, _ in _pairs(params) for i in ids), vocab_size)
    _check_ids("bad_words_ids", (i for ids in params.bad_words_ids or () for i in ids), vocab_size)


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        listed = f"{outside}" if len(outside) <= 8 else f"{outside[:8]} and {len(outside) - 8} more"
        raise SamplingError(
            f"{name} holds {listed}, outside the vocabulary of {vocab_size} ids; give ids below {vocab_size}"
        )
