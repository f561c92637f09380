"""The served model's tokenizer, as the HTTP door uses it. What takes long is called in other threads."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from hybridgen.errors import PromptError, TokenizerError, shown
from hybridgen.serving.http.errors import ApiError
from hybridgen.text.chat_templates import ChatTemplateError, apply_chat_template

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Text:
    """Encodes prompts and chats, and says what a token is."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._byte_level = _is_byte_level(tokenizer)
        self.token_bytes = functools.lru_cache(2**16)(self._token_bytes)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer adds.

        Raises:
            ApiError: the tokenizer refuses it.
        """
        try:
            text.encode()
            ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        except UnicodeEncodeError:
            raise ApiError("the text holds half a character (a lone surrogate); send valid Unicode") from None
        except Exception as error:  # a tokenizer can be anybody's
            raise ApiError(f"the tokenizer refused the text {shown(text, 30)}: {type(error).__name__}") from error
        return [int(each) for each in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Ids of a chat, through the tokenizer's template.

        Args:
            options: of `apply_chat_template`, and variables of the template.

        Raises:
            TokenizerError: there is no template.
            PromptError: it refused the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise TokenizerError("the model's tokenizer has no chat template; use /v1/completions, or --chat-template")
        try:
            encoded = apply_chat_template(self.tokenizer, messages, tokenize=True, return_dict=True, **options)
        except ChatTemplateError as error:
            raise PromptError(f"the chat template refused the messages: {error}") from None
        except Exception as error:  # templates and tokenizers raise what they like
            raise PromptError(f"the chat template refused the messages: {type(error).__name__}: {error}") from error
        return [int(each) for each in encoded["input_ids"]]

    def token(self, token_id: int) -> str:
        """What a token is in text; where it is part of a character, its bytes as OpenAI writes them."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{each:02x}" for each in data)

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        name = self.tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(name, str):
            return b""  # of the model's vocabulary, not of the tokenizer's
        if token_id in self._special:
            return name.encode("utf-8", "replace")
        if self._byte_level:
            table = _byte_of()
            if all(each in table for each in name):
                return bytes(table[each] for each in name)
        found = _BYTE.fullmatch(name)
        if found is not None:
            return bytes([int(found[1], 16)])
        return name.replace("\u2581", " ").encode("utf-8", "replace")


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether tokens are written in GPT-2's characters for bytes: an encoded space tells."""
    try:
        names = tokenizer.convert_ids_to_tokens(tokenizer("a b", add_special_tokens=False)["input_ids"])
    except Exception:  # a tokenizer can be anybody's; then its tokens are shown as they are written
        return False
    return any("\u0120" in name for name in names)


@functools.cache
def _byte_of() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others are moved up in order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(each): each for each in plain}
    others = [each for each in range(256) if each not in set(plain)]
    return table | {chr(256 + index): each for index, each in enumerate(others)}


def chat_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """OpenAI's messages as chat templates of Hugging Face read them.

    Text parts are joined, `developer` is `system`, and arguments of tool calls become objects.

    Raises:
        ApiError: a message is of no such form, or holds something that is not text.
    """
    if not messages:
        raise ApiError("messages is empty; send at least one message", param="messages")
    return [_message(index, each) for index, each in enumerate(messages)]


def _message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ApiError(f"{where} is {shown(message)}, not an object", param="messages")
    role = message.get("role")
    if role not in _ROLES:
        raise ApiError(f"{where} has the role {shown(role)}; give one of {', '.join(_ROLES)}", param="messages")
    result = {name: value for name, value in message.items() if value is not None}
    result["role"] = "system" if role == "developer" else role
    result["content"] = _content(where, message.get("content"))
    calls = message.get("tool_calls")
    if calls:
        result["tool_calls"] = [_tool_call(where, each) for each in (calls if isinstance(calls, list) else [calls])]
    return result


def _content(where: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"{where} has the content {shown(content)}; give text or text parts", param="messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise ApiError(f"{where} has a part of type {shown(kind)}; this model takes text", param="messages")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise ApiError(f"{where} has a text part without text", param="messages")
        texts.append(text)
    return "".join(texts)


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    import json

    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(f"{where} has a tool call without a function", param="messages")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise ApiError(f"{where} has a tool call whose arguments are no JSON", param="messages") from None
    return {**call, "function": {**function, "arguments": arguments}}
