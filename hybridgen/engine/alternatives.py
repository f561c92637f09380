"""Scored prompts that differ in their last token alone run as one request: all of them are read off the same logits.

Answers A, B, C and D behind a question are such prompts, as is every set of completions of one token. lm-evaluation-
harness does the same for its Hugging Face model (`logits_cache` of `lm_eval.models.huggingface`, version 0.4.13).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hybridgen.core import Completion, TokenLogprob

MOST = 15
"""Alternatives of a request, so that with its own last token they fit whatever part of a prefill call may be scored."""


class Alternative(NamedTuple):
    """A prompt that is another one but for its last token."""

    last: int
    """That token."""
    place: int
    """Which prompt of the call it is."""
    prompt: Any
    """The text or chat that its ids are of."""


def merged(requests: Sequence[Any]) -> list[Any]:
    """The requests without those that became an alternative of an earlier one.

    Args:
        requests: new ones (`Request`), whose prompts are scored and which generate nothing.
    """
    first: dict[Hashable, Any] = {}
    kept = []
    for request in requests:
        wanted = request.sampling.prompt_logprobs, request.sampling.cache_salt
        key = (request.prefill_ids.tobytes(), request.scored_from, request.truncated, wanted)
        before = first.get(key)
        if before is None or len(before.alternatives) == MOST:
            first[key] = request
            kept.append(request)
        else:
            before.alternatives += (Alternative(request.prompt_ids[-1], request.index, request.prompt),)
    return kept


def completions_of(
    completion: Completion, alternatives: Sequence[Alternative], scores: Sequence[TokenLogprob]
) -> dict[int, Completion]:
    """The completion of each alternative, by the number of its prompt.

    Args:
        completion: of the request that ran.
        scores: of the alternatives' last tokens; none where the request ended before they were read.
    """
    found = {}
    for number, each in enumerate(alternatives):
        ids, logprobs = (*completion.prompt_token_ids[:-1], each.last), completion.prompt_logprobs
        if scores and logprobs is not None:
            logprobs = (*logprobs[:-1], scores[number])
        one = replace(
            completion,
            prompt=each.prompt,
            prompt_token_ids=ids,
            prompt_logprobs=logprobs,
            cached_tokens=len(ids) - 1,  # none of it was computed for this prompt
        )
        found[each.place] = replace(one, choices=(one,))
    return found
