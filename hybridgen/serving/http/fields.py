"""Fields of a request's body: what each means here, what is refused, and what is ignored."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hybridgen.errors import SamplingError, shown
from hybridgen.params import SamplingParams
from hybridgen.serving.http.errors import ApiError

logger = logging.getLogger(__name__)

NAMED = 64
"""Names of ignored fields that are counted one by one; the rest are counted together."""
MOST_STOPS = 256


class _Number(NamedTuple):
    """A number of the body and the sampling field that it sets."""

    field: str
    low: float
    high: float
    whole: bool = False


_NUMBERS = {
    "temperature": _Number("temperature", 0, math.inf),
    "top_p": _Number("top_p", 0, 1),
    "presence_penalty": _Number("presence_penalty", -2, 2),
    "frequency_penalty": _Number("frequency_penalty", -2, 2),
    "seed": _Number("seed", -(2**63), 2**63 - 1, True),
    "n": _Number("n", 1, 1024, True),
    # Not OpenAI's; clients send them as `extra_body`.
    "top_k": _Number("top_k", -1, 2**31, True),
    "min_p": _Number("min_p", 0, 1),
    "typical_p": _Number("typical_p", 0, 1),
    "repetition_penalty": _Number("repetition_penalty", 0, math.inf),
    "min_tokens": _Number("min_new_tokens", 0, 2**31, True),
    "no_repeat_ngram_size": _Number("no_repeat_ngram_size", 0, 2**31, True),
}
GRAMMARS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""How vLLM's clients name what the text keeps to, inside `structured_outputs` or behind `guided_`."""
_SWITCHES = {"ignore_eos": "ignore_eos", "skip_special_tokens": "skip_special_tokens"}
SAMPLING = frozenset(
    {
        *_NUMBERS,
        *_SWITCHES,
        *(f"guided_{name}" for name in GRAMMARS),
        "structured_outputs",
        "stop",
        "stop_token_ids",
        "logit_bias",
        "cache_salt",
    }
)
"""Fields that `sampling_of` reads."""

REFUSED: dict[str, Any] = {
    "suffix": None,
    "best_of": 1,
    "use_beam_search": False,
    "length_penalty": 1,
    "early_stopping": False,
    "functions": None,
    "function_call": None,
    "audio": None,
    "prediction": None,
    "web_search_options": None,
    "prompt_logprobs": None,
    "previous_response_id": None,
    "conversation": None,
    "background": False,
    "include": None,
    "prompt_cache_options": None,
    "min_length": None,
    "allowed_token_ids": None,
    "bad_words": None,
    # Of the other routes.
    "prompt": None,
    "messages": None,
    "input": None,
    "instructions": None,
    "max_tokens": None,
    "max_completion_tokens": None,
    "max_output_tokens": None,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "text": {"format": {"type": "text"}},
    "tools": None,
    "continue_final_message": False,
}
"""Fields that promise something which a route that does not read them does not do, and the value that asks for
nothing."""

QUIET = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "verbosity",
        "model",
    }
)
"""Fields that change nothing in the text, ignored without a word."""


