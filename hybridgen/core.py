"""The vocabulary: what comes out of an engine. `params` has what goes in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from hybridgen.display import html_table, short
from hybridgen.fields import about, described


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token id or a stop string."""
    LENGTH = "length"
    """`max_new_tokens` were generated."""
    CANCELLED = "cancelled"
    """The caller cancelled it, or Ctrl-C arrived."""
    ERROR = "error"
    """It failed; `Completion.error` says why."""


@described
@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities of one position, of the distribution that `SamplingParams.logprobs_of` names."""

    token_id: int = field(metadata=about("The chosen token."))
    logprob: float = field(metadata=about("Its natural-log probability."))
    top: tuple[tuple[int, float], ...] = field(
        default=(), metadata=about("The most likely (token id, log-probability) pairs, most likely first.")
    )


@described
@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Wall-clock times of one request as its host saw them, in seconds.

    A token's time is when the host could read it, so a figure includes the run-ahead of the engine.
    """

    queue: float | None = field(
        metadata=about("From submission to the launch of its first prefill; None where there was none.")
    )
    ttft: float | None = field(
        metadata=about("From submission to its first token (time to first token); None where there was none.")
    )
    total: float = field(metadata=about("From submission to its end."))
    token_times: tuple[float, ...] = field(default=(), metadata=about("Seconds from submission to each token."))
    read_bandwidth: float | None = field(
        default=None,
        metadata=about(
            "Bytes per second that its decode steps read at least: the weights and this request's own "
            "keys and values, over the mean time from its first token to its last. None with fewer than "
            "two tokens, and where the bytes depend on the tokens (experts)."
        ),
    )
    mbu: float | None = field(
        default=None,
        metadata=about(
            "That bandwidth over the fastest read of the device (model bandwidth utilisation); None on a CPU."
        ),
    )

    def tpot(self, quantile: float = 0.5) -> float | None:
        """Time per output token after the first, at a quantile (nearest rank); None with fewer than two tokens."""
        gaps = sorted(b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False))
        if not gaps:
            return None
        return gaps[min(len(gaps) - 1, max(0, math.ceil(quantile * len(gaps)) - 1))]

    @property
    def tpot_p50(self) -> float | None:
        return self.tpot(0.50)

    @property
    def tpot_p95(self) -> float | None:
        return self.tpot(0.95)

    @property
    def tpot_p99(self) -> float | None:
        return self.tpot(0.99)


class GraphEventKind(StrEnum):
    """What happened to a recorded step."""

    CAPTURED = "captured"
    EVICTED = "evicted"
    FAILED = "failed"
    """Its capture failed, or its replay was found wrong; such steps run without it."""


@described
@dataclass(frozen=True, slots=True, kw_only=True)
class GraphEvent:
    """What `EngineConfig.on_graph_event` is called with."""

    kind: GraphEventKind = field(metadata=about("`captured`, `evicted` or `failed`."))
    phase: str = field(metadata=about("`prefill` or `decode`."))
    tokens: int = field(metadata=about("Its bucket."))
    rows: int = field(metadata=about("Rows that it samples."))
    message: str = field(metadata=about("What happened, in words."))


@described
@dataclass(frozen=True, slots=True)
class StepSummary:
    """How a number of a request's steps ran."""

    phase: str = field(metadata=about("`prefill` or `decode`."))
    kind: str = field(
        metadata=about(
            "Who computed its logits and how it was launched, such as `layers, compiled` or `persistent, "
            "cuda graph`. The first is `layers` (the model's own), `chain`, `persistent` or `rows`; the second "
            "`eager`, `compiled`, `direct`, `cuda graph`, `cudagraph tree` or `stand-in` (a graph's place "
            "on a CPU)."
        )
    )
    reason: str = field(metadata=about("Why they ran that way."))
    count: int = field(metadata=about("How many steps of the request ran so."))


