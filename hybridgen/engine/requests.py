"""A request, from `submit` to its completion, and how a call's arguments become requests that fit."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from hybridgen.arguments import REFUSED, is_text, sampling_per_prompt
from hybridgen.cache import NO_PAGES, RequestPages
from hybridgen.core import Completion
from hybridgen.engine.alternatives import Alternative, completions_of
from hybridgen.engine.output import RequestOutput
from hybridgen.errors import ConfigError, PromptError, TokenizerError, shown
from hybridgen.execution.plan import Hidden
from hybridgen.loading import Checkpoint
from hybridgen.models.contexts import scaled_context
from hybridgen.params import GRAMMARS, SamplingParams, choice_seed
from hybridgen.sampling.grammar import Constraint, constraint_of
from hybridgen.sampling.resolve import ResolvedSampling, counts_prompt, draw_seed, resolve
from hybridgen.speculation.pace import RowPace
from hybridgen.text.prompts import encode_pair, encode_prompt, is_pair

logger = logging.getLogger(__name__)

UNKNOWN_CONTEXT = 4096
"""Tokens, for a model whose config names no limit."""


class RequestState(Enum):
    """Where a request is on its way."""

    NEW = auto()
    """Made and checked, not submitted."""
    WAITING = auto()
    """Submitted; it has no slot yet."""
    RUNNING = auto()
    """It has a slot and pages."""
    FINISHED = auto()
    """It ended, and holds nothing any more."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """One request: what was asked for, what the scheduler knows of it, and its output."""

    prompt_ids: array[int]
    """32 bits each (`"i"`), as `encode_prompt` makes them."""
    sampling: ResolvedSampling
    index: int = 0
    """Which prompt of the call."""
    choice: int = 0
    """Which of the prompt's `n` completions."""
    scored_from: int | None = None
    """The first token of the prompt whose log-probability is wanted; None: of no token."""
    prompt: Any = None
    """The text or chat that the ids are of."""
    truncated: int = 0
    """How many ids were cut from the beginning of the prompt."""
    hidden: Hidden | None = None
    """Hidden states of its prompt that are wanted; such a request generates nothing."""
    alternatives: tuple[Alternative, ...] = ()
    """Other prompts that are scored with it."""
    output: RequestOutput = field(init=False)
    """Its tokens, text, events and completion. `StepLoop.submit` sets it."""
    state: RequestState = field(default=RequestState.NEW, init=False)
    prefill_ids: array[int] = field(init=False)
    """What its prefill feeds: the prompt, and when it is prefilled again also what was generated before. Without the
    prompt's last token where nothing is generated behind it."""
    prefilled: int = field(default=0, init=False)
    """How many of those were launched."""
    patient: bool = field(default=False, init=False)
    """Whether it is one of a list that is waited for as a whole: prefills of others may go before its tokens."""
    slot: int = field(default=-1, init=False)
    pages: RequestPages = field(default=NO_PAGES, init=False)
    pace: RowPace | None = field(default=None, init=False)
    """What its drafts have shown; None where nobody drafts."""
    _launched: int = field(default=0, init=False)
    """Generated tokens, without those of the steps that its current batch has counted."""
    _batch: Batch | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        feeds_all = self.sampling.max_new_tokens or self.hidden is not None
        self.prefill_ids = self.prompt_ids if feeds_all else self.prompt_ids[:-1]

    @property
    def completion(self) -> Completion | None:
        """Its result; None until it ended."""
        return None if self.state is RequestState.NEW else self.output.completion

    @property
    def launched(self) -> int:
        """Generated tokens, those included that the host has not read.

        A launched step counts one token, until the host has read how many it brought (`accept`).
        """
        return self._launched if self._batch is None else self._launched + self._batch.steps

    @property
    def capacity(self) -> int:
        """Positions that it may ever use."""
        new = self.sampling.max_new_tokens
        return len(self.prompt_ids) + new if new else len(self.prefill_ids)

    @property
    def length(self) -> int:
        """Tokens so far, launched ones included."""
        return len(self.prompt_ids) + self.launched

    def advance(self, tokens: int) -> bool:
        """Note that so many more tokens of its prefill are launched; whether they are the last, which sample one."""
        self.prefilled += tokens
        last = self.prefilled == len(self.prefill_ids) and self.sampling.max_new_tokens > 0
        self._launched += last
        return last

    def targets(self, length: int) -> Sequence[int]:
        """Those scored tokens of the prompt that the next `length` tokens of its prefill tell the probabilities of."""
        if self.scored_from is None:
            return ()
        start = self.prefilled + 1
        return self.prompt_ids[max(start, self.scored_from) : start + length]

    def other_targets(self, length: int) -> tuple[int, ...]:
        """Last tokens of its alternatives, where the next `length` tokens of its prefill are the last."""
        ends = self.prefilled + length == len(self.prefill_ids)
        return tuple(each.last for each in self.alternatives) if ends else ()

    @property
    def unscored(self) -> int:
        """How many of the next tokens of its prefill come before those that tell scored tokens' probabilities."""
        return 0 if self.scored_from is None else max(0, self.scored_from - 1 - self.prefilled)

    @property
    def shareable(self) -> int:
        """Positions at its beginning that need not be computed if they are there already."""
        if self.hidden is not None:
            return 0
        return len(self.prefill_ids) - 1 if self.scored_from is None else self.scored_from - 1

    def restart(self, generated: Sequence[int]) -> None:
        """Prefill the prompt again, with all that was generated behind it. What was scored stays so."""
        self.prefill_ids = self.prompt_ids + array("i", generated)
        self.prefilled = 0
        self.scored_from = None

    def admitted(self, slot: int, pages: RequestPages) -> None:
        """It gets a slot and pages. What it shares with others is not fed again."""
        self.state = RequestState.RUNNING
        self.slot, self.pages, self.prefilled = slot, pages, pages.cached

    def back(self) -> None:
        """It waits again, and has generated nothing yet."""
        self.state = RequestState.WAITING
        self.pages, self.prefilled, self._launched = NO_PAGES, 0, 0

    def accept(self, count: int) -> None:
        """A step brought `count` tokens; one was counted when it was launched."""
        self._launched += count - 1
        if self._batch is not None:
            self._batch.first_positions += count - 1

    def join(self, batch: Batch) -> None:
        """From now on its decode steps are those that this batch counts."""
        self._batch = batch

    def leave(self) -> None:
        """It is in no batch any more."""
        self._launched, self._batch = self.launched, None


