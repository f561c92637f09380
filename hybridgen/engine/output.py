"""From a request's tokens to its text, events and completion."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hybridgen.core import Completion, FinishReason, StepSummary, Timing, TokenEvent, TokenLogprob
from hybridgen.errors import HybridgenError, RequestError, described
from hybridgen.sampling.own import criteria_met
from hybridgen.sampling.resolve import ResolvedSampling
from hybridgen.telemetry.traffic import Traffic
from hybridgen.text.detokenize import IncrementalDetokenizer, hidden_texts
from hybridgen.text.stops import StopChecker

logger = logging.getLogger(__name__)

StepKind = tuple[str, str, str]
"""How a step ran: its phase, kind and reason, see `core.StepSummary`."""


class RequestOutput:
    """What a request has produced so far: its tokens, text and times, and in the end its completion.

    `take_plain()` or `take()` runs in every step for every request. So they leave what they can to the end: without
    events and stop strings, all text is decoded at once there.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        sampling: ResolvedSampling,
        tokenizer: Any,
        index: int = 0,
        choice: int = 0,
        *,
        scored_from: int | None = None,
        weights_version: int = 0,
        keep_events: bool = False,
        traffic: Traffic | None = None,
        prompt: Any = None,
        truncated: int = 0,
    ) -> None:
        """
        Args:
            index, choice: which prompt of its call, and which of the prompt's completions.
            scored_from: the first token of the prompt whose log-probability is told; None: of no token.
            weights_version: how often the weights had changed.
            keep_events: make an event for each token.
            traffic: what a decode step reads, for the completion's bandwidth.
            prompt: the text or chat that the ids are of, for the completion.
            truncated: how many ids were cut from its beginning.
        """
        self.token_ids: list[int] = []
        """Generated tokens that the host has read."""
        self.events: deque[TokenEvent] = deque()
        self.completion: Completion | None = None
        self.cached_tokens = 0
        """Tokens of the prompt that were not computed."""
        self.drafted_tokens = 0
        """Drafts that were checked."""
        self._accepted_tokens = 0
        """Drafts that were right: tokens that were not the first of their step."""
        self.states: list[Any] = []
        """Hidden states of its prompt, part by part, where they are wanted."""
        self.keep_events = keep_events
        self._prompt_ids = prompt_ids
        self._prompt, self._truncated = prompt, truncated
        self._sampling = sampling
        self._scored_from = scored_from
        self._weights_version = weights_version
        self._scores: list[TokenLogprob] = []
        self.other_scores: list[TokenLogprob] = []
        """Of the last tokens of its alternatives, which its last part tells."""
        self._index = index
        self._choice = choice
        self._traffic = traffic
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, sampling.skip_special_tokens)
        self._stops = StopChecker(sampling.stop) if sampling.stop else None
        self._hidden = hidden_texts(tokenizer) if sampling.stop and sampling.skip_special_tokens else {}
        """Texts of tokens that are left out of the text, which stop strings see all the same."""
        self._decodes_each = keep_events or self._stops is not None or not self._detokenizer.bulk
        self._on_token: Callable[[int], None] | None = None
        self._criteria = sampling.stopping_criteria
        self._criterion_met = False
        self.plain = not self._decodes_each and not self._criteria
        """Whether nobody waits for single tokens or their text, and it has not ended."""
        self._text: list[str] = []
        self._limit = sampling.max_new_tokens
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._logprobs: list[TokenLogprob] = []
        self._steps: Counter[StepKind] = Counter()
        self._decoded_by: StepKind | None = None
        """How the last tokens were decoded; None where a prefill brought the last one."""
        self._decoded_from = 0
        """How many tokens there were when that began."""
        self._extra_tokens = 0
        """Tokens since then that were not the first of their step; a step that brought none counts as -1."""
        self.submitted = time.perf_counter()
        self._started: float | None = None
        self._token_times: list[float] = []

    def listen(self, on_token: Callable[[int], None]) -> None:
        """Call this with every token from now on."""
        self._on_token = on_token
        self.plain = False

    def prefilled(self, kind: StepKind) -> None:
        """Note that a prefill step of this request was launched."""
        if self._started is None:
            self._started = time.perf_counter()
        self._steps[kind] += 1

    def take_plain(self, tokens: Sequence[int], now: float, decoded_by: StepKind | None) -> bool:
        """Take the one token of a step of a `plain` request where nothing else is to be done: it is not the last, and
        its step ran as the one before. So it is in nearly every step. False, and nothing done, where that is not so.

        Args: see `take`.
        """
        if decoded_by is not self._decoded_by or len(tokens) != 1:
            return False
        token, ids = tokens[0], self.token_ids
        if token < 0 or token in self._stop_ids or len(ids) + 1 >= self._limit:
            return False
        ids.append(token)
        self._token_times.append(now)
        return True

    def take(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob] | None,
        now: float,
        decoded_by: StepKind | None = None,
    ) -> int:
        """Take the tokens of one step in order; returns how many were taken.

        It stops behind the token that ends the request, and in front of a -1. Where the user's tokenizer or streamer
        fails, the request ends with an error.

        Args:
            tokens: those that the step brought; -1 where there was nothing to choose.
            logprobs: theirs.
            now: when the host read them, by `time.perf_counter()`.
            decoded_by: the decode step that brought them; None for a prefill, which is counted when it is launched.
        """
        ids = self.token_ids
        if decoded_by is not self._decoded_by:
            self._count_decode_steps()
            self._decoded_by = decoded_by
        taken = 0
        try:
            for token in tokens:
                if token < 0:
                    break
                logprob = None if logprobs is None else self._keep(logprobs[taken])
                if taken:
                    self._extra_tokens += 1
                    self._accepted_tokens += 1
                taken += 1
                ids.append(token)
                self._token_times.append(now)
                text, matched = "", None
                if self._decodes_each:
                    text = self._detokenizer.push(token)
                    if self._stops is not None:
                        text, matched = self._stops.push(text)
                        if matched is None and token in self._hidden:
                            more, matched = self._stops.push(self._hidden[token], shown=False)
                            text += more
                ends = matched is not None or token in self._stop_ids or len(ids) >= self._limit
                if self._criteria and criteria_met(self._criteria, self._prompt_ids, ids):
                    self._criterion_met = ends = True
                if ends:
                    text += self._finish(token, text, matched)
                elif text:
                    self._text.append(text)
                if self.keep_events:
                    self._emit(token, text, logprob)
                if self._on_token is not None:
                    self._on_token(token)
                if ends:
                    break
        except Exception as error:
            logger.debug("a request failed", exc_info=error)
            if self.completion is None:
                failure = RequestError(f"its output could not be handled: {described(error)}")
                self.end(FinishReason.ERROR, failure)
        if taken == 0:
            self._extra_tokens -= 1
        return taken

    def take_scores(self, found: Sequence[TokenLogprob]) -> None:
        """Take the log-probabilities of more of the prompt's tokens. Where nothing is generated, the last end it."""
        if any(math.isnan(item.logprob) for item in found):
            message = "the logits of its prompt held NaN; check the weights and the dtype"
            self.end(FinishReason.ERROR, RequestError(message))
            return
        self._scores += found
        if not self._limit and len(self._scores) == len(self._prompt_ids) - (self._scored_from or 0):
            self.end(FinishReason.LENGTH)

    def end_unchosen(self, why: str | None) -> None:
        """End with an error: a step had nothing to choose for the next token.

        Args:
            why: the cause, if it is known to lie in the step and not in the logits.
        """
        if why is None:
            message = (
                f"the logits after {len(self._prompt_ids) + len(self.token_ids)} tokens held NaN or no token that may "
                "be chosen; check the weights, the dtype and logit_bias"
            )
        else:
            message = f"{why}; run the prompt again"
        self.end(FinishReason.ERROR, RequestError(message))

    def _keep(self, logprob: TokenLogprob) -> TokenLogprob | None:
        wanted = self._sampling.logprobs
        if wanted is None:
            return None
        # A step reports as many candidates as the request of its batch that wants most.
        logprob = replace(logprob, top=logprob.top[:wanted])
        self._logprobs.append(logprob)
        return logprob

    def _finish(self, token: int, text: str, matched: str | None) -> str:
        """Complete with this token and its text; returns the text that was held back until now."""
        held = ""
        reason = FinishReason.STOP
        match: str | int | None = matched
        if matched is None:
            held, matched = self._flush()
            if matched is not None:
                match = matched
            elif token in self._stop_ids:
                match = token
            elif self._criterion_met:
                reason = FinishReason.STOP
            else:
                reason = FinishReason.LENGTH
        self._text.append(text + held)
        self._complete(reason, match)
        return held

    def end(self, reason: FinishReason, error: HybridgenError | None = None) -> None:
        """End the request where it is; the tokens and the text it has are kept."""
        try:
            text, _ = self._flush()
        except Exception:  # the tokenizer's; the text that was decoded before is kept
            logger.debug("text held back could not be decoded", exc_info=True)
            text = ""
        self._text.append(text)
        self._complete(reason, None, error)
        if self.keep_events:
            self._emit(None, text, None)

    def _flush(self) -> tuple[str, str | None]:
        """Text of tokens not decoded yet, and text held back by an incomplete character or a possible stop string."""
        text = self._detokenizer.flush(() if self._decodes_each else self.token_ids)
        if self._stops is None:
            return text, None
        text, matched = self._stops.push(text)
        return (text, matched) if matched is not None else (text + self._stops.flush(), None)

    def _emit(self, token: int | None, text: str, logprob: TokenLogprob | None) -> None:
        event = TokenEvent(
            token_id=token,
            text=text,
            index=self._index,
            choice=self._choice,
            logprob=logprob,
            completion=self.completion,
        )
        self.events.append(event)

    def _count_decode_steps(self) -> None:
        """Count the decode steps that ran the same way one after the other."""
        if self._decoded_by is not None:
            self._steps[self._decoded_by] += len(self.token_ids) - self._decoded_from - self._extra_tokens
        self._decoded_from, self._extra_tokens = len(self.token_ids), 0

    def _complete(self, reason: FinishReason, match: str | int | None, error: HybridgenError | None = None) -> None:
        total = time.perf_counter() - self.submitted
        sampling = self._sampling
        token_times = tuple(moment - self.submitted for moment in self._token_times)
        bandwidth, mbu = self._bandwidth()
        self._count_decode_steps()
        self.plain = False
        self.completion = Completion(
            text="".join(self._text),
            token_ids=tuple(self.token_ids),
            prompt=self._prompt,
            prompt_token_ids=tuple(self._prompt_ids),
            truncated_tokens=self._truncated,
            finish_reason=reason,
            seed=sampling.seed,
            timing=Timing(
                queue=None if self._started is None else self._started - self.submitted,
                ttft=token_times[0] if token_times else None,
                total=total,
                token_times=token_times,
                read_bandwidth=bandwidth,
                mbu=mbu,
            ),
            steps=tuple(StepSummary(*key, count) for key, count in self._steps.items()),
            logprobs=None if sampling.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=None if self._scored_from is None else (*[None] * self._scored_from, *self._scores),
            stop_match=match,
            cached_tokens=self.cached_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self._accepted_tokens,
            weights_version=self._weights_version,
            error=error,
        )

    def _bandwidth(self) -> tuple[float | None, float | None]:
        """Bytes per second that its decode steps read, and their share of the device's ceiling."""
        times, traffic = self._token_times, self._traffic
        steps = len(times) - 1 - self._accepted_tokens
        if traffic is None or steps < 1:
            return None, None
        positions = len(self._prompt_ids) + len(times) / 2
        bandwidth = traffic.bandwidth(1, positions, (times[-1] - times[0]) / steps)
        return bandwidth, traffic.mbu(bandwidth)