@described
@dataclass(frozen=True, kw_only=True, repr=False)
class Completion:
    """The result of one prompt."""

    text: str = field(metadata=about("The generated text, without the prompt; empty where the model has no tokenizer."))
    token_ids: tuple[int, ...] = field(
        metadata=about("The generated ids, without the prompt; an end-of-sequence or stop token is included.")
    )
    prompt: Any = field(
        default=None, metadata=about("The prompt, where it was text or a chat, as it was given; None for token ids.")
    )
    prompt_token_ids: tuple[int, ...] = field(metadata=about("The prompt's ids, as they were fed."))
    truncated_tokens: int = field(
        default=0, metadata=about("Tokens that `SamplingParams.truncate_prompt` cut from the beginning of the prompt.")
    )
    finish_reason: FinishReason = field(metadata=about("`stop`, `length`, `cancelled` or `error`."))
    seed: int = field(metadata=about("The seed of its draws (unused by greedy requests)."))
    timing: Timing = field(metadata=about("Its times, as its host saw them."))
    steps: tuple[StepSummary, ...] = field(default=(), metadata=about("How its steps ran, with reasons."))
    logprobs: tuple[TokenLogprob, ...] | None = field(
        default=None,
        metadata=about("One entry for each generated token, where `SamplingParams.logprobs` asks for them."),
    )
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = field(
        default=None,
        metadata=about(
            "One entry for each token of the prompt, where they were asked for. None for the first, which nothing "
            "comes before; for a prompt with a `completion`, for all tokens before that."
        ),
    )
    stop_match: str | int | None = field(default=None, metadata=about("The stop string or token id that ended it."))
    cached_tokens: int = field(
        default=0,
        metadata=about("Tokens of the prompt whose keys and values were there already (`EngineConfig.prefix_cache`)."),
    )
    drafted_tokens: int = field(
        default=0, metadata=about("Drafts that its steps checked (`EngineConfig.speculation`).")
    )
    accepted_tokens: int = field(default=0, metadata=about("Those of them that were right: so many steps fewer."))
    weights_version: int = field(
        default=0, metadata=about("How often `Engine.weights_changed()` had been called when it began.")
    )
    error: Exception | None = field(
        default=None,
        compare=False,  # exceptions are equal to themselves alone, and a pickled completion should equal its original
        metadata=about("Set when `finish_reason` is `error`."),
    )
    choices: tuple[Completion, ...] = field(
        default=(),
        metadata=about(
            "All `n` completions of the prompt, this one's twin first; empty in these themselves, and in those of a "
            "stream, which come one by one."
        ),
    )

    @classmethod
    def refused(cls, error: Exception, prompt: Any = None, seed: int | None = None) -> Completion:
        """That of a prompt that was not run, with its error; see `errors="return"` of `Engine.generate`."""
        made = cls(
            text="",
            token_ids=(),
            prompt=prompt,
            prompt_token_ids=(),
            finish_reason=FinishReason.ERROR,
            seed=seed or 0,
            timing=Timing(queue=None, ttft=None, total=0.0),
            error=error,
        )
        return replace(made, choices=(made,))

    @property
    def tokens_per_step(self) -> float | None:
        """Mean tokens that one of its decode steps brought: 1, and above where drafts were right. None where it had no
        decode step, or the steps are not known."""
        steps = sum(step.count for step in self.steps if step.phase == "decode")
        return (steps + self.accepted_tokens) / steps if steps else None

    @property
    def cumulative_logprob(self) -> float | None:
        """Natural-log probability of all generated tokens together; None where `logprobs` was not asked for."""
        return None if self.logprobs is None else math.fsum(item.logprob for item in self.logprobs)

    def _summary(self) -> list[str]:
        more = [f"{len(self.choices)} choices"] if len(self.choices) > 1 else []
        why = [str(self.finish_reason)] if self.error is None else [f"{type(self.error).__name__}: {self.error}"]
        return [f"{len(self.token_ids)} tokens", *why, f"{self.timing.total:.3g} s", *more]

    def __repr__(self) -> str:
        return f"Completion({short(self.text)!r}, {', '.join(self._summary())})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the prompt and the texts below each other, with a line about each."""
        shown = self.choices or (self,)
        rows = [(", ".join(choice._summary()[:3]), choice.text) for choice in shown]
        return html_table([("prompt", self.prompt), *rows] if isinstance(self.prompt, str) else rows)


@described
@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a model finds given tokens behind a prompt."""

    token_ids: tuple[int, ...] = field(metadata=about("The tokens that were scored."))
    logprobs: tuple[float, ...] = field(
        metadata=about(
            "Natural-log probability of each, given all tokens before it; of the model's own distribution. Empty where "
            "it failed."
        )
    )
    is_greedy: tuple[bool, ...] = field(
        metadata=about("Whether each was the most likely token, the one that greedy decoding takes.")
    )
    prompt_token_ids: tuple[int, ...] = field(metadata=about("The tokens before the first scored one."))
    cached_tokens: int = field(
        default=0,
        metadata=about("Tokens of the prompt whose keys and values were there already (`EngineConfig.prefix_cache`)."),
    )
    steps: tuple[StepSummary, ...] = field(default=(), metadata=about("How its steps ran, with reasons."))
    error: Exception | None = field(default=None, metadata=about("Why it failed, in a list; one alone raises it."))

    @property
    def sum(self) -> float:
        """Natural-log probability of all scored tokens together; NaN where it failed."""
        return math.nan if self.error is not None else math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """`exp(-sum / number of tokens)`; NaN where it failed."""
        if self.error is not None:
            return math.nan
        try:
            return math.exp(-self.sum / len(self.logprobs))
        except OverflowError:
            return math.inf

    @classmethod
    def of(cls, completion: Completion) -> Score:
        """From a completion whose prompt was scored with `prompt_logprobs` of at least 1."""
        entries = completion.prompt_logprobs or ()
        start = sum(item is None for item in entries)
        found = [item for item in entries if item is not None and completion.error is None]
        return cls(
            token_ids=completion.prompt_token_ids[start:],
            logprobs=tuple(item.logprob for item in found),
            is_greedy=tuple(item.token_id == item.top[0][0] for item in found),
            prompt_token_ids=completion.prompt_token_ids[:start],
            cached_tokens=completion.cached_tokens,
            steps=completion.steps,
            error=completion.error,
        )


@described
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One token of a stream. The texts of a stream's events, joined, are the completion's text."""

    token_id: int | None = field(metadata=about("None in a last event that only brings text held back or the end."))
    text: str = field(metadata=about("New text; empty while a character or a possible stop string is incomplete."))
    index: int = field(metadata=about("Which of the stream's prompts."))
    choice: int = field(default=0, metadata=about("Which of the prompt's `n` completions."))
    logprob: TokenLogprob | None = field(
        default=None, metadata=about("Its log-probability, where `SamplingParams.logprobs` asks for it.")
    )
    completion: Completion | None = field(default=None, metadata=about("Set in the last event."))