@dataclass(eq=False, slots=True)
class Batch:
    """The requests of a decode call. While they stay the same, all steps have the same object."""

    requests: tuple[Request, ...]
    slots: tuple[int, ...]
    """Theirs, in the same order. The runner, too, knows the batch by this object."""
    first_positions: int
    """Tokens of all its requests together, without those of its own steps."""
    steps: int = 0
    """Decode steps that were launched for it."""

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Batch:
        slots = tuple(request.slot for request in requests)
        return cls(tuple(requests), slots, sum(request.length for request in requests))

    @property
    def positions(self) -> int:
        """Cached positions of all its requests together, once the last launched step has run."""
        return self.first_positions + self.steps * len(self.slots)


def make_requests(
    prompts: list[Any],
    sampling: SamplingParams | Iterable[SamplingParams] | None,
    fields: dict[str, Any],
    checkpoint: Checkpoint,
    max_context: int,
    cache_tokens: int | None,
    refused: dict[int, Completion] | None = None,
) -> list[Request]:
    """Requests for a list of prompts.

    Args:
        checkpoint: what is known of the model; its weights need not be there yet.
        fields: `SamplingParams` fields that replace those of `sampling`.
        max_context: the longest prompt plus output.
        cache_tokens: positions that the KV cache holds; None while there is no cache yet.
        refused: takes a completion with the error of each prompt that cannot be run; None: such an error is raised.

    Raises:
        SamplingError, PromptError, TokenizerError: the first thing wrong with the call.
    """
    params = sampling_per_prompt(len(prompts), sampling, fields)
    requests: list[Request] = []
    how, counts = checkpoint.encoding, counts_prompt(checkpoint.generation_config)
    known = _Known()
    for index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        try:
            requests += _make(index, prompt, wanted, checkpoint, how, counts, max_context, cache_tokens, known)
        except REFUSED as error:
            if refused is None:
                raise
            refused[index] = Completion.refused(error, prompt if is_text(prompt) else None, wanted.seed)
    return requests


