"""Chats as prompts: the tokenizer's template gets what transformers would give it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from hybridgen.demo import model_path
from hybridgen.errors import PromptError, TokenizerError
from hybridgen.text.chats import encode_chat

TEMPLATE = (
    "{% if tools %}tools:{% for t in tools %}{{ t['function']['name'] }},{% endfor %}{% endif %}"
    "{% if thinking %}think\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER: dict[str, Any] = {"role": "user", "content": "q"}
BEGUN: dict[str, Any] = {"role": "assistant", "content": "x ="}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    loaded = AutoTokenizer.from_pretrained(model_path())
    loaded.chat_template = TEMPLATE
    return loaded


def text(tokenizer: Any, chat: Any) -> str:
    return tokenizer.decode(encode_chat(chat, 0, tokenizer)).removeprefix(tokenizer.bos_token or "")


def look(city: str) -> str:
    """Look at the sky.

    Args:
        city: where.
    """
    return city


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ([USER], "[user]q[end][assistant]"),
        ({"messages": [USER]}, "[user]q[end][assistant]"),
        ({"messages": [USER], "add_generation_prompt": False}, "[user]q[end]"),
        ({"messages": [USER], "continue_final_message": True}, "[user]q"),
        ([USER, BEGUN], "[user]q[end][assistant]x ="),
        ([USER, BEGUN | {"content": '  {"a": '}], '[user]q[end][assistant]  {"a": '),
        ([USER, BEGUN | {"content": ""}], "[user]q[end][assistant]"),
        ({"messages": [USER, BEGUN], "continue_final_message": False}, "[user]q[end][assistant]x =[end][assistant]"),
        ({"messages": [USER, BEGUN], "add_generation_prompt": True}, "[user]q[end][assistant]x =[end][assistant]"),
        ({"messages": [USER], "tools": [{"function": {"name": "f"}}]}, "tools:f,[user]q[end][assistant]"),
        ({"messages": [USER], "tools": [look]}, "tools:look,[user]q[end][assistant]"),
        ({"messages": [USER], "chat_template_kwargs": {"thinking": True}}, "think\n[user]q[end][assistant]"),
        ({"messages": [USER], "chat_template": "{{ messages[0].content }}!"}, "q!"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "[user]a\nb[end][assistant]",
        ),
    ],
)
def test_what_the_template_gets(tokenizer: Any, chat: Any, expected: str) -> None:
    assert text(tokenizer, chat) == expected


def test_it_is_what_transformers_makes_of_it(tokenizer: Any) -> None:
    tools, extra = [{"function": {"name": "f"}}], {"thinking": True}
    theirs = tokenizer.apply_chat_template([USER], tools=tools, add_generation_prompt=True, **extra)["input_ids"]
    chat = {"messages": [USER], "tools": tools, "chat_template_kwargs": extra}
    assert list(encode_chat(chat, 0, tokenizer)) == list(theirs)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ({"messages": []}, "messages=[]; give a list of at least one"),
        ({"messages": "hi"}, "messages='hi'"),
        ({"messages": [{"content": "x"}]}, "each needs a 'role'"),
        ({"messages": [USER], "add_generation_prompt": 1}, "add_generation_prompt=1; give True or False"),
        (
            {"messages": [USER, BEGUN], "continue_final_message": True, "add_generation_prompt": True},
            "has both add_generation_prompt and continue_final_message",
        ),
        ({"messages": [USER], "chat_template_kwargs": {"tools": []}}, "has tools in chat_template_kwargs"),
        ({"messages": [USER], "chat_template_kwargs": 3}, "chat_template_kwargs=3"),
        ({"messages": [USER], "chat_template_kwargs": {"max_length": 2}}, "has max_length in chat_template_kwargs"),
        ([{"role": "user", "content": "a\ud800"}], "half a character"),
        ({"messages": [USER], "tools": "f"}, "tools='f'; give a list"),
        ({"messages": [USER], "tools": [lambda x: x]}, "has no schema"),
        ({"messages": [USER], "chat_template": "{{ raise_exception('no') }}"}, "the chat template refused"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "models read text here"),
        ([{"role": "user", "content": [{"type": "image"}, "x"]}], 'or {"type": "text", "text": ...}'),
    ],
)
def test_what_is_refused(tokenizer: Any, chat: Any, words: str) -> None:
    with pytest.raises(PromptError, match=r"^prompt 4") as caught:
        encode_chat(chat, 4, tokenizer)
    assert words in str(caught.value)


def test_a_template_in_the_prompt_does_without_the_tokenizers() -> None:
    plain = AutoTokenizer.from_pretrained(model_path())
    plain.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        encode_chat([USER], 0, plain)
    assert text(plain, {"messages": [USER], "chat_template": "{{ messages[0].content }}"}) == "q"
