"""From a call's arguments to requests that are known to fit, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from hybridgen.arguments import check_keywords, sampling_list, sampling_per_prompt
from hybridgen.errors import ConfigError, PromptError, TokenizerError, shown
from hybridgen.loading import Checkpoint
from hybridgen.models.contexts import scaled_context
from hybridgen.params import SamplingParams
from hybridgen.sampling import ResolvedSampling, resolve
from hybridgen.text.prompts import encode_prompt

__all__ = ["Plan", "check_keywords", "context_limit", "plan_requests", "sampling_list", "sampling_per_prompt"]

SEED_RANGE = 2**63

UNKNOWN_CONTEXT = 4096
"""Tokens, for a model whose config names no limit."""


class Plan(NamedTuple):
    """One request: what `submit` takes."""

    prompt_ids: tuple[int, ...]
    sampling: ResolvedSampling
    prompt: int
    """Which prompt of the call."""
    choice: int
    """Which of its `n` completions."""


def plan_requests(
    prompts: list[Any],
    sampling: SamplingParams | Iterable[SamplingParams] | None,
    fields: dict[str, Any],
    checkpoint: Checkpoint,
    max_context: int,
    cache_tokens: int | None,
) -> list[Plan]:
    """Requests for a list of prompts.

    Args:
        checkpoint: what is known of the model; its weights need not be there yet.
        fields: `SamplingParams` fields that replace those of `sampling`.
        max_context: the longest prompt plus output.
        cache_tokens: positions that the KV cache holds; None while there is no cache yet.

    Raises:
        SamplingError, PromptError, TokenizerError: the first thing wrong with the call.
    """
    params = sampling_per_prompt(len(prompts), sampling, fields)
    plans = []
    for index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        ids = encode_prompt(
            prompt,
            index,
            tokenizer=checkpoint.tokenizer,
            tokenizer_problem=checkpoint.tokenizer_problem,
            vocab_size=checkpoint.vocab_size,
        )
        resolved = resolve(
            wanted, checkpoint.generation_config, checkpoint.eos_token_ids, checkpoint.vocab_size, len(ids)
        )
        if resolved.stop and checkpoint.tokenizer is None:
            whose = "" if wanted.stop else " (from the model's generation_config; stop=[] leaves it out)"
            raise TokenizerError(
                f"stop={shown(list(resolved.stop))}{whose} needs text and the model has no tokenizer "
                f"({checkpoint.tokenizer_problem}); use stop_token_ids, or pass tokenizer="
            )
        new = resolved.max_new_tokens
        if wanted.max_new_tokens is None:
            # A default gives way to the context; a number that the user gave does not.
            room = min(max_context, cache_tokens or max_context) - len(ids)
            new = max(1, min(new, room))
        _check_fits(index, len(ids), new, max_context, cache_tokens)
        if wanted.min_new_tokens is not None and wanted.min_new_tokens > new:
            limit, raised = ("context", "max_context") if len(ids) + new == max_context else ("KV cache", "kv_memory")
            raise PromptError(
                f"prompt {index} has {len(ids)} tokens, so the {limit} leaves room for {new} new ones, fewer than "
                f"min_new_tokens={resolved.min_new_tokens}; shorten the prompt, lower min_new_tokens or raise {raised}"
            )
        resolved = replace(resolved, max_new_tokens=new, min_new_tokens=min(resolved.min_new_tokens, new))
        plans += [
            Plan(ids, replace(resolved, seed=(resolved.seed + choice) % SEED_RANGE), index, choice)
            for choice in range(wanted.n)
        ]
    return plans


def context_limit(checkpoint: Checkpoint, requested: int | None) -> int:
    """The longest prompt plus output, in tokens: the user's limit, else the model's own.

    A user's limit may go as far as the model's rotary scaling does (`scaled_context`).

    Raises:
        ConfigError: the user's limit is above that.
    """
    limit = checkpoint.max_context
    if requested is None:
        return limit or UNKNOWN_CONTEXT
    if limit is not None:
        most = scaled_context(checkpoint.hf_config, limit)
        if requested > most:
            scaled = f" ({limit}, which its rotary scaling makes {most})" if most != limit else f" of {limit}"
            raise ConfigError(f"max_context={requested} is above the model's limit{scaled}; lower it")
    return requested


def _check_fits(index: int, prompt: int, new: int, max_context: int, cache_tokens: int | None) -> None:
    needed = prompt + new
    if needed > max_context:
        raise PromptError(
            f"prompt {index} has {prompt} tokens and max_new_tokens={new}: together {needed}, over the context of "
            f"{max_context}; shorten the prompt, lower max_new_tokens or raise max_context"
        )
    if cache_tokens is not None and needed > cache_tokens:
        raise PromptError(
            f"prompt {index} has {prompt} tokens and max_new_tokens={new}: together {needed}, more than the KV cache "
            f"of {cache_tokens} positions can ever hold; raise kv_memory or lower max_new_tokens"
        )
