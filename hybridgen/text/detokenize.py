"""Token ids to text, one token at a time or all at the end."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 64
"""Tokens that may wait for the end of an undecodable run; each further one decodes all of them again."""

_hidden: weakref.WeakKeyDictionary[Any, Mapping[int, str]] = weakref.WeakKeyDictionary()
_skipped: weakref.WeakKeyDictionary[Any, frozenset[int]] = weakref.WeakKeyDictionary()


class IncrementalDetokenizer:
    """The text of a request's generated tokens, in pieces as they arrive.

    The pieces and the final `flush()`, joined, are `decode(prompt + generated)` without its first
    `len(decode(prompt))` characters. A piece is held back while it ends with an incomplete character, which
    `decode` shows as U+FFFD; of more than 64 tokens that complete none, all but the last are given out as
    such. What was given out is never taken back, so the equality cannot hold where `decode` changes its mind
    about text that looked complete:

    - Byte fallback (SentencePiece) decodes a run of byte tokens as a whole: one invalid byte turns every byte
      of the run into a U+FFFD, also the valid characters before it. Here those characters stay, and only the
      bytes after them become U+FFFD. A prompt can end inside such a run: the character that it began is left
      out, however many U+FFFD `decode` shows for its first bytes.
    - `clean_up_tokenization_spaces` (WordPiece) can remove a space that was given out.

    Fast tokenizers run through `tokenizers.decoders.DecodeStream`; others, and those that decode in Python,
    through their `decode()` on the last few tokens.

    Where nobody reads a text before its end, and `bulk` says that it pays, all tokens can go to `flush()` at once: the
    same text, for a tenth of the time.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        """Prepare for the tokens that follow a prompt.

        Args:
            tokenizer: a Hugging Face tokenizer; None: every piece is empty.
            prompt_ids: decides the first space and completes a character that the prompt left open.
            skip_special_tokens: leave special tokens out.
        """
        self.restarts = 0
        """How often `decode` changed text that had been given out."""
        self.bulk = True
        """Whether `flush()` decodes many tokens faster than `push()` does. It takes them either way."""
        self._enabled = tokenizer is not None
        self._context: list[int] = []
        self._given = 0
        """How many tokens of the context are given out; the others wait."""
        self._old: str | None = None
        self._stream: DecodeStream | None = None
        if not self._enabled:
            return
        self._skip = skip_special_tokens
        self._backend = _rust_backend(tokenizer)
        self._decode = _decoder(tokenizer, self._backend, skip_special_tokens)
        self.bulk = self._backend is not None and _appends(self._backend)
        self._ignored = _skipped_ids(tokenizer) if skip_special_tokens else frozenset()
        self._settle(_last_words(prompt_ids, self._decode))

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        if not self._enabled or token_id in self._ignored:
            return ""
        context, stream = self._context, self._stream
        context.append(token_id)
        if stream is None:
            text = self._step()
        else:
            try:
                text = stream.step(self._backend, token_id)  # type: ignore[arg-type]
            except Exception as error:  # tokenizers raises bare Exception
                text = self._without_stream(error)
        if text is not None:
            self._settle(context[self._given :])
            return text
        if len(self._context) - self._given > _MAX_PENDING:
            return self._give_up_waiting()
        return ""

    def flush(self, token_ids: Sequence[int] = ()) -> str:
        """The text of the last tokens and what is held back, with U+FFFD for incomplete characters. Ends the text."""
        if not self._enabled:
            return ""
        text = self._flush_bulk(token_ids) if self.bulk and token_ids else None
        if text is None:
            text = "".join(map(self.push, token_ids)) + self._flush_held()
        self._context = []
        self._given = 0
        self._enabled = False
        return text

    def _flush_bulk(self, token_ids: Sequence[int]) -> str | None:
        """All in one decoding; None where it shows U+FFFD, because what `push()` gives then depends on the pieces."""
        old, text = self._old_text(), self._decode([*self._context, *token_ids])
        return text[len(old) :] if _REPLACEMENT not in text and text.startswith(old) else None

    def _flush_held(self) -> str:
        if self._given == len(self._context):
            return ""
        text = _beyond(self._old_text(), self._decode(self._context))
        return self._decode(self._context[self._given :]) if text is None else text

    def _settle(self, context: list[int]) -> None:
        """All of `context` is given out; it stays because what follows can depend on it (a first space)."""
        self._context = context
        self._given = len(context)
        self._old = None
        if self._stream is None and self._backend is not None and not self._old_text().endswith(_REPLACEMENT):
            self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)

    def _old_text(self) -> str:
        if self._old is None:
            self._old = self._decode(self._context[: self._given])
        return self._old

    def _without_stream(self, error: Exception) -> str:
        """The text of what waits, where the stream cannot go on."""
        if "Invalid prefix encountered" not in str(error):
            raise error
        self._stream = None
        return self._restart()

    def _step(self) -> str | None:
        new = self._decode(self._context)
        if new.endswith(_REPLACEMENT):
            return None
        text = _beyond(self._old_text(), new)
        return self._restart() if text is None else text or None

    def _restart(self) -> str:
        """Text that was given out comes out differently now: it stays, what follows is decoded alone."""
        self.restarts += 1
        return self._decode(self._context[self._given :])

    def _give_up_waiting(self) -> str:
        """Give out all but the last tokens of an undecodable run, cut where no character goes across."""
        old, whole = self._old_text(), self._decode(self._context)
        if whole == old:  # ids that the tokenizer does not know decode to nothing
            self._stream = None
            self._settle(self._context[: self._given])
            return ""
        cut = self._boundary(whole)
        text = _beyond(old, self._decode(self._context[:cut]))
        if text is None:
            self.restarts += 1
            text = self._decode(self._context[self._given : cut])
        waiting = self._context[cut:]
        self._settle(self._context[cut - 1 : cut])
        self._stream = None  # it does not know the waiting tokens; the next text makes a new one
        self._context += waiting
        return text

    def _boundary(self, whole: str) -> int:
        """Where the context's text can be cut, close to its end: a character has at most 4 bytes."""
        count = len(self._context)
        for cut in range(count - 1, count - 5, -1):
            if self._decode(self._context[:cut]) + self._decode(self._context[cut:]) == whole:
                return cut
        return count


