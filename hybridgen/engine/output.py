"""From a request's tokens to its text, events and completion."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hybridgen.core import Completion, FinishReason, StepSummary, Timing, TokenEvent, TokenLogprob
from hybridgen.engine.scheduler import Sequence
from hybridgen.errors import HybridgenError, RequestError
from hybridgen.telemetry.traffic import Traffic
from hybridgen.text.detokenize import IncrementalDetokenizer, hidden_texts
from hybridgen.text.stops import StopChecker

logger = logging.getLogger(__name__)

StepKind = tuple[str, str, str]
"""How a step ran: its phase, kind and reason, see `core.StepSummary`."""


class Response:
    """What a request has produced so far: its text, times, and in the end its completion.

    `push()` runs once for every token of every request while the device waits for the next step, so that it leaves to
    the end what can be done there: without events and stop strings, all text is decoded at once.
    """

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: Any,
        index: int = 0,
        choice: int = 0,
        *,
        keep_events: bool = False,
        traffic: Traffic | None = None,
    ) -> None:
        """`traffic` says what a decode step reads, for the completion's bandwidth."""
        sampling = sequence.sampling
        self.sequence = sequence
        self.index = index
        self.choice = choice
        self.events: deque[TokenEvent] = deque()
        self.on_token: Callable[[int], None] | None = None
        self.completion: Completion | None = None
        self.keep_events = keep_events
        self._traffic = traffic
        self._detokenizer = IncrementalDetokenizer(tokenizer, sequence.prompt_ids, sampling.skip_special_tokens)
        self._stops = StopChecker(sampling.stop)
        self._hidden = hidden_texts(tokenizer) if sampling.stop and sampling.skip_special_tokens else {}
        """Texts of tokens that are left out of the text, which stop strings see all the same."""
        self._decodes_each = keep_events or bool(sampling.stop) or not self._detokenizer.bulk
        self._text: list[str] = []
        self._ids = sequence.output_ids
        self._limit = sampling.max_new_tokens
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._logprobs: list[TokenLogprob] = []
        self._steps: Counter[StepKind] = Counter()
        self._decoded_by: StepKind | None = None
        """How the last tokens were decoded; None where a prefill brought the last one."""
        self._decoded_from = 0
        """The first token of which that is true."""
        self.submitted = time.perf_counter()
        self._started: float | None = None
        self._token_times: list[float] = []

    def prefilled(self, kind: StepKind) -> None:
        """Note that a prefill step of this request was launched."""
        if self._started is None:
            self._started = time.perf_counter()
        self._steps[kind] += 1

    def push(self, token: int, logprob: TokenLogprob | None, now: float, decoded_by: StepKind | None = None) -> None:
        """Take the next token; completes the response when it is the last.

        Args:
            token: -1 where there was nothing to choose.
            now: when the host read it, by `time.perf_counter()`.
            decoded_by: the decode step that brought it; None for a prefill, which is noted when it is launched.
        """
        if decoded_by != self._decoded_by:
            self._count_decode_steps()
            self._decoded_by, self._decoded_from = decoded_by, len(self._ids)
        if token < 0:
            self._fail_unchosen()
            return
        self._ids.append(token)
        self._token_times.append(now)
        text, matched = "", None
        if logprob is not None:
            logprob = self._keep(logprob)
        if self._decodes_each:
            text, matched = self._stops.push(self._detokenizer.push(token))
            if matched is None and token in self._hidden:
                more, matched = self._stops.push(self._hidden[token], shown=False)
                text += more
        if matched is not None or token in self._stop_ids or len(self._ids) >= self._limit:
            text += self._finish(token, text, matched)
        elif text:
            self._text.append(text)
        if self.keep_events:
            self._emit(token, text, logprob)
        if self.on_token is not None:
            self.on_token(token)

    def _fail_unchosen(self) -> None:
        """The last step brought no token."""
        if self._decoded_by is not None:
            self._steps[self._decoded_by] += 1
        error = RequestError(
            f"the logits after {self.sequence.length} tokens held NaN or no token that may be chosen; check the "
            "weights, the dtype and logit_bias"
        )
        self.end(FinishReason.ERROR, error)

    def _keep(self, logprob: TokenLogprob) -> TokenLogprob | None:
        wanted = self.sequence.sampling.logprobs
        if wanted is None:
            return None
        # A step reports as many candidates as the request of its batch that wants most.
        logprob = replace(logprob, top=logprob.top[:wanted])
        self._logprobs.append(logprob)
        return logprob

    def _finish(self, token: int, text: str, matched: str | None) -> str:
        """Complete with this token and its text; returns the text that was held back and comes with it."""
        held = ""
        reason = FinishReason.STOP
        match: str | int | None = matched
        if matched is None:
            held, matched = self._flush()
            if matched is not None:
                match = matched
            elif token in self._stop_ids:
                match = token
            else:
                reason = FinishReason.LENGTH
        self._text.append(text + held)
        self._complete(reason, match)
        return held

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
        """Text of tokens not decoded yet, and text held back by an incomplete character or a possible stop string."""
        text, matched = self._stops.push(self._detokenizer.flush(() if self._decodes_each else self._ids))
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

    def _count_decode_steps(self) -> None:
        """Count the steps that brought the tokens of the current run of decode steps."""
        if self._decoded_by is not None:
            self._steps[self._decoded_by] += len(self._ids) - self._decoded_from

    def _complete(self, reason: FinishReason, match: str | int | None, error: HybridgenError | None = None) -> None:
        total = time.perf_counter() - self.submitted
        sampling = self.sequence.sampling
        nan = float("nan")
        token_times = tuple(moment - self.submitted for moment in self._token_times)
        bandwidth, mbu = self._bandwidth()
        self._count_decode_steps()
        self.completion = Completion(
            text="".join(self._text),
            token_ids=tuple(self._ids),
            prompt_token_ids=self.sequence.prompt_ids,
            finish_reason=reason,
            seed=sampling.seed,
            timing=Timing(
                queue=nan if self._started is None else self._started - self.submitted,
                ttft=token_times[0] if token_times else nan,
                total=total,
                token_times=token_times,
                read_bandwidth=bandwidth,
                mbu=mbu,
            ),
            steps=tuple(StepSummary(*key, count) for key, count in self._steps.items()),
            logprobs=None if sampling.logprobs is None else tuple(self._logprobs),
            stop_match=match,
            error=error,
        )

    def _bandwidth(self) -> tuple[float, float]:
        """Bytes per second that its decode steps read, and their share of the device's ceiling."""
        times, traffic = self._token_times, self._traffic
        if traffic is None or len(times) < 2:
            return math.nan, math.nan
        positions = len(self.sequence.prompt_ids) + len(times) / 2
        bandwidth = traffic.bandwidth(1, positions, (times[-1] - times[0]) / (len(times) - 1))
        return bandwidth, traffic.mbu(bandwidth)


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
