"""Checks of a call's arguments that need neither a model nor torch."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from hybridgen.config import EngineConfig
from hybridgen.core import Completion, Score
from hybridgen.errors import ConfigError, PromptError, SamplingError, TokenizerError, shown
from hybridgen.hints import unknown
from hybridgen.params import SamplingParams

OnePrompt: TypeAlias = "str | Sequence[int] | Sequence[Mapping[str, Any]]"
"""Prompts that a type checker can tell to be one."""
ManyPrompts: TypeAlias = "Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[Mapping[str, Any]]]"
"""Prompts that a type checker can tell to be several. Of tensors, mappings and generators it cannot tell."""
Sampling: TypeAlias = "SamplingParams | Iterable[SamplingParams] | None"
"""For all prompts, or one for each."""


def sampling_per_prompt(count: int, sampling: Sampling, fields: dict[str, Any]) -> list[SamplingParams]:
    """One `SamplingParams` per prompt, with the fields set in all of them.

    Raises:
        SamplingError: a list of another length, something that is no `SamplingParams`, or a bad value.
    """
    check_keywords(fields, SamplingParams.field_names())
    listed = sampling_list(sampling)
    if listed is None:
        return [_params_of(fields)] * count
    given = listed if isinstance(listed, list) else [listed] * count
    for params in given:
        if not isinstance(params, SamplingParams):
            raise SamplingError(f"sampling holds {shown(params)}, which is no SamplingParams; give one per prompt")
    if len(given) != count:
        raise SamplingError(
            f"sampling has {len(given)} entries for {count} prompt(s); give one per prompt, or one for all"
        )
    if not fields:
        return given
    changed = {key: replace(params, **fields) for key, params in {id(params): params for params in given}.items()}
    return [changed[id(params)] for params in given]


def _params_of(fields: dict[str, Any]) -> SamplingParams:
    """Those fields as `SamplingParams`. Calls mostly have fields that an earlier one had, which were checked then."""
    plain = all(isinstance(value, (bool, int, float, str, type(None))) for value in fields.values())
    return _checked(**fields) if plain else SamplingParams(**fields)


@functools.lru_cache(maxsize=64, typed=True)
def _checked(**fields: Any) -> SamplingParams:
    return SamplingParams(**fields)


SCORES = SamplingParams(max_new_tokens=0, prompt_logprobs=1, temperature=0)
"""What a call of `score()` asks for: nothing new, and of each token whether it was the most likely."""


def scoring_pairs(
    prompts: tuple[list[Any], bool], completions: tuple[list[Any], bool] | None
) -> tuple[list[Any], bool]:
    """The prompts of a call of `score()`, each with its completion, and whether there is one alone.

    Args:
        prompts, completions: as `split_prompts` gives them: a list, and whether there was only one, not in a list. One
            prompt goes with each of a list of completions.

    Raises:
        PromptError: the numbers do not fit.
    """
    items, single = prompts
    if completions is None:
        return items, single
    ends, one = completions
    if single and not one:
        items = items * len(ends)
    if len(items) != len(ends) or (one and not single):
        raise PromptError(
            f"{'a' if one else len(ends)} completion(s) for {len(items)} prompt(s); give one for each, or one prompt "
            "for all"
        )
    return [{"prompt": item, "completion": end} for item, end in zip(items, ends, strict=True)], single and one


def scores_of(completions: list[Completion], single: bool) -> Any:
    """What `score()` returns.

    Raises:
        HybridgenError: the one request failed.
    """
    if single and completions[0].error is not None:
        raise completions[0].error
    scores = [Score.of(completion) for completion in completions]
    return scores[0] if single else scores


def sampling_list(sampling: Sampling) -> SamplingParams | list[SamplingParams] | None:
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


REFUSED = (PromptError, SamplingError, TokenizerError)
"""What a prompt is refused with before it runs."""


def returns_errors(errors: Any) -> bool:
    """Whether a call's `errors=` says that a prompt which is refused becomes a completion with its error.

    Raises:
        ConfigError: it is neither `"raise"` nor `"return"`.
    """
    if errors not in ("raise", "return"):
        raise ConfigError(f"errors={shown(errors)}; give 'raise', or 'return' for completions with their error")
    return bool(errors == "return")


def prompt_list(prompts: Any) -> Any:
    """A call's prompts in a form that can be read twice: an iterator becomes a list; its items are not checked."""
    return list(prompts) if isinstance(prompts, Iterator) else prompts


def is_text(prompt: Any) -> bool:
    """Whether a prompt is text or a chat, so that encoding it takes a tokenizer."""
    if type(prompt) in (list, tuple) and prompt and type(prompt[0]) is int:  # ids, as in most large calls
        return False
    if isinstance(prompt, str):
        return True
    if hasattr(prompt, "ndim"):  # an array or a tensor of ids
        return False
    if isinstance(prompt, Mapping):
        return True
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def check_keywords(given: Iterable[str], known: Collection[str]) -> None:
    """Raise for the first unknown keyword, with what to write instead (`hybridgen.hints`).

    Raises:
        ConfigError: a keyword is not known.
    """
    for name in given:
        if name in known:
            continue
        for owner, place in ((SamplingParams, "each call of generate()"), (EngineConfig, "what loads the model")):
            if name in owner.field_names():
                raise ConfigError(f"{name}= is a field of {owner.__name__}; give it to {place}, not here")
        raise ConfigError(unknown(name, known))


def end_streamer(streamer: Any) -> None:
    """Tell a call's streamer, if it has one, that nothing more comes: its reader waits for that, whatever happened."""
    if streamer is not None and hasattr(streamer, "end"):
        streamer.end()