def read_grammar(wanted: SamplingParams, checkpoint: Checkpoint) -> Constraint | None:
    """The grammar that parameters ask for, if any. One that was read is kept for a while, so that a server reads it on
    another thread than that of its steps, before it makes the requests.

    Raises:
        SamplingError, TokenizerError, ConfigError: see `constraint_of`.
    """
    if all(getattr(wanted, kind) is None for kind in GRAMMARS):
        return None
    eos, vocab = checkpoint.eos_token_ids, checkpoint.vocab_size
    return constraint_of(wanted, checkpoint.tokenizer, checkpoint.tokenizer_problem, vocab, eos)


class _Known:
    """What parameters of a call were resolved to, by them and the length of the prompt: most prompts have the same
    parameters, or others in their seeds alone."""

    def __init__(self) -> None:
        self._by_identity: dict[tuple[int, int], ResolvedSampling] = {}
        self._last: dict[int, tuple[dict[str, Any], ResolvedSampling]] = {}

    def get(self, wanted: SamplingParams, length: int) -> ResolvedSampling | None:
        """Resolved parameters with the seed that they ask for, or one that is drawn."""
        resolved = self._by_identity.get((id(wanted), length))
        if resolved is None:
            before, resolved = self._last.get(length, (None, None))
            if before is None or resolved is None or vars(wanted) | {"seed": None} != before:
                return None
        elif wanted.seed is not None or resolved.greedy:
            return resolved
        return replace(resolved, seed=draw_seed() if wanted.seed is None else wanted.seed)

    def add(self, wanted: SamplingParams, length: int, resolved: ResolvedSampling) -> None:
        self._by_identity[id(wanted), length] = resolved
        self._last[length] = vars(wanted) | {"seed": None}, resolved


def _make(
    index: int,
    prompt: Any,
    wanted: SamplingParams,
    checkpoint: Checkpoint,
    how: dict[str, Any],
    counts: bool,
    max_context: int,
    cache_tokens: int | None,
    known: _Known,
) -> list[Request]:
    """A request for each completion of a prompt; see `make_requests`.

    Args:
        how: what `encode_prompt` has to know.
        counts: whether the model has lengths that count the prompt.
        known: parameters that were resolved before in this call.
    """
    start, text = 0, is_text(prompt)
    if text and is_pair(prompt):
        ids, start = encode_pair(prompt, index, **how)
    else:
        ids = encode_prompt(prompt, index, **how)
    cut = 0 if wanted.truncate_prompt is None else max(0, len(ids) - wanted.truncate_prompt)
    if cut:
        ids = ids[cut:]
    told = prompt if text else None
    length = len(ids) if counts else min(len(ids), 2)
    resolved = known.get(wanted, length)
    if resolved is None:
        eos, vocab = checkpoint.eos_token_ids, checkpoint.vocab_size
        resolved = resolve(wanted, checkpoint.generation_config, eos, vocab, len(ids))
        constraint = read_grammar(wanted, checkpoint)
        if constraint is not None:
            resolved = replace(resolved, constraint=constraint)
        known.add(wanted, length, resolved)
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
    check_fits(index, len(ids), new, max_context, cache_tokens)
    if wanted.min_new_tokens is not None and wanted.min_new_tokens > new:
        limit, raised = ("context", "max_context") if len(ids) + new == max_context else ("KV cache", "kv_memory")
        raise PromptError(
            f"prompt {index} has {len(ids)} tokens, so the {limit} leaves room for {new} new ones, fewer than "
            f"min_new_tokens={resolved.min_new_tokens}; shorten the prompt, lower min_new_tokens or raise {raised}"
        )
    if new != resolved.max_new_tokens or new < resolved.min_new_tokens:
        resolved = replace(resolved, max_new_tokens=new, min_new_tokens=min(resolved.min_new_tokens, new))
    scored_from = _scored_from(index, len(ids), start, cut, resolved)
    if wanted.n == 1:
        return [Request(ids, resolved, index, 0, scored_from, prompt=told, truncated=cut)]
    drawn = [resolved, *(replace(resolved, seed=choice_seed(resolved.seed, i)) for i in range(1, wanted.n))]
    return [
        Request(ids, sampling, index, choice, scored_from, prompt=told, truncated=cut)
        for choice, sampling in enumerate(drawn)
    ]


