"""Text that keeps to a grammar: a JSON schema, a regular expression, a Lark grammar, or one of some texts.

The library llguidance (extra `grammar`) says which tokens may come next; a row's logits get -inf everywhere else. Masks
of all rows of a step are made on the host, from the tokens of the step before, while the device runs the forward.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from hybridgen.errors import ConfigError, SamplingError, TokenizerError, shown
from hybridgen.params import GRAMMARS, SamplingParams
from hybridgen.sampling.grammar_trial import needs_trial, try_apart

_NAMES = ("properties", "$defs", "definitions", "dependentSchemas")
"""Keys of a schema whose value has names of the user's as its keys."""
_VALUES = ("const", "enum", "default", "examples")
"""Keys of a schema whose value is data."""
COMPILED = 128
"""Grammars that are kept ready."""
_ALONE = 4
"""Up to so many rows one thread makes the masks."""
_THREADS = 8
"""At most, for more rows."""
_LEXERS = 16
"""Of a grammar, at most."""
_NOTICED = 0.005
"""Seconds of processor time that building one may take while rows wait for it."""
_LIMITS: dict[str, Any] = {"initial_lexer_fuel": 200_000, "max_items_in_row": 1000}
"""Below llguidance's own, which let a first mask take a second."""


class Matcher(Protocol):
    """What follows one text through a grammar. A library that does these four can take the place of llguidance."""

    done: bool
    """Whether the text has ended."""

    def accept(self, token_ids: list[int]) -> None:
        """Go on with tokens.

        Raises:
            SamplingError: they do not fit, or following them takes too much.
        """

    def fill(self, bits: Tensor, line: int) -> None:
        """Write a bit for each token that may come next to a line of int32 [G, ceil(V / 32)], the lowest bit first.

        Raises:
            SamplingError: that takes too much.
        """

    def copy(self) -> Matcher:
        """Another one at the same place, that goes on without this one."""


class _Wanted(NamedTuple):
    """A grammar as the caller gave it: the field's name and its text."""

    kind: str
    text: str


class Constraint:
    """The grammar of a request. Each of its completions follows it on its own."""

    def __init__(self, begin: Callable[[], Matcher]) -> None:
        """`begin`: makes what follows a text from its first token."""
        self._begin = begin

    def begin(self) -> GrammarRow:
        """The way of one completion, at its first token."""
        return GrammarRow(self._begin())


class GrammarRow:
    """One completion's way through a grammar."""

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.failure: str | None = None
        """Why it cannot be followed any further."""

    def accept(self, token_id: int) -> None:
        """Go on with the token that was chosen last."""
        if self.matcher.done or self.failure is not None:  # a step more for a request that has ended
            return
        try:
            self.matcher.accept([token_id])
        except SamplingError as error:
            self.failure = str(error)

    def copy(self) -> GrammarRow:
        """The same way as far as it went, to be gone on from without this one."""
        other = GrammarRow(self.matcher.copy())
        other.failure = self.failure
        return other


def fill_with_drafts(rows: Sequence[GrammarRow], drafts: Sequence[Sequence[int]], bits: Tensor) -> None:
    """Write which tokens may come at each place of a step that checks drafts: behind each row's text, and behind each
    draft as if those before it were its text. Behind a draft that may not come every token may: nobody looks there.

    Args:
        drafts: of each row, as many of each; below 0: none from here on.
        bits: int32 [G * Q, ceil(V / 32)], on the CPU; Q lines for each row, one more than drafts.
    """
    count = len(drafts[0]) + 1
    bits.fill_(-1)
    lines = range(0, len(rows) * count, count)
    fill(rows, bits, lines)
    going = [(row.copy(), line, iter(said)) for row, line, said in zip(rows, lines, drafts, strict=True)]
    for place in range(1, count):
        still = []
        for row, line, said in going:
            draft = next(said)
            if draft >= 0 and _is_set(bits[line + place - 1], draft):
                row.accept(draft)
                still.append((row, line, said))
        going = still
        fill([row for row, _, _ in going], bits, [line + place for _, line, _ in going])


def _is_set(bits: Tensor, token: int) -> bool:
    word = token // 32
    return word < bits.shape[0] and bool(int(bits[word]) >> token % 32 & 1)