class Ignored:
    """Counts fields that nobody knows, and warns of each once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, names: Iterable[str]) -> None:
        """Count these."""
        for name in names:
            short = name[:64]
            if short not in self.counts:
                if len(self.counts) >= NAMED:
                    short = "(others)"
                else:
                    logger.warning("requests have the field %s, which is not known and ignored", shown(short))
            self.counts[short] += 1


class Body:
    """The object that a request sent; fields that are null count as left out."""

    def __init__(self, values: Any) -> None:
        """
        Raises:
            ApiError: it is no object.
        """
        if not isinstance(values, dict):
            raise ApiError(f"the body is {shown(values)}, not a JSON object; send an object")
        self.values: dict[str, Any] = {name: value for name, value in values.items() if value is not None}

    def check_known(self, known: Iterable[str], ignored: Ignored) -> None:
        """Refuse fields that promise what is not done here, and note those that nobody knows.

        Raises:
            ApiError: a field is refused.
        """
        names = {*known, *SAMPLING}
        for name, idle in REFUSED.items():
            if name in self.values and name not in names and self.values[name] not in (idle, [], {}, ""):
                raise ApiError(
                    f"{name} is not supported by this route; leave it out", param=name, code="unsupported_parameter"
                )
        ignored.note(self.values.keys() - names - QUIET - REFUSED.keys())

    def wrong(self, name: str, wanted: str) -> ApiError:
        """The error of a field with a wrong value."""
        return ApiError(f"{name}={shown(self.values.get(name))}; give {wanted}", param=name, code="invalid_value")

    def require(self, name: str) -> None:
        """
        Raises:
            ApiError: the field is left out.
        """
        if name not in self.values:
            raise ApiError(f"{name} is missing; send it", param=name, code="missing_required_parameter")

    def text(self, name: str, default: str = "") -> str:
        """A string.

        Raises:
            ApiError: it is something else.
        """
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def switch(self, name: str, default: bool = False) -> bool:
        """True or false.

        Raises:
            ApiError: it is something else.
        """
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str, low: float, high: float, *, whole: bool = False) -> Any:
        """A number between two, or None.

        Raises:
            ApiError: it is something else.
        """
        value = self.values.get(name)
        if value is None:
            return None
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        if whole and good and isinstance(value, float):
            good = value.is_integer()
        if not good:
            kind = "a whole number" if whole else "a number"
            raise self.wrong(name, f"{kind} from {low:g} to {high:g}" if high < 2**31 else f"{kind} of {low:g} or more")
        return int(value) if whole else value

    def table(self, name: str) -> dict[str, Any]:
        """An object, empty where the field is left out.

        Raises:
            ApiError: it is something else.
        """
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def items(self, name: str) -> list[Any]:
        """A list, empty where the field is left out.

        Raises:
            ApiError: it is something else.
        """
        value = self.values.get(name, [])
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value


def schema_of(body: Body, wanted: dict[str, Any], param: str) -> dict[str, Any]:
    """The sampling field that a format of OpenAI's asks for; none for text.

    Args:
        wanted: `response_format`, or the `format` of a response's text.

    Raises:
        ApiError: it is of no such form.
    """
    kind = wanted.get("type", "text")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    inside = wanted.get("json_schema", wanted)
    schema = inside.get("schema") if isinstance(inside, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        raise body.wrong(param, "text, json_object, or json_schema with a schema")
    return {"json_schema": schema}


def _grammar_of(body: Body) -> dict[str, Any]:
    table = body.table("structured_outputs")
    found = {name: value for name, value in table.items() if value is not None}
    found |= {name: body.values[f"guided_{name}"] for name in GRAMMARS if f"guided_{name}" in body.values}
    unknown = found.keys() - GRAMMARS.keys()
    if unknown:
        raise ApiError(
            f"structured_outputs has {shown(min(unknown))}; give one of {', '.join(GRAMMARS)}",
            param="structured_outputs",
            code="unsupported_parameter",
        )
    return {GRAMMARS[name]: value for name, value in found.items()}


def sampling_of(
    body: Body,
    *,
    max_new_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    json_schema: Any = None,
) -> SamplingParams:
    """How a request's tokens are chosen. What is left out takes the model's own default.

    Args:
        logprobs: log-probabilities of how many tokens besides the chosen one; None: of none.
        prompt_logprobs: the same for the prompt's tokens.
        json_schema: what a format of OpenAI's asks for, see `schema_of`.

    Raises:
        ApiError: a field has a wrong value.
    """
    values = _grammar_of(body)
    if json_schema is not None:
        values["json_schema"] = json_schema
    for name, number in _NUMBERS.items():
        found = body.number(name, number.low, number.high, whole=number.whole)
        if found is not None:
            values[number.field] = found
    if "seed" in values:
        values["seed"] %= 2**63  # OpenAI's may be negative
    if values.get("top_k") == -1:
        values["top_k"] = 0  # how vLLM writes: all of them
    for name, field in _SWITCHES.items():
        if name in body.values:
            values[field] = body.switch(name)
    stop = body.values.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise body.wrong("stop", "a string or a list of strings")
    if len(stops) > MOST_STOPS:
        raise body.wrong("stop", f"at most {MOST_STOPS} strings")
    if kept := [each for each in stops if each]:
        values["stop"] = kept
    if "stop_token_ids" in body.values:
        values["stop_token_ids"] = body.items("stop_token_ids")
    if "logit_bias" in body.values:
        values["logit_bias"] = _biases(body, body.table("logit_bias"))
    if "cache_salt" in body.values:
        values["cache_salt"] = body.text("cache_salt")
    try:
        return SamplingParams(
            max_new_tokens=max_new_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **values
        )
    except SamplingError as error:
        raise ApiError(str(error), code="invalid_value") from None


def _biases(body: Body, table: Mapping[str, Any]) -> dict[int, float]:
    biases = {}
    for key, value in table.items():
        if not key.isdecimal() or len(key) > 18 or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise body.wrong("logit_bias", "an object of token ids (as strings) and numbers")
        # OpenAI's -100 bans a token.
        biases[int(key)] = -math.inf if value <= -100 else float(value)
    return biases
