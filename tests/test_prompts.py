"""What counts as a prompt, and what does not."""

from typing import Any

import numpy as np
import pytest
import torch

from hybridgen.errors import PromptError, TokenizerError
from hybridgen.prompts import encode_prompt, is_text, split_prompts

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompts", "count", "single"),
    [
        ("text", 1, True),
        (["a", "b"], 2, False),
        (["a"], 1, False),
        ([1, 2, 3], 1, True),
        ([[1, 2], [3]], 2, False),
        (torch.tensor([1, 2]), 1, True),
        (torch.tensor([[1, 2], [3, 4]]), 2, False),
        (np.array([1, 2]), 1, True),
        ([torch.tensor([1, 2])], 1, False),
        (CHAT, 1, True),
        ([CHAT, CHAT], 2, False),
        (["a", [1, 2], CHAT], 3, False),
        ({"input_ids": [1, 2, 3]}, 1, True),
    ],
)
def test_one_prompt_or_a_list(prompts: Any, count: int, single: bool) -> None:
    items, alone = split_prompts(prompts)
    assert (len(items), alone) == (count, single)


@pytest.mark.parametrize("prompts", [[], 5, None, {"role": "user"}, torch.zeros(1, 2, 3)])
def test_what_is_no_prompt(prompts: Any) -> None:
    with pytest.raises(PromptError):
        split_prompts(prompts)


def test_only_text_and_chats_need_a_tokenizer() -> None:
    assert is_text("a")
    assert is_text(CHAT)
    assert not is_text([1, 2])


def encode(prompt: Any, tokenizer: Any = None) -> tuple[int, ...]:
    return encode_prompt(prompt, 3, tokenizer=tokenizer, tokenizer_problem="no file", vocab_size=100)


@pytest.mark.parametrize("prompt", [[1, 2], torch.tensor([1, 2]), torch.tensor([[1, 2]]), np.array([1, 2]), (1, 2)])
def test_ids_of_any_kind(prompt: Any) -> None:
    assert encode(prompt) == (1, 2)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty string"),
        ([], "no tokens"),
        ([1, 100], "token id 100, outside the vocabulary of 100"),
        ([-1], "token id -1"),
        ([1, "a"], "'a' where a token id should be"),
        ([1, True], "True where a token id"),
        (torch.tensor([1.0]), "float32 tensor"),
        (5, "give a string"),
    ],
)
def test_bad_prompts_name_the_prompt_and_the_value(prompt: Any, words: str) -> None:
    with pytest.raises(PromptError, match="prompt 3") as caught:
        encode(prompt)
    assert words in str(caught.value)


@pytest.mark.parametrize("prompt", ["text", CHAT])
def test_text_without_a_tokenizer(prompt: Any) -> None:
    with pytest.raises(TokenizerError, match="no file"):
        encode(prompt)


class ChatTokenizer:
    chat_template: str | None = "template"

    def apply_chat_template(self, messages: list, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        if messages[0]["role"] == "bad":
            raise ValueError("roles must alternate")
        return {"input_ids": [len(messages), 9]}


def test_a_chat_goes_through_the_template() -> None:
    assert encode(CHAT, ChatTokenizer()) == (1, 9)


def test_a_template_that_refuses_is_a_prompt_error() -> None:
    with pytest.raises(PromptError, match="roles must alternate"):
        encode([{"role": "bad", "content": ""}], ChatTokenizer())


def test_no_chat_template() -> None:
    tokenizer = ChatTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="chat template"):
        encode(CHAT, tokenizer)