def fill(rows: Sequence[GrammarRow], bits: Tensor, lines: Sequence[int] | None = None) -> None:
    """Write which tokens may come next in each row: all of them where the text has ended, none where it failed.

    Args:
        bits: int32 [G, ceil(V / 32)], on the CPU; a line for each row.
        lines: the line of each row; None: they follow each other.
    """
    open_rows = []
    for line, row in zip(range(len(rows)) if lines is None else lines, rows, strict=True):
        if row.matcher.done or row.failure is not None:
            bits[line].fill_(-1 if row.failure is None else 0)
        else:
            open_rows.append((row, line))
    together = [(row.matcher, line) for row, line in open_rows if isinstance(row.matcher, _Guidance)]
    filled = len(together) > _ALONE and _most_threads() > 1
    if filled:
        # Threads take runs of this list: rows that wait for the same lexer come behind each other.
        together.sort(key=lambda pair: pair[0].lexer)
        _fill_together([(matcher.inner, line) for matcher, line in together], bits)
    for row, line in open_rows:
        try:
            if filled and isinstance(row.matcher, _Guidance):
                row.matcher.check()
            else:
                row.matcher.fill(bits, line)
        except SamplingError as error:
            row.failure = str(error)
            bits[line].zero_()


def _fill_together(matchers: list[tuple[Any, int]], bits: Tensor) -> None:
    """llguidance's masks, on several threads. Not by llguidance.torch, see `_Guidance.fill`."""
    lines, width = bits.shape
    _threads(os.getpid()).unsafe_compute_mask_ptr(matchers, bits.data_ptr(), width * bits.element_size(), lines)


@functools.lru_cache(1)
def _threads(process: int) -> Any:
    """Threads of this process: a forked one has none of its parent's."""
    from llguidance import LLExecutor

    return LLExecutor(_most_threads())


def _most_threads() -> int:
    """One core is for the others: whoever launches steps, encodes prompts, and speaks to clients."""
    return min(_THREADS, (os.cpu_count() or 1) - 1)


def constraint_of(
    params: SamplingParams, tokenizer: Any, problem: str | None, vocab_size: int, eos_token_ids: Iterable[int] | None
) -> Constraint | None:
    """The grammar that a request asks for, ready to be followed; None if it asks for none.

    Args:
        problem: why there is no tokenizer.
        vocab_size: columns of the logits.
        eos_token_ids: the model's; the first of them ends a text that is complete.

    Raises:
        SamplingError: the grammar cannot be read or kept to, or is too large.
        TokenizerError: the model has no tokenizer that llguidance reads.
        ConfigError: llguidance is not installed.
    """
    wanted = _wanted(params)
    if wanted is None:
        return None
    if tokenizer is None:
        raise TokenizerError(
            f"{wanted.kind} needs a tokenizer and the model has none ({problem or 'none was given'}); pass tokenizer="
        )
    end = next(iter(eos_token_ids or ()), None)
    if params.ignore_eos or end is None:
        why = "ignore_eos=True" if params.ignore_eos else "a model without an end-of-sequence id"
        raise SamplingError(f"{wanted.kind} with {why} would never end; leave one of them out")
    return Constraint(_compiled(tokenizer, vocab_size, end, wanted).begin)


def _wanted(params: SamplingParams) -> _Wanted | None:
    for kind in GRAMMARS:
        value = getattr(params, kind)
        if value is not None:
            if kind == "json_schema" and not isinstance(value, str):
                value = json.dumps(value)
            return _Wanted(kind, json.dumps(value) if kind == "choice" else value)
    return None


@functools.lru_cache(4)
def _vocabulary(tokenizer: Any, vocab_size: int, end: int) -> Any:
    """The tokenizer as llguidance reads it: it takes up to a second.

    Raises:
        ConfigError: llguidance is not installed.
        TokenizerError: it cannot read this tokenizer.
    """
    try:
        import llguidance.hf
    except ImportError as error:
        raise ConfigError(
            "text that keeps to a grammar needs the package llguidance; pip install 'hybridgen[grammar]'"
        ) from error
    try:
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=end)
    except Exception as error:  # it reads files of the checkpoint
        raise TokenizerError(f"the model's tokenizer cannot be used with a grammar: {error}") from error


