"""From a request's tokens to its text, events and completion."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hybridgen.core import Completion, FinishReason, StepSummary, Timing, TokenEvent, TokenLogprob
from hybridgen.errors import HybridgenError, RequestError
from hybridgen.sampling import IncrementalDetokenizer, StopChecker
from hybridgen.scheduler import Sequence

logger = logging.getLogger(__name__)


class Response:
    """What a request has produced so far: its text, times, and in the end its completion."""

    def __init__(self, sequence: Sequence, tokenizer: Any, index: int = 0, choice: int = 0) -> None:
        sampling = sequence.sampling
        self.sequence = sequence
        self.index = index
        self.choice = choice
        self.events: deque[TokenEvent] = deque()
        self.keep_events = False
        self.on_token: Callable[[int], None] | None = None
        self.completion: Completion | None = None
        self._detokenizer = IncrementalDetokenizer(tokenizer, sequence.prompt_ids, sampling.skip_special_tokens)
        self._stops = StopChecker(sampling.stop)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._steps: Counter[tuple[str, str, str]] = Counter()
        self._submitted = time.perf_counter()
        self._started: float | None = None
        self._token_times: list[float] = []

    def ran(self, phase: str, kind: str, reason: str) -> None:
        """Note that a step of this request was launched."""
        if self._started is None:
            self._started = time.perf_counter()
        self._steps[phase, kind, reason] += 1

    def push(self, token: int, logprob: TokenLogprob | None) -> None:
        """Take the next token; completes the response when it is the last."""
        if token < 0:
            error = RequestError(
                f"the logits after {self.sequence.length} tokens held NaN or no token that may be chosen; check the "
                "weights, the dtype and logit_bias"
            )
            self.end(FinishReason.ERROR, error)
            return
        sampling = self.sequence.sampling
        self._token_times.append(time.perf_counter() - self._submitted)
        self.sequence.output_ids.append(token)
        if sampling.logprobs is None:
            logprob = None
        elif logprob is not None:
            # A step reports as many candidates as the request of its batch that wants most.
            logprob = replace(logprob, top=logprob.top[: sampling.logprobs])
            self._logprobs.append(logprob)
        text, matched = self._stops.push(self._detokenizer.push(token))
        reason: FinishReason | None = None
        match: str | int | None = None
        if matched is not None:
            reason, match = FinishReason.STOP, matched
        elif token in sampling.stop_token_ids:
            reason, match = FinishReason.STOP, token
        elif len(self.sequence.output_ids) >= sampling.max_new_tokens:
            reason = FinishReason.LENGTH
        if reason is not None and matched is None:
            tail, matched = self._flush()
            text += tail
            if matched is not None:
                reason, match = FinishReason.STOP, matched
        self._text.append(text)
        if reason is not None:
            self._complete(reason, match)
        self._emit(token, text, logprob)
        if self.on_token is not None:
            self.on_token(token)

    def end(self, reason: FinishReason, error: HybridgenError | None = None) -> None:
        """End the response where it is; the tokens and the text it has are kept."""
        try:
            text, _ = self._flush()
        except Exception:  # a tokenizer that failed once fails again; what it held back is lost, the rest is not
            logger.debug("text held back could not be decoded", exc_info=True)
            text = ""
        self._text.append(text)
        self._complete(reason, None, error)
        self._emit(None, text, None)

    def _flush(self) -> tuple[str, str | None]:
        """Text held back by an incomplete character or a possible stop string."""
        text, matched = self._stops.push(self._detokenizer.flush())
        return (text, matched) if matched is not None else (text + self._stops.flush(), None)

    def _emit(self, token: int | None, text: str, logprob: TokenLogprob | None) -> None:
        if self.keep_events:
            self.events.append(
                TokenEvent(
                    token_id=token,
                    text=text,
                    index=self.index,
                    choice=self.choice,
                    logprob=logprob,
                    completion=self.completion,
                )
            )

    def _complete(self, reason: FinishReason, match: str | int | None, error: HybridgenError | None = None) -> None:
        now = time.perf_counter()
        sampling = self.sequence.sampling
        nan = float("nan")
        self.completion = Completion(
            text="".join(self._text),
            token_ids=tuple(self.sequence.output_ids),
            prompt_token_ids=self.sequence.prompt_ids,
            finish_reason=reason,
            seed=sampling.seed,
            timing=Timing(
                queue=nan if self._started is None else self._started - self._submitted,
                ttft=self._token_times[0] if self._token_times else nan,
                total=now - self._submitted,
                token_times=tuple(self._token_times),
            ),
            steps=tuple(StepSummary(*key, count) for key, count in self._steps.items()),
            logprobs=None if sampling.logprobs is None else tuple(self._logprobs),
            stop_match=match,
            error=error,
        )


def collect(responses: list[Response]) -> list[Completion]:
    """One completion per prompt, in order; with n > 1 the first choice, which holds all of them."""
    choices: dict[int, list[Completion]] = {}
    for response in responses:
        if response.completion is None:
            raise RuntimeError("a response was collected before its end")
        choices.setdefault(response.index, []).append(response.completion)
    return [
        group[0] if len(group) == 1 else replace(group[0], choices=tuple(group)) for _, group in sorted(choices.items())
    ]
