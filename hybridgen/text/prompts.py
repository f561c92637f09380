"""What users give as prompts, turned into token ids, and checked."""

from __future__ import annotations

import functools
import logging
import marshal
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from hybridgen.arguments import is_text
from hybridgen.errors import PromptError, TokenizerError, shown
from hybridgen.text.chats import encode_chat

logger = logging.getLogger(__name__)

Message: TypeAlias = Mapping[str, Any]
"""A chat message: `role`, `content`, and whatever else the tokenizer's chat template reads."""
Prompt: TypeAlias = "str | Sequence[int] | torch.Tensor | np.ndarray | Sequence[Message] | Mapping[str, Any]"
"""Text, token ids, the messages of a chat, or a mapping: `{"prompt": ...}`, `{"messages": ..., "tools": ...}` (see
`hybridgen.text.chats.CHAT_KEYS`), or what a tokenizer returns."""
Prompts: TypeAlias = "Prompt | Iterable[Prompt]"
"""One prompt or any number of them: a list, an array, a column of a table, a generator."""

_BYTES = (bytes, bytearray, memoryview)
_DECODE = "decode it first, for example with data.decode()"


def split_prompts(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether there was only one, not in a list.

    A list of ids or of chat messages is one prompt, as is a mapping; a two-dimensional tensor, an array of strings, or
    anything else that can be gone through is a list of prompts. Of what a tokenizer returns, the ids that its
    `attention_mask` leaves out (padding) are dropped; of `{"prompt": ...}`, the value is taken.

    Raises:
        PromptError: the value is no prompt, or an empty list.
    """
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, _BYTES):
        raise PromptError(f"prompts={shown(prompts)} is {type(prompts).__name__}, not text; {_DECODE}")
    if isinstance(prompts, np.ndarray) and prompts.ndim == 1 and prompts.dtype.kind in "UOT":
        prompts = prompts.tolist()
    if isinstance(prompts, (torch.Tensor, np.ndarray)):
        if prompts.ndim == 1:
            return [prompts], True
        if prompts.ndim == 2 and not len(prompts):
            raise PromptError(f"the prompt tensor of shape {tuple(prompts.shape)} is empty; give at least one prompt")
        if prompts.ndim == 2:
            return list(prompts), False
        raise PromptError(
            f"a prompt tensor of shape {tuple(prompts.shape)} is no prompt; give [tokens] or [prompts, tokens]"
        )
    if isinstance(prompts, Mapping):
        return _of_mapping(prompts)
    if hasattr(prompts, "columns"):  # going through a data frame gives the names of its columns
        raise PromptError(f"{type(prompts).__name__} is a table; give one of its columns, such as table['prompt']")
    if isinstance(prompts, (set, frozenset)) or not isinstance(prompts, Iterable):
        raise PromptError(
            f"{shown(prompts)} is not a prompt; give a string, token ids, a list of chat messages, or a list of those"
        )
    items = list(prompts)
    if not items:
        raise PromptError("the prompt list is empty; give at least one prompt")
    if _is_int(items[0]) or (isinstance(items[0], Mapping) and "role" in items[0]):
        return [items], True
    return [_item(item) for item in items], False


def _of_mapping(prompt: Mapping[str, Any]) -> tuple[list[Any], bool]:
    """What `split_prompts` makes of a mapping: a row, a batch of rows, a chat, or what a tokenizer returns."""
    if "input_ids" in prompt:
        items, single = split_prompts(prompt["input_ids"])
        mask = prompt.get("attention_mask")
        return (items if mask is None else _without_padding(items, [mask] if single else mask)), single
    if "messages" in prompt or is_pair(prompt):
        return [prompt], True
    if "prompt" in prompt:
        unknown = next((key for key in prompt if key != "prompt"), None)
        if unknown is not None:
            raise PromptError(
                f"a row has {shown(unknown)} beside 'prompt'; give sampling fields by sampling=, or drop it"
            )
        return split_prompts(prompt["prompt"])
    raise PromptError(
        f"{shown(prompt)} is not a prompt; a mapping has 'prompt', 'messages' or 'input_ids'; a list of chat messages "
        "stands in brackets"
    )


def _item(item: Any) -> Any:
    """A prompt of a list, without the mapping around it; one that is none stays, for `encode_prompt` to refuse."""
    if not isinstance(item, Mapping):
        return item
    try:
        items, single = _of_mapping(item)
    except PromptError:
        return item
    return items[0] if single else item


def is_pair(prompt: Any) -> bool:
    """Whether it is a prompt with a completion to score behind it: `{"prompt": ..., "completion": ...}`."""
    return isinstance(prompt, Mapping) and "completion" in prompt


def encode_pair(pair: Mapping[str, Any], index: int, **how: Any) -> tuple[array[int], int]:
    """Token ids of a prompt with its completion behind it, and how many of them are the prompt's.

    Text behind text or a chat is encoded together with it, because that is how a tokenizer sees it; ids are taken as
    they are.

    Args:
        how: see `encode_prompt`.

    Raises:
        PromptError: a part is missing or no text and no ids, or a token of the two texts together has a piece of each.
        TokenizerError: see `encode_prompt`.
    """
    if set(pair) != {"prompt", "completion"}:
        raise PromptError(f"prompt {index} has {shown(sorted(map(str, pair)))}; give 'prompt' and 'completion'")
    prompt, completion = pair["prompt"], pair["completion"]
    if isinstance(completion, Mapping) or (not isinstance(completion, str) and is_text(completion)):
        raise PromptError(f"prompt {index} has the completion {shown(completion)}; give text or token ids")
    if isinstance(completion, str) and not completion:
        raise PromptError(f"prompt {index} has an empty completion; give at least one character")
    ids = encode_prompt(prompt, index, **how)
    if not isinstance(completion, str):
        behind = encode_prompt(completion, index, **how)
        return ids + behind, len(ids)
    if not is_text(prompt):
        raise PromptError(
            f"prompt {index} is token ids and its completion {shown(completion, 30)} is text; give both as ids, or "
            "both as text"
        )
    whole = encode_prompt(_joined(prompt, completion), index, **how)
    if whole[: len(ids)] != ids or len(whole) == len(ids):
        raise PromptError(
            f"prompt {index}: the tokenizer joins the end of the prompt with the beginning of the completion "
            f"{shown(completion, 30)}, or adds tokens between them; move a space at the end of the prompt to the "
            "completion, or give token ids"
        )
    return whole, len(ids)


def _joined(prompt: Any, completion: str) -> Any:
    """A text, or the messages of a chat whose answer has begun, with more text behind it."""
    if isinstance(prompt, str):
        return prompt + completion
    if isinstance(prompt, Mapping):
        return {**prompt, "messages": _joined(prompt["messages"], completion)}
    last = prompt[-1]
    if last["role"] == "assistant":
        if not isinstance(last.get("content"), str):
            raise PromptError(f"the answer {shown(last)} has parts; give its content as one text to score what follows")
        return [*prompt[:-1], {**last, "content": last["content"] + completion}]
    return [*prompt, {"role": "assistant", "content": completion}]


def encode_prompt(
    prompt: Any,
    index: int,
    *,
    tokenizer: Any,
    tokenizer_problem: str | None,
    vocab_size: int,
    placeholders: Mapping[int, str] | None = None,
    pad: int | None = None,
) -> array[int]:
    """Token ids of one prompt, 32 bits each (`"i"`): a request holds no Python object for each of them.

    Text is encoded with the tokenizer's own special tokens; chat messages through its chat template with the
    generation prompt added.

    Args:
        placeholders: tokens that stand for images, video or sound, with their names; such a prompt is refused.
        pad: the tokenizer's padding token.

    Raises:
        PromptError: it is empty, of no known kind, refused by the tokenizer, or has ids outside the vocabulary or that
            stand for what is no text.
        TokenizerError: it is text or a chat and the model has no tokenizer or no chat template.
    """
    text = is_text(prompt)
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError(f"prompt {index} is an empty string; give at least one character")
        values = _encode_text(prompt, index, _require(tokenizer, tokenizer_problem))
    elif text and isinstance(prompt, Mapping) and "messages" not in prompt:
        raise _no_prompt(prompt, index)
    elif text:
        values = _plain_ids(encode_chat(prompt, index, _require(tokenizer, tokenizer_problem)), index)
    else:
        values = _plain_ids(prompt, index)
    if not values.size:
        raise PromptError(f"prompt {index} ({shown(prompt)}) has no tokens; give at least one")
    for token, name in (placeholders or {}).items():
        if token in values:
            raise PromptError(
                f"prompt {index} holds token {token} ({name}), which stands for what is no text; hybridgen runs this "
                "model's text part alone: leave it out"
            )
    if values.dtype.kind == "O" or int(_largest(values)) >= vocab_size:
        signed = values if values.dtype.kind == "O" else values.view(f"i{values.itemsize}")
        wrong = [token for token in signed.tolist() if not 0 <= token < vocab_size]
        raise PromptError(
            f"prompt {index} holds token id {shown(wrong[0])}, outside the vocabulary of {vocab_size} "
            f"({len(wrong)} such id(s)); was it encoded with another model's tokenizer?"
        )
    ids = array("i", values.astype(_ID).tobytes())
    if tokenizer is not None:
        _look_over(ids, tokenizer, pad, text=text)
    return ids


def _no_prompt(prompt: Mapping[str, Any], index: int) -> PromptError:
    """What is wrong with a mapping that `split_prompts` made nothing of."""
    try:
        items, _ = _of_mapping(prompt)
    except PromptError as error:
        return PromptError(f"prompt {index}: {error}")
    return PromptError(f"prompt {index} ({shown(prompt)}) holds {len(items)} prompts; give one in each row")


def _require(tokenizer: Any, problem: str | None) -> Any:
    if tokenizer is None:
        raise TokenizerError(
            f"a text prompt needs a tokenizer and the model has none ({problem or 'none was given'}); "
            "give token ids, or pass tokenizer="
        )
    return tokenizer


def _encode_text(text: str, index: int, tokenizer: Any) -> np.ndarray:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"prompt {index} ({shown(text, 40)}) holds half a character (a lone surrogate, {text[error.start]!a}) at "
            f"{error.start}; give valid Unicode, for example text.encode(errors='replace').decode()"
        ) from None
    try:
        ids = tokenizer(text)["input_ids"]
    except Exception as error:  # a tokenizer can be anybody's
        raise PromptError(
            f"prompt {index} ({shown(text, 30)}) cannot be encoded by the tokenizer: {_reason(error)}; change the "
            "text, or give token ids"
        ) from error
    return _plain_ids(ids, index)


def _look_over(ids: array[int], tokenizer: Any, pad: int | None, *, text: bool) -> None:
    """Warn of what is rarely meant: a second beginning, and padding in ids, which the model would read.

    A tokenizer takes some microseconds for each of its special tokens, so it is asked only where one is needed.
    """
    first = ids[0]
    if len(ids) > 1 and first == ids[1] and first != pad and first == getattr(tokenizer, "bos_token_id", None):
        _warn_of_two_beginnings(getattr(tokenizer, "bos_token", None))
    if pad is None or text or pad not in (first, ids[-1]):
        return
    # A single one may be an end-of-sequence token where that pads.
    others = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    least = 2 if pad in others else 1
    if array("i", [pad] * least) in (ids[:least], ids[-least:]):
        _warn_of_padding(pad, getattr(tokenizer, "pad_token", None))


@functools.cache
def _warn_of_padding(pad: int, token: Any) -> None:
    logger.warning(
        "a prompt of ids begins or ends with the padding token %s (%d), which the model reads like any other; nothing "
        'needs padding here: leave it out, or give {"input_ids": ..., "attention_mask": ...} as the tokenizer returns',
        shown(token),
        pad,
    )


@functools.cache
def _warn_of_two_beginnings(token: Any) -> None:
    """Text of `apply_chat_template(tokenize=False)` has the token, and the tokenizer adds another. Both are kept, as
    Hugging Face keeps them."""
    logger.warning(
        "a prompt begins with %s twice: the text has it, and the tokenizer adds it; take it out of the text, or give "
        "the chat's messages as the prompt",
        shown(token),
    )


def _plain_ids(prompt: Any, index: int) -> np.ndarray:
    """The ids of a prompt as unsigned integers, in which negative ids are very large numbers. As objects where one has
    more than 64 bits.

    A call can have hundreds of thousands of them, so that Python looks at none of them on its own.
    """
    if type(prompt) not in (list, tuple):  # as most are, and none of these questions is cheap
        if isinstance(prompt, (np.ndarray, torch.Tensor)):
            return _tensor_ids(prompt, index)
        if isinstance(prompt, array) and prompt.typecode == "i":  # as a server has encoded it before
            return np.frombuffer(prompt, np.uint32)
        if isinstance(prompt, _BYTES):
            raise PromptError(f"prompt {index} is {shown(prompt)}, {type(prompt).__name__} and not text; {_DECODE}")
        if not isinstance(prompt, Sequence):
            raise PromptError(f"prompt {index} is {shown(prompt)}; give a string, token ids or chat messages")
        prompt = tuple(prompt)
    values = _written(prompt)
    if values is not None:  # as nearly always
        return values
    for token in prompt:
        if not _is_int(token):
            raise PromptError(f"prompt {index} holds {shown(token)} where a token id should be; give integers")
    return _unsigned([int(token) for token in prompt])


def _tensor_ids(prompt: np.ndarray | torch.Tensor, index: int) -> np.ndarray:
    """`_plain_ids` of an array or a tensor, of which a row may be given as a matrix."""
    if prompt.ndim == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    if isinstance(prompt, np.ndarray):
        values = prompt if prompt.dtype.kind in "iu" else None
    else:
        # Integers need no gradient and are no view of a conjugate, so that `force=True`, which asks, has nothing to do.
        values = (prompt if prompt.is_cpu else prompt.cpu()).numpy() if prompt.dtype in _INTEGERS else None
    if values is None or values.ndim != 1:
        kind = str(prompt.dtype).rpartition(".")[2]
        raise PromptError(
            f"prompt {index} is a {kind} tensor of shape {tuple(prompt.shape)}; give integer ids [tokens]"
        )
    unsigned = _UNSIGNED.get(values.dtype.str)
    return _unsigned(values.tolist()) if unsigned is None else values.view(unsigned)


def _unsigned(ids: list[int]) -> np.ndarray:
    try:
        return np.array(ids, np.int64).view(np.uint64)
    except OverflowError:
        return np.array(ids, object)


_UNSIGNED = {np.dtype(kind).str: np.dtype(f"u{kind}") for kind in ("int32", "int64")}
_INTEGERS = frozenset(
    getattr(torch, f"{sign}int{bits}")
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
    if hasattr(torch, f"{sign}int{bits}")
)
"""Dtypes of tensors of ids."""
_largest = np.maximum.reduce  # what `max()` calls
_ID, _WRITTEN = np.dtype(np.int32), np.dtype("<u4")
"""Of ids that were checked; of ints as `marshal` writes them."""


def _written(ids: list[Any] | tuple[Any, ...]) -> np.ndarray | None:
    """The ids as an array; None unless all are of the class `int` and of 32 bits.

    `marshal` looks at the class and the value of each in one loop in C, in half of the time that two loops by Python's
    iterators take. What it writes begins with 5 bytes for the list, then has the letter i and the value in 4 bytes for
    each such int. Nothing else is written with that letter, so where every fifth byte is one, each began where the one
    before ended.
    """
    try:
        data = marshal.dumps(ids, 2)  # of later versions, equal objects may be written as references
    except ValueError:  # an object of another class
        return None
    if not ids or len(data) != 5 + 5 * len(ids) or data[5::5].count(b"i") != len(ids):
        return None
    return np.ndarray(len(ids), _WRITTEN, data, 6, (5,))


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _without_padding(items: list[Any], masks: Any) -> list[list[Any]]:
    """The ids of each prompt whose mask is 1."""
    many = isinstance(masks, Sequence) or (isinstance(masks, (torch.Tensor, np.ndarray)) and masks.ndim > 0)
    rows = list(masks) if many else []
    if len(rows) != len(items):
        raise PromptError(
            f"attention_mask={shown(masks)} does not fit the {len(items)} prompt(s) of input_ids; give a row for each"
        )
    kept = []
    for index, (item, mask) in enumerate(zip(items, rows, strict=True)):
        ids, keep = _values(item), _values(mask)
        if ids is None or keep is None or len(ids) != len(keep):
            raise PromptError(
                f"prompt {index} ({shown(item, 40)}) and its attention_mask {shown(mask, 40)} are not of one "
                "length; give a 0 or 1 for each token id"
            )
        for value in keep:
            if not isinstance(value, (int, float, np.number, np.bool_)) or value not in (0, 1):
                raise PromptError(
                    f"prompt {index} has {shown(value)} in its attention_mask; give a 0 or 1 per token id"
                )
        kept.append([token for token, value in zip(ids, keep, strict=True) if value])
    return kept


def _values(row: Any) -> list[Any] | None:
    """The elements of a list or a one-dimensional tensor; None for anything else."""
    if isinstance(row, (torch.Tensor, np.ndarray)):
        return row.tolist() if row.ndim == 1 else None
    return list(row) if isinstance(row, Sequence) and not isinstance(row, (str, *_BYTES)) else None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 80 else text[:77] + '...'}"
