"""What users give as prompts, turned into token ids, and checked."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from operator import countOf
from typing import Any, TypeAlias

import numpy as np
import torch

from hybridgen.arguments import is_text
from hybridgen.errors import PromptError, TokenizerError, shown
from hybridgen.text.chat_templates import ChatTemplateError, apply_chat_template

logger = logging.getLogger(__name__)

Message: TypeAlias = Mapping[str, Any]
"""A chat message: `role`, `content`, and whatever else the tokenizer's chat template reads."""
Prompt: TypeAlias = "str | Sequence[int] | torch.Tensor | np.ndarray | Sequence[Message]"
"""Text, token ids, or the messages of a chat."""
Prompts: TypeAlias = "Prompt | Sequence[Prompt]"
"""One prompt or a list of prompts."""

_BYTES = (bytes, bytearray, memoryview)
_DECODE = "decode it first, for example with data.decode()"


def split_prompts(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether there was only one, not in a list.

    A list of ids or of chat messages is one prompt; a two-dimensional tensor or a list of anything else is a list
    of prompts. Of what a tokenizer returns, the ids that its `attention_mask` leaves out (padding) are dropped.

    Raises:
        PromptError: the value is no prompt, or an empty list.
    """
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, _BYTES):
        raise PromptError(f"prompts={shown(prompts)} is {type(prompts).__name__}, not text; {_DECODE}")
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
    if isinstance(prompts, Mapping) and "input_ids" in prompts:  # what a tokenizer returns
        items, single = split_prompts(prompts["input_ids"])
        mask = prompts.get("attention_mask")
        return (items if mask is None else _without_padding(items, [mask] if single else mask)), single
    if isinstance(prompts, Mapping) or not isinstance(prompts, Sequence):
        raise PromptError(
            f"{shown(prompts)} is not a prompt; give a string, token ids, a list of chat messages, or a list of those"
        )
    if not prompts:
        raise PromptError("the prompt list is empty; give at least one prompt")
    single = _is_int(prompts[0]) or (isinstance(prompts[0], Mapping) and "role" in prompts[0])
    return ([prompts], True) if single else (list(prompts), False)


def is_pair(prompt: Any) -> bool:
    """Whether it is a prompt with a completion to score behind it: `{"prompt": ..., "completion": ...}`."""
    return isinstance(prompt, Mapping) and "completion" in prompt


def encode_pair(pair: Mapping[str, Any], index: int, **how: Any) -> tuple[tuple[int, ...], int]:
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
    last = prompt[-1]
    if last["role"] == "assistant":
        return [*prompt[:-1], {**last, "content": last["content"] + completion}]
    return [*prompt, {"role": "assistant", "content": completion}]


def encode_prompt(
    prompt: Any, index: int, *, tokenizer: Any, tokenizer_problem: str | None, vocab_size: int
) -> tuple[int, ...]:
    """Token ids of one prompt.

    Text is encoded with the tokenizer's own special tokens; chat messages through its chat template with the
    generation prompt added.

    Raises:
        PromptError: it is empty, of no known kind, refused by the tokenizer, or has ids outside the vocabulary.
        TokenizerError: it is text or a chat and the model has no tokenizer or no chat template.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError(f"prompt {index} is an empty string; give at least one character")
        ids = _encode_text(prompt, index, _require(tokenizer, tokenizer_problem))
    elif is_text(prompt):
        ids = _encode_chat(prompt, index, _require(tokenizer, tokenizer_problem))
    else:
        ids = _plain_ids(prompt, index)
    if not ids:
        raise PromptError(f"prompt {index} ({shown(prompt)}) has no tokens; give at least one")
    if not _all_inside(ids, vocab_size):
        wrong = [token for token in ids if not 0 <= token < vocab_size]
        raise PromptError(
            f"prompt {index} holds token id {shown(wrong[0])}, outside the vocabulary of {vocab_size} "
            f"({len(wrong)} such id(s)); was it encoded with another model's tokenizer?"
        )
    return ids


def _all_inside(ids: Sequence[int], vocab_size: int) -> bool:
    """Whether all ids are of the vocabulary. A call can have hundreds of thousands, so numpy looks at them."""
    try:
        values = np.fromiter(ids, np.int64, len(ids))
    except OverflowError:
        return False
    return bool(values.view(np.uint64).max() < vocab_size)  # a negative id is a very large one there


def _require(tokenizer: Any, problem: str | None) -> Any:
    if tokenizer is None:
        raise TokenizerError(
            f"a text prompt needs a tokenizer and the model has none ({problem or 'none was given'}); "
            "give token ids, or pass tokenizer="
        )
    return tokenizer


def _encode_text(text: str, index: int, tokenizer: Any) -> tuple[int, ...]:
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
    plain = _plain_ids(ids, index)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and plain[:2] == (bos, bos):
        _warn_of_two_beginnings(getattr(tokenizer, "bos_token", None))
    return plain


@functools.cache
def _warn_of_two_beginnings(token: Any) -> None:
    """Text of `apply_chat_template(tokenize=False)` has the token, and the tokenizer adds another. Both are kept, as
    Hugging Face keeps them."""
    logger.warning(
        "a prompt begins with %s twice: the text has it, and the tokenizer adds it; take it out of the text, or give "
        "the chat's messages as the prompt",
        shown(token),
    )


def _encode_chat(messages: Sequence[Message], index: int, tokenizer: Any) -> tuple[int, ...]:
    if not getattr(tokenizer, "chat_template", None):
        raise TokenizerError(
            f"prompt {index} is a list of chat messages and the tokenizer has no chat template; give text, or set "
            "tokenizer.chat_template"
        )
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise PromptError(f"prompt {index} has {shown(message)} among its chat messages; each needs a 'role'")
    # An answer that has begun is gone on with, as Hugging Face's pipeline does.
    begun = messages[-1]["role"] == "assistant"
    turn = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
    try:
        encoded = apply_chat_template(tokenizer, list(messages), **turn, tokenize=True, return_dict=True)
        ids = encoded["input_ids"]
    except Exception as error:  # templates are programs of the checkpoint and raise what they like
        raise PromptError(
            f"prompt {index} ({shown(messages, 30)}): the chat template refused the messages: {_reason(error)}; change "
            "them"
        ) from error
    return _plain_ids(ids, index)


def _plain_ids(prompt: Any, index: int) -> tuple[int, ...]:
    if isinstance(prompt, (torch.Tensor, np.ndarray)):
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        kind = str(prompt.dtype).rpartition(".")[2]
        if prompt.ndim != 1 or not kind.startswith(("int", "uint")):
            shape = tuple(prompt.shape)
            raise PromptError(f"prompt {index} is a {kind} tensor of shape {shape}; give integer ids [tokens]")
        return tuple(prompt.tolist())
    if isinstance(prompt, _BYTES):
        raise PromptError(f"prompt {index} is {shown(prompt)}, {type(prompt).__name__} and not text; {_DECODE}")
    if not isinstance(prompt, Sequence):
        raise PromptError(f"prompt {index} is {shown(prompt)}; give a string, token ids or chat messages")
    if countOf(map(type, prompt), int) == len(prompt):  # as nearly always
        return tuple(prompt)
    for token in prompt:
        if not _is_int(token):
            raise PromptError(f"prompt {index} holds {shown(token)} where a token id should be; give integers")
    return tuple(int(token) for token in prompt)


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
    name = "" if isinstance(error, ChatTemplateError) else f"{type(error).__name__}: "  # it says what was raised
    return f"{name}{text if len(text) <= 80 else text[:77] + '...'}"