@functools.lru_cache(COMPILED)
def _compiled(tokenizer: Any, vocab_size: int, end: int, wanted: _Wanted) -> _Starts:
    vocabulary = _vocabulary(tokenizer, vocab_size, end)
    from llguidance import LLMatcher, LLParserLimits

    if needs_trial(wanted.kind, wanted.text):
        try_apart(wanted.kind, wanted.text)
    if wanted.kind == "json_schema":
        schema = json.loads(wanted.text)
        found = _unkept(schema)
        if found is not None:
            raise SamplingError(f"json_schema has {found}, which cannot be kept to; leave it out")
        grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
    elif wanted.kind == "regex":
        grammar = LLMatcher.grammar_from_regex(wanted.text)
    elif wanted.kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(wanted.text))
        grammar = LLMatcher.grammar_from_lark(f"start: {texts}")
    else:
        grammar = LLMatcher.grammar_from_lark(wanted.text)
    begun = time.thread_time()
    build = functools.partial(LLMatcher, vocabulary, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
    matcher = build()
    if matcher.is_error():
        raise SamplingError(f"{wanted.kind}={shown(wanted.text, 60)} cannot be kept to: {_said(matcher)}")
    return _Starts(matcher, build if time.thread_time() - begun <= _NOTICED else None, end)


class _Starts:
    """Matchers at the beginning of one grammar, from which those of its rows are copied.

    A copy shares the lexer of what it was copied from, behind a lock (llguidance 1.9.1), so that the masks of rows with
    one lexer are made one after the other, whatever the threads. So rows that run at a time get lexers of their own.
    They keep what they learn of the grammar: later rows have it.
    """

    def __init__(self, first: Any, build: Callable[[], Any] | None, end: int) -> None:
        """
        Args:
            build: makes another one like the first, with a lexer of its own; None: that takes too long.
            end: the token that ends a text.
        """
        self._starts = [first]
        self._rows: list[weakref.WeakSet[_Guidance]] = [weakref.WeakSet()]
        self._build, self._end = build, end
        self._lock = threading.Lock()  # engines of one process share the grammars that are kept

    def begin(self) -> Matcher:
        """A matcher for one row, by the lexer that has the fewest."""
        with self._lock:
            counts = [len(rows) for rows in self._rows]
            lexer = counts.index(min(counts))
            if counts[lexer] and self._build is not None and len(counts) < _LEXERS:
                lexer = len(counts)
                self._starts.append(self._build())
                self._rows.append(weakref.WeakSet())
            row = _Guidance(self._starts[lexer].deep_copy(), self._end, lexer)
            self._rows[lexer].add(row)
            return row


class _Guidance:
    """llguidance's matcher. It has limits of its own for what a grammar and a step of it may take."""

    def __init__(self, matcher: Any, end: int, lexer: int) -> None:
        """
        Args:
            end: the token that ends a text.
            lexer: a number for the lexer that it shares with others.
        """
        self.inner, self._end, self.lexer = matcher, end, lexer
        self.done = False

    def copy(self) -> _Guidance:
        other = _Guidance(self.inner.deep_copy(), self._end, self.lexer)
        other.done = self.done
        return other

    def accept(self, token_ids: list[int]) -> None:
        self.done = self._end in token_ids
        if token_ids and not self.inner.consume_tokens(token_ids):
            raise SamplingError(f"the grammar cannot be followed by the chosen token: {_said(self.inner)}")

    def fill(self, bits: Tensor, line: int) -> None:
        # Not by llguidance.torch: its import brings torch's compiler, seconds in which no step runs.
        row = bits[line]
        self.inner.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
        self.check()

    def check(self) -> None:
        """
        Raises:
            SamplingError: the last mask took too much.
        """
        if self.inner.is_error():
            raise SamplingError(f"the grammar cannot be followed any further: {_said(self.inner)}")


def _said(matcher: Any) -> str:
    """What llguidance says is wrong, on one line."""
    return shown(" ".join(str(matcher.get_error()).split()), 200)


def _unkept(schema: Any) -> str | None:
    """A key that the library takes and does not keep to."""
    if isinstance(schema, list):
        return next(filter(None, map(_unkept, schema)), None)
    if not isinstance(schema, Mapping):
        return None
    if "patternProperties" in schema:
        return "patternProperties"
    for key, value in schema.items():
        if key in _VALUES:
            continue
        inside = list(value.values()) if key in _NAMES and isinstance(value, Mapping) else value
        found = _unkept(inside)
        if found is not None:
            return found
    return None
