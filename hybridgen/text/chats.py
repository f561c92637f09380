"""Chats as prompts: what may be in one, and its way through the tokenizer's template to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridgen.errors import PromptError, TokenizerError, first_line, shown
from hybridgen.text.chat_templates import NOT_VARIABLES, ChatTemplateError, apply_chat_template

CHAT_KEYS = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
    }
)
"""What a chat can have that is given as a mapping. All but `chat_template_kwargs` are arguments of transformers'
`apply_chat_template`; that one holds the template's own keywords."""


def encode_chat(chat: Any, index: int, tokenizer: Any) -> Any:
    """The token ids that the tokenizer's template makes of a chat.

    Args:
        chat: a list of messages, or a mapping with `messages` and other `CHAT_KEYS`.
        index: which prompt it is, for errors.

    Raises:
        PromptError: it is no chat, has something else than text in it, or the template refused it.
        TokenizerError: the tokenizer has no chat template.
    """
    given = dict(chat) if isinstance(chat, Mapping) else {"messages": chat}
    unknown = sorted(set(given) - CHAT_KEYS)
    if unknown:
        known = ", ".join(sorted(CHAT_KEYS))
        raise PromptError(f"prompt {index} is a chat with {shown(unknown[0])}, which says nothing here; give {known}")
    messages = _messages(given.pop("messages"), index)
    template = given.get("chat_template")
    if template is None and not getattr(tokenizer, "chat_template", None):
        raise TokenizerError(
            f"prompt {index} is a chat and the tokenizer has no chat template; give text, set tokenizer.chat_template, "
            'or give {"messages": ..., "chat_template": ...}'
        )
    if given.get("tools") is not None:
        given["tools"] = _tools(given["tools"], index)
    arguments = {**_keywords(given.pop("chat_template_kwargs", None), index), **given, **_turn(given, messages, index)}
    try:
        return apply_chat_template(tokenizer, messages, **arguments, tokenize=True, return_dict=True)["input_ids"]
    except Exception as error:  # templates are programs of the checkpoint and raise what they like
        text = " ".join(str(error).split())
        name = "" if isinstance(error, ChatTemplateError) else f"{type(error).__name__}: "  # it says what was raised
        raise PromptError(
            f"prompt {index} ({shown(messages, 30)}): the chat template refused the messages: {name}{text[:80]}; "
            "change them"
        ) from error


def _turn(given: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], index: int) -> dict[str, bool]:
    """Who goes on: the model with an answer of its own, or with the last message."""
    for name in ("add_generation_prompt", "continue_final_message"):
        if not isinstance(given.get(name, False), bool):
            raise PromptError(f"prompt {index} has {name}={shown(given[name])}; give True or False")
    # An answer that has begun is gone on with, as Hugging Face's pipeline does.
    begun = not given.get("add_generation_prompt", False) and messages[-1]["role"] == "assistant"
    if given.get("continue_final_message", begun):
        if given.get("add_generation_prompt", False):
            raise PromptError(
                f"prompt {index} has both add_generation_prompt and continue_final_message; the last message is gone "
                "on with, or a new one begins: leave one out"
            )
        return {"continue_final_message": True, "add_generation_prompt": False}
    return {"continue_final_message": False, "add_generation_prompt": given.get("add_generation_prompt", True)}


def _tools(tools: Any, index: int) -> list[Any]:
    """JSON schemas of tools; of a function, what transformers reads from its annotations and docstring."""
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise PromptError(f"prompt {index} has tools={shown(tools)}; give a list of JSON schemas or functions")
    found = []
    for tool in tools:
        if callable(tool):
            from transformers.utils import get_json_schema

            try:
                tool = get_json_schema(tool)
            except Exception as error:  # what its annotations or its docstring lack
                raise PromptError(
                    f"prompt {index}: the tool {shown(tool)} has no schema: {first_line(error)}"
                ) from error
        found.append(tool)
    return found


def _keywords(value: Any, index: int) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise PromptError(
            f"prompt {index} has chat_template_kwargs={shown(value)}; give a dict of the template's keywords"
        )
    taken = sorted((CHAT_KEYS | NOT_VARIABLES) & set(value))
    if taken:
        wanted = (
            "give it beside 'messages', or not at all" if taken[0] in CHAT_KEYS else "templates have none; leave it out"
        )
        raise PromptError(f"prompt {index} has {taken[0]} in chat_template_kwargs; {wanted}")
    return dict(value)


def _messages(messages: Any, index: int) -> list[Mapping[str, Any]]:
    """The messages, with their parts of text joined."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise PromptError(f"prompt {index} has messages={shown(messages)}; give a list of at least one message")
    found = []
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise PromptError(f"prompt {index} has {shown(message)} among its chat messages; each needs a 'role'")
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            message = {**message, "content": "\n".join(_text_of(part, index) for part in content)}
        found.append(message)
    return found


def _text_of(part: Any, index: int) -> str:
    """The text of a part of a message, as OpenAI's clients write it."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise PromptError(
        f"prompt {index} has {shown(part)} in a message; models read text here: give the text, or "
        '{"type": "text", "text": ...}'
    )