def _beyond(old: str, new: str) -> str | None:
    """What `new` has after `old`; None where it changes it.

    An `old` (the prompt) that ends with U+FFFD may have begun a character that `new` completes. The character
    stands for these marks, whose number depends on the tokenizer, and counts as old.
    """
    if new.startswith(old):
        return new[len(old) :]
    stem = old.rstrip(_REPLACEMENT)
    if len(stem) == len(old) or not new.startswith(stem):
        return None
    rest = new[len(stem) :]
    marks = len(rest) - len(rest.lstrip(_REPLACEMENT))
    return rest[marks + 1 :]


def hidden_texts(tokenizer: Any) -> Mapping[int, str]:
    """The texts of the tokens that `decode(skip_special_tokens=True)` leaves out, by id; none without a tokenizer."""
    if tokenizer is None:
        return {}
    found = _hidden.get(tokenizer)
    if found is None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token for token, value in added.items() if value.special} | {
            token for token in getattr(tokenizer, "all_special_ids", ()) if isinstance(token, int)
        }
        found = {}
        for token in special:
            text = tokenizer.decode([token], skip_special_tokens=False)
            if text and not tokenizer.decode([token], skip_special_tokens=True):
                found[token] = text
        _hidden[tokenizer] = found
    return found


def _last_words(prompt_ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[int]:
    """The shortest end of a prompt, by doubling, that decodes to whole characters; else all of it.

    Whole characters mean that it starts with one too, so that what follows decodes as after the whole prompt;
    the cost of a request then does not grow with its prompt.
    """
    count = 8
    while count < len(prompt_ids):
        tail = list(prompt_ids[-count:])
        text = decode(tail)
        if text and _REPLACEMENT not in (text[0], text[-1]):
            return tail
        count *= 2
    return list(prompt_ids)


def _rust_backend(tokenizer: Any) -> Tokenizer | None:
    """The Rust tokenizer, if it alone decides what `tokenizer.decode()` returns."""
    from transformers import PreTrainedTokenizerFast as Fast

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer) or not isinstance(tokenizer, Fast):
        return None
    kind = type(tokenizer)
    overridden = kind.decode is not Fast.decode or kind._decode is not Fast._decode
    return None if overridden or _cleans_up(tokenizer, backend) else backend


def _appends(backend: Tokenizer) -> bool:
    """Whether the text of valid bytes only grows at its end with each token, so that it can be decoded in any pieces.

    True for the decoders of byte-level BPE and of SentencePiece's byte fallback, where the latter strips one space at
    most: a piece is decoded after one that has given text, and there is no space to strip then.
    """
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    parts = state.get("decoders", [state])
    types = [part.get("type") for part in parts]
    if types[:3] == ["Replace", "ByteFallback", "Fuse"]:
        return parts[3:] in ([], [{"type": "Strip", "content": " ", "start": 1, "stop": 0}])
    return types == ["ByteLevel"]


def _cleans_up(tokenizer: Any, backend: Tokenizer) -> bool:
    """Whether `decode()` removes spaces. transformers skips that for BPE unless a second flag insists."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    insist = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return type(backend.model).__name__ != "BPE" or bool(getattr(tokenizer, insist, False))


def _decoder(tokenizer: Any, backend: Tokenizer | None, skip: bool) -> Callable[[list[int]], str]:
    if backend is not None:
        return lambda ids: backend.decode(ids, skip_special_tokens=skip)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=skip)


def _skipped_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that `decode(skip_special_tokens=True)` is known to leave out, so that they need not be decoded.

    Rust tokenizers skip added tokens marked special, Python ones `all_special_ids`; what is in both is
    skipped by all.
    """
    found = _skipped.get(tokenizer)
    if found is None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        named = getattr(tokenizer, "all_special_ids", ())
        found = _skipped[tokenizer] = frozenset(i for i in named if i in added and added[i].special)
    return found