def collect(requests: Iterable[Request], refused: Mapping[int, Completion] | None = None) -> list[Completion]:
    """One completion per prompt, in order: the first choice, which holds all of them.

    Args:
        refused: those of prompts that were not run.
    """
    choices: dict[int, list[Completion]] = {}
    others: dict[int, Completion] = {}
    for request in requests:
        if request.completion is None:
            raise RuntimeError("a request was collected before its end")
        choices.setdefault(request.index, []).append(request.completion)
        if request.alternatives:
            others |= completions_of(request.completion, request.alternatives, request.output.other_scores)
    found = {index: replace(group[0], choices=tuple(group)) for index, group in choices.items()}
    return [completion for _, completion in sorted({**found, **others, **(refused or {})}.items())]


def results(requests: list[Request], single: bool, refused: dict[int, Completion] | None) -> Any:
    """What `generate()` returns.

    Args:
        single: there is one prompt alone.
        refused: prompts that could not be run, where their errors are returned.

    Raises:
        HybridgenError: the one prompt failed, and errors are not returned.
    """
    completions = collect(requests, refused)
    if single and refused is None and completions[0].error is not None:
        raise completions[0].error
    failed = sum(completion.error is not None for completion in completions)
    if failed:
        logger.warning("%d of %d requests failed; see Completion.error", failed, len(completions))
    return completions[0] if single else completions


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


def _scored_from(index: int, prompt: int, start: int, cut: int, sampling: ResolvedSampling) -> int | None:
    """The first token of a prompt that is scored; None where none is.

    Args:
        start: tokens before its completion; 0 where it has none.
        cut: tokens that were cut from its beginning.
    """
    if sampling.prompt_logprobs is None:
        if start:
            raise PromptError(f"prompt {index} has a completion to score; score() does that, or prompt_logprobs=0")
        return None
    if start and start <= cut:
        raise PromptError(
            f"prompt {index} has {start} tokens before its completion and truncate_prompt cuts {cut}; raise it so that "
            "one is left to score the completion by"
        )
    if prompt == 1 and sampling.max_new_tokens == 0:
        raise PromptError(
            f"prompt {index} has one token, and none before it to score it by; put one in front, such as the "
            "tokenizer's beginning of text"
        )
    return max(start - cut, 1)


def check_fits(
    index: int, prompt: int, new: int, max_context: int, cache_tokens: int | None, *, fed: int | None = None
) -> None:
    """Check that a prompt and its output fit.

    Args:
        fed: positions that are used; None: all, but for a last one behind which nothing is generated.

    Raises:
        PromptError: they do not.
    """
    needed = (prompt + new if new else prompt - 1) if fed is None else fed
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
