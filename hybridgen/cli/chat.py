"""Chats on the command line: `--chat`, `--system` and `--messages`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hybridgen.errors import PromptError, shown
from hybridgen.text.chats import CHAT_KEYS


def is_chat(arguments: argparse.Namespace) -> bool:
    """Whether prompts are what a user says in a chat."""
    return bool(arguments.chat or arguments.system is not None or arguments.messages is not None)


def chat_of(prompt: str | None, arguments: argparse.Namespace) -> Any:
    """A chat: the system message, those of the file, and what the user says.

    Args:
        prompt: None: the user says nothing more.

    Raises:
        PromptError: the file cannot be read, is no chat, or has a system message besides `--system`.
    """
    chat = {"messages": []} if arguments.messages is None else _read(arguments.messages)
    messages = list(chat["messages"])
    if arguments.system is not None:
        if any(isinstance(message, dict) and message.get("role") == "system" for message in messages):
            raise PromptError(f"{arguments.messages} has a system message; leave out --system")
        messages.insert(0, {"role": "system", "content": arguments.system})
    if prompt is not None:
        messages.append({"role": "user", "content": prompt})
    return messages if len(chat) == 1 else {**chat, "messages": messages}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise PromptError(f"--messages {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"--messages {path} is not JSON: {error}") from error
    chat = {"messages": value} if isinstance(value, list) else value
    if not isinstance(chat, dict) or not isinstance(chat.get("messages"), list):
        raise PromptError(f"--messages {path} holds {shown(value)}; give a list, or an object with 'messages'")
    unknown = sorted(set(chat) - CHAT_KEYS)
    if unknown:
        known = ", ".join(sorted(CHAT_KEYS))
        raise PromptError(f"--messages {path} has {shown(unknown[0])}, which says nothing here; give {known}")
    return chat
