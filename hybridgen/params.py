"""What a request asks for: how its tokens are chosen, and when it stops."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hybridgen.errors import SamplingError, shown
from hybridgen.fields import about, described
from hybridgen.hints import unknown

MAX_LOGPROBS = 64
MAX_INT = 2**63 - 1
MAX_GRAMMAR = 2**16
"""Characters of a grammar."""
GRAMMARS = ("json_schema", "regex", "grammar", "choice")
"""Fields that say which texts are allowed; a request has one of them at most."""


@described
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it stops.

    `None` in a field with a default from the model means: take the model's `generation_config`, else the
    value named in the field's description. Processors apply in Hugging Face's order: logit and sequence bias,
    repetition, presence and frequency penalty, repeated n-grams, bad words, minimum length, forced tokens,
    suppressed tokens, temperature, top-k, top-p, min-p, typical-p, epsilon and eta cutoff.

    Raises:
        SamplingError: a value is out of its range, or a field is unknown.
    """

    max_new_tokens: int | None = field(
        default=None,
        metadata=about(
            "Tokens to generate at most. Else the model's `max_new_tokens`, else 128. 0 with "
            "`prompt_logprobs`: none, the prompt is scored alone."
        ),
    )
    min_new_tokens: int | None = field(
        default=None,
        metadata=about(
            "End-of-sequence and stop token ids cannot be chosen before this many tokens. Else the "
            "model's `min_new_tokens`, or what its `min_length` leaves after the prompt."
        ),
    )
    temperature: float | None = field(
        default=None,
        metadata=about("0 takes the most likely token (greedy). Else the model's value if it samples, else 0."),
    )
    top_k: int | None = field(
        default=None, metadata=about("Sample from the k most likely tokens (ties with the k-th stay in). 0: off.")
    )
    top_p: float | None = field(
        default=None,
        metadata=about("Sample from the smallest set of most likely tokens whose probability reaches p. 1: off."),
    )
    min_p: float | None = field(
        default=None, metadata=about("Drop tokens less likely than min_p times the most likely one. 0: off.")
    )
    typical_p: float | None = field(
        default=None,
        metadata=about(
            "Of the tokens ordered by how far their surprisal is from the entropy, keep the nearest ones "
            "whose probability reaches this (arXiv:2202.00666). 1: off."
        ),
    )
    epsilon_cutoff: float | None = field(
        default=None,
        metadata=about("Drop tokens less likely than this; the most likely one stays (arXiv:2210.15191). 0: off."),
    )
    eta_cutoff: float | None = field(
        default=None,
        metadata=about(
            "Drop tokens less likely than `min(eta, sqrt(eta) * exp(-entropy))`; the most likely one "
            "stays (arXiv:2210.15191). 0: off."
        ),
    )
    repetition_penalty: float | None = field(
        default=None,
        metadata=about(
            "Divide positive and multiply negative logits of tokens in prompt and output (CTRL, "
            "arXiv:1909.05858). 1: off."
        ),
    )
    presence_penalty: float = field(
        default=0.0, metadata=about("Subtract this from the logit of each token that the output already has.")
    )
    frequency_penalty: float = field(
        default=0.0, metadata=about("Subtract this from a token's logit for each time that the output has it.")
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata=about("Added to the logits of these token ids; -inf bans a token.")
    )
    sequence_bias: Mapping[Sequence[int], float] | Sequence[tuple[Sequence[int], float]] | None = field(
        default=None,
        metadata=about(
            "Added to the logit of a sequence's last token where the text (prompt included) ends with the "
            "ones before it. Pairs of token ids and a number, or a dict; -inf bans a sequence. An empty "
            "list: none."
        ),
    )
    bad_words_ids: Sequence[Sequence[int]] | None = field(
        default=None,
        metadata=about(
            "Sequences of token ids that cannot be completed. One that is an end-of-sequence id alone "
            "does not count, as in Hugging Face. An empty list: none."
        ),
    )
    suppress_tokens: Sequence[int] | None = field(
        default=None, metadata=about("Token ids that cannot be chosen. An empty list: none.")
    )
    allowed_token_ids: Sequence[int] | None = field(
        default=None,
        metadata=about(
            "Only these token ids can be chosen, of which an end-of-sequence id is one only if it is named. None: any."
        ),
    )
    begin_suppress_tokens: Sequence[int] | None = field(
        default=None, metadata=about("Token ids that cannot be chosen first. An empty list: none.")
    )
    no_repeat_ngram_size: int | None = field(
        default=None, metadata=about("No sequence of this many tokens comes twice, the prompt included. 0: off.")
    )
    forced_bos_token_id: int | Sequence[int] | None = field(
        default=None,
        metadata=about(
            "The first token, after a prompt of one token. One id, or a list of which one is chosen; an "
            "empty list: none."
        ),
    )
    forced_eos_token_id: int | Sequence[int] | None = field(
        default=None,
        metadata=about(
            "The last token, where `max_new_tokens` are generated. One id, or a list of which one is "
            "chosen; an empty list: none."
        ),
    )
    logits_processors: Sequence[Callable[..., Any]] = field(
        default=(),
        metadata={
            **about(
                "Functions of (token ids so far, int64 [n]; logits, float32 [vocab]) that return logits, called with "
                "this request's own row, on the device; or transformers' `LogitsProcessor` objects. After all "
                "processors above, before temperature and filters. Not for a server."
            ),
            "functions": True,
        },
    )
    stopping_criteria: Sequence[Callable[..., Any]] = field(
        default=(),
        metadata={
            **about(
                "transformers' stopping criteria, or functions like them: called after each token with (ids, int64 "
                "[1, n] on the CPU; None) they return whether the request ends. Not for a server."
            ),
            "functions": True,
        },
    )
    seed: int | None = field(
        default=None,
        metadata=about(
            "Draws depend on (seed, position) alone. Without one, a seed is drawn and reported in the completion."
        ),
    )
    n: int = field(
        default=1,
        metadata=about("Completions per prompt. The first draws with `seed`, each other with a seed made of it."),
    )
    truncate_prompt: int | None = field(
        default=None,
        metadata=about(
            "Keep this many tokens at the end of a longer prompt; `Completion.truncated_tokens` says how many were cut "
            "from its beginning, the tokenizer's own first token among them. Else one that is too long is an error."
        ),
    )
    stop: Sequence[str] | None = field(
        default=None,
        metadata=about(
            "Strings that end the text; the text stops before the first of them. They are looked for in "
            "what the model wrote, special tokens included, also where those are left out of the text. "
            "One string is taken as a list of one. Else the model's `stop_strings`; an empty list: none."
        ),
    )
    stop_token_ids: Sequence[int] = field(
        default=(), metadata=about("Token ids that end the request, besides the model's end-of-sequence ids.")
    )
    ignore_eos: bool = field(default=False, metadata=about("Go on after the model's end-of-sequence ids."))
    logprobs: int | None = field(
        default=None,
        metadata=about(
            "Report the log-probability of each chosen token and of this many most likely ones (0: chosen only)."
        ),
    )
    logprobs_of: str = field(
        default="model",
        metadata=about(
            "`model`: log-probabilities of the model's own distribution, before any processor. `sampled`: "
            "of the distribution that the token was drawn from, after all processors, temperature and "
            "filters (what was left out has -inf); for greedy requests, after all processors."
        ),
    )
    prompt_logprobs: int | None = field(
        default=None,
        metadata=about(
            "Report the log-probability of each token of the prompt and of this many most likely ones (0: the "
            "prompt's only), of the model's own distribution; see `Completion.prompt_logprobs`."
        ),
    )
    json_schema: Mapping[str, Any] | str | None = field(
        default=None,
        metadata=about(
            "The text is JSON that this schema allows (an object, or its text). Needs the extra `grammar`, as the "
            "next three fields do; at most one of the four is given. The text ends where it is complete."
        ),
    )
    regex: str | None = field(default=None, metadata=about("The whole text matches this regular expression."))
    grammar: str | None = field(
        default=None, metadata=about("The text follows this grammar, in llguidance's form of Lark.")
    )
    choice: Sequence[str] | None = field(default=None, metadata=about("The text is one of these."))
    skip_special_tokens: bool = field(default=True, metadata=about("Leave special tokens out of the text."))
    cache_salt: str | None = field(
        default=None,
        metadata=about(
            "Share cached prefixes with requests of the same salt alone. Who can time requests can tell "
            "what others have asked before; a salt for each user keeps them apart."
        ),
    )

    def __new__(cls, *_: Any, **given: Any) -> SamplingParams:
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise SamplingError(unknown(name, cls.field_names()))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(self, name)
            if isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, name, (value,))
        for name in _LISTS:
            value = getattr(self, name)
            if value is None and name not in ("stop_token_ids", *_FUNCTIONS):
                continue
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise SamplingError(f"{name}={shown(value)} is not a list; give a list")
            object.__setattr__(self, name, tuple(value))
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingError(
                f"logit_bias={shown(self.logit_bias)} is not a mapping; give a dict of token id to number"
            )
        if self.sequence_bias is not None:
            object.__setattr__(self, "sequence_bias", _sequence_bias(self.sequence_bias))
        if self.bad_words_ids is not None:
            words = tuple(_sequence_of_ids("bad_words_ids", word) for word in self.bad_words_ids)
            object.__setattr__(self, "bad_words_ids", words)
        self._check_numbers()
        self._check_lists()
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(f"{name}={shown(getattr(self, name))}; give True or False")
        self._check_grammars()
        if self.cache_salt is not None and not isinstance(self.cache_salt, str):
            raise SamplingError(f"cache_salt={shown(self.cache_salt)} is not text; give a string, or None for no salt")
        if self.logprobs_of not in ("model", "sampled"):
            raise SamplingError(f"logprobs_of={shown(self.logprobs_of)}; give 'model' or 'sampled'")
        if self.allowed_token_ids == ():
            raise SamplingError("allowed_token_ids=[] leaves no token; give at least one id, or None for any")
        limit, least = self.max_new_tokens, self.min_new_tokens
        if limit is not None and least is not None and least > limit:
            raise SamplingError(f"min_new_tokens={least} is above max_new_tokens={limit}; lower it")
        if limit == 0 and self.prompt_logprobs is None:
            raise SamplingError(
                "max_new_tokens=0 generates nothing; give at least 1, or prompt_logprobs to score prompts"
            )
        if self.n > 1 and self.prompt_logprobs is not None:
            raise SamplingError(f"n={self.n} with prompt_logprobs would score the prompt n times; score it with n=1")
        if self.n > 1 and self.temperature == 0:
            raise SamplingError(f"n={self.n} with temperature=0 gives equal texts; set a temperature or n=1")

    def _check_numbers(self) -> None:
        off = "0 switches it off"
        _check_int("max_new_tokens", self.max_new_tokens, low=0, optional=True)
        _check_int("min_new_tokens", self.min_new_tokens, low=0, optional=True)
        _check_real("temperature", self.temperature, low=0.0, what="0 is greedy, 1 the model's own distribution")
        _check_int("top_k", self.top_k, low=0, optional=True)
        _check_real("top_p", self.top_p, low=0.0, high=1.0, low_open=True, what="1 switches it off")
        _check_real("min_p", self.min_p, low=0.0, high=1.0, what=off)
        _check_real("typical_p", self.typical_p, low=0.0, high=1.0, low_open=True, what="1 switches it off")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            _check_real(name, getattr(self, name), low=0.0, high=1.0, high_open=True, what=off)
        _check_real("repetition_penalty", self.repetition_penalty, low=0.0, low_open=True, what="1 switches it off")
        _check_real("presence_penalty", self.presence_penalty, optional=False, what=off)
        _check_real("frequency_penalty", self.frequency_penalty, optional=False, what=off)
        _check_int("no_repeat_ngram_size", self.no_repeat_ngram_size, low=0, optional=True)
        _check_int("seed", self.seed, low=0, optional=True)
        _check_int("n", self.n, low=1)
        for name in ("logprobs", "prompt_logprobs"):
            _check_int(name, getattr(self, name), low=0, high=MAX_LOGPROBS, optional=True)
        _check_int("truncate_prompt", self.truncate_prompt, low=1, optional=True)

    def _check_grammars(self) -> None:
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise SamplingError(f"{' and '.join(given)} are given; give one of {', '.join(GRAMMARS)}")
        for name in given:
            value = getattr(self, name)
            text = value
            if name == "choice":
                if not value or not all(isinstance(each, str) and each for each in value):
                    raise SamplingError(f"choice={shown(value)}; give a list of texts that are not empty")
                text = "".join(value)
            elif name == "json_schema":
                text = _json_text(name, value)
            elif not isinstance(value, str) or not value:
                raise SamplingError(f"{name}={shown(value)}; give a text that is not empty")
            if len(text) > MAX_GRAMMAR:
                raise SamplingError(f"{name} has {len(text)} characters, over the limit of {MAX_GRAMMAR}; shorten it")

    def _check_lists(self) -> None:
        for text in self.stop or ():
            if not isinstance(text, str) or not text:
                raise SamplingError(f"stop holds {shown(text)}; give non-empty strings (ids go in stop_token_ids)")
        for name in _FUNCTIONS:
            for function in getattr(self, name):
                if not callable(function):
                    raise SamplingError(f"{name} holds {shown(function)}, which cannot be called; give functions")
        for name in _ID_LISTS:
            for token in getattr(self, name) or ():
                _check_int(name, token, low=0)
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, low=0)
            if not _is_bias(bias):
                raise SamplingError(
                    f"logit_bias[{token}]={shown(bias)}; give a finite number, or -inf to ban the token"
                )

    @classmethod
    def field_names(cls) -> frozenset[str]:
        """The names that `generate()` accepts as keywords for sampling."""
        return frozenset(f.name for f in fields(cls))


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of a prompt's `n` completions: `seed` itself for the first.

    The others are a hash of both (SplitMix64's finaliser of Steele et al., "Fast splittable pseudorandom number
    generators", 2014), so that the completions of `seed + 1` are not those of `seed` again.
    """
    if choice == 0:
        return seed
    value = (seed + choice * 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return (value ^ (value >> 31)) % (MAX_INT + 1)


def row_seed(seed: int | None, id: Any) -> int:
    """The seed of a row of a data set, made of the run's seed (None: 0) and the row's id, a JSON value: the same on
    every machine, in every share and at every try."""
    text = json.dumps([seed or 0, id], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


_ID_LISTS = (
    "stop_token_ids",
    "suppress_tokens",
    "allowed_token_ids",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
_FUNCTIONS = ("logits_processors", "stopping_criteria")
_LISTS = ("stop", "choice", "bad_words_ids", *_ID_LISTS, *_FUNCTIONS)


def _json_text(name: str, value: Any) -> str:
    """A JSON schema as text."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        if not isinstance(json.loads(text), dict):
            raise ValueError("it is no object")
    except (TypeError, ValueError, RecursionError) as error:
        raise SamplingError(f"{name}={shown(value)} is no JSON schema: {error}") from None
    return text


def _sequence_bias(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Pairs of ids and bias; of equal ids the last pair counts, as in a dict."""
    if not isinstance(value, (Mapping, Sequence)) or isinstance(value, str):
        raise SamplingError(f"sequence_bias={shown(value)} is no list; give pairs of token ids and a number")
    found: dict[tuple[int, ...], float] = {}
    for pair in value.items() if isinstance(value, Mapping) else value:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise SamplingError(f"sequence_bias holds {shown(pair)}; give pairs of token ids and a number")
        ids = _sequence_of_ids("sequence_bias", pair[0])
        if not _is_bias(pair[1]):
            raise SamplingError(
                f"sequence_bias has {shown(pair[1])} for {shown(list(ids))}; give a finite number, or -inf to ban it"
            )
        found[ids] = float(pair[1])
    return tuple(found.items())


def _sequence_of_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise SamplingError(f"{name} holds {shown(value)}; give non-empty lists of token ids")
    for token in value:
        _check_int(name, token, low=0)
    return tuple(value)


def _check_int(name: str, value: Any, *, low: int, high: int = MAX_INT, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise SamplingError(f"{name}={shown(value)} is not an integer; give one of at least {low}")
    if not low <= value <= high:
        raise SamplingError(f"{name}={shown(value)} is out of range; give an integer from {low} to {high}")


def _is_bias(value: Any) -> bool:
    """Whether it can be added to a logit: finite, or -inf."""
    return not isinstance(value, bool) and (_is_finite(value) or (isinstance(value, float) and value == -math.inf))


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
    high_open: bool = False,
    optional: bool = True,
    what: str,
) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not _is_finite(value):
        raise SamplingError(f"{name}={shown(value)} is not a finite number; {what}")
    if value < low or value > high or (low_open and value == low) or (high_open and value == high):
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise SamplingError(f"{name}={shown(value)} is outside {left}{low:g}, {high:g}{right}; {what}")
