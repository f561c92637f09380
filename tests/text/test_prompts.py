"""What counts as a prompt, and what does not."""

import enum
import re
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BatchEncoding

from hybridgen.arguments import is_text
from hybridgen.demo import model_path
from hybridgen.errors import PromptError, TokenizerError
from hybridgen.text.prompts import _warn_of_padding, _warn_of_two_beginnings, encode_prompt, split_prompts

CHAT = [{"role": "user", "content": "hi"}]


class Column:
    """What a column of a table is: it can be gone through, and is no list."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


class Table(Column):
    """A data frame: going through it gives the names of its columns."""

    columns = ("prompt",)


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
        (np.array(["a", "b"]), 2, False),
        (np.array(["a", "b"], dtype=object), 2, False),
        ((text for text in ("a", "b")), 2, False),
        ({"x": "a", "y": "b"}.values(), 2, False),
        ({"prompt": "a"}, 1, True),
        ({"prompt": [1, 2]}, 1, True),
        ({"prompt": ["a", "b"]}, 2, False),
        ({"messages": CHAT}, 1, True),
        ([{"prompt": "a"}, {"messages": CHAT}, {"input_ids": [1], "attention_mask": [1]}], 3, False),
        (Column(["a", "b"]), 2, False),
    ],
)
def test_one_prompt_or_a_list(prompts: Any, count: int, single: bool) -> None:
    items, alone = split_prompts(prompts)
    assert (len(items), alone) == (count, single)


@pytest.mark.parametrize(
    "prompts", [[], 5, None, {"role": "user"}, torch.zeros(1, 2, 3), torch.tensor(3), {"a"}, iter(())]
)
def test_what_is_no_prompt(prompts: Any) -> None:
    with pytest.raises(PromptError):
        split_prompts(prompts)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (Table(["prompt"]), r"Table is a table; give one of its columns, such as table\['prompt'\]"),
        ({"prompt": "b", "temperature": 1}, "a row has 'temperature' beside 'prompt'"),
        ({"text": "a"}, "a mapping has 'prompt', 'messages' or 'input_ids'"),
    ],
)
def test_what_is_nearly_a_prompt(prompts: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        split_prompts(prompts)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "b", "temperature": 1}, "prompt 3: a row has 'temperature' beside 'prompt'"),
        ({"text": "a"}, "prompt 3: {'text': 'a'} is not a prompt"),
        ({"prompt": ["a", "b"]}, "holds 2 prompts; give one in each row"),
        ({"messages": CHAT, "tool": []}, "prompt 3 is a chat with 'tool'"),
        (float("nan"), "prompt 3 is nan; give a string"),
        (None, "prompt 3 is None; give a string"),
    ],
)
def test_a_bad_row_is_named_when_it_is_encoded(row: Any, words: str) -> None:
    [_, item], _ = split_prompts(["a", row])
    with pytest.raises(PromptError, match=re.escape(words)):
        encode(item, ChatTokenizer())


def test_rows_lose_what_is_around_them() -> None:
    rows = [{"prompt": "a"}, {"input_ids": [0, 1, 2], "attention_mask": [0, 1, 1]}, {"messages": CHAT}]
    assert split_prompts(rows)[0] == ["a", [1, 2], {"messages": CHAT}]


@pytest.mark.parametrize(
    ("ids", "warned"), [([1, 1, 9], True), ([1, 9, 1], False), ([9, 9, 1], False), ([1], False), ([2, 2, 9], False)]
)
def test_a_second_beginning_is_warned_of_and_kept(
    ids: list[int], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Adding:
        bos_token_id, bos_token, pad_token_id = 1, "[BOS]", None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": ids}

    _warn_of_two_beginnings.cache_clear()
    assert encode_prompt("[BOS]x", 0, tokenizer=Adding(), tokenizer_problem=None, vocab_size=10).tolist() == ids
    assert ("begins with '[BOS]' twice" in caplog.text) == warned


def test_padding_in_ids_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Padding:
        pad_token_id, pad_token, eos_token_id, bos_token_id = 7, "[PAD]", 2, 1

    for prompt, warned in (
        ([1, 5, 7, 5], False),
        ([7, 7, 1, 5], True),
        ([1, 5, 7], True),
        (torch.tensor([7, 5]), True),
    ):
        _warn_of_padding.cache_clear()
        caplog.clear()
        assert encode(prompt, Padding()) == tuple(map(int, prompt))
        assert ("padding token '[PAD]' (7)" in caplog.text) == warned
    Padding.pad_token_id = 2
    for prompt, warned in (([5, 2], False), ([5, 2, 2], True), ([2, 5], False)):
        _warn_of_padding.cache_clear()
        caplog.clear()
        encode(prompt, Padding())
        assert bool(caplog.text) == warned


def test_only_text_and_chats_need_a_tokenizer() -> None:
    assert is_text("a")
    assert is_text(CHAT)
    assert not is_text([1, 2])


def encode(prompt: Any, tokenizer: Any = None) -> tuple[int, ...]:
    pad = getattr(tokenizer, "pad_token_id", None)
    return tuple(encode_prompt(prompt, 3, tokenizer=tokenizer, tokenizer_problem="no file", vocab_size=100, pad=pad))


class Token(enum.IntEnum):
    """Ids with names."""

    ONE = 1


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2],
        torch.tensor([1, 2]),
        torch.tensor([[1, 2]]),
        np.array([1, 2]),
        *(np.array([1, 2], dtype=dtype) for dtype in ("b", "B", ">i2", "H", "i", "I", ">q", "Q")),
        np.array([1, 7, 2, 7])[::2],
        torch.tensor([[1, 7], [2, 7]])[:, 0],
        (1, 2),
        list(np.array([1, 2], dtype=np.int32)),
        [Token.ONE, 2],
        array("i", [1, 2]),
        array("H", [1, 2]),
    ],
)
def test_ids_of_any_kind(prompt: Any) -> None:
    ids = encode(prompt)
    assert ids == (1, 2)
    assert {type(token) for token in ids} == {int}


def test_ids_that_were_encoded_before_are_copied() -> None:
    given = array("i", [1, 2])
    ids = encode_prompt(given, 0, tokenizer=None, tokenizer_problem=None, vocab_size=10)
    given[0] = 7
    assert ids == array("i", [1, 2])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty string"),
        ([], "no tokens"),
        ([1, 100], "token id 100, outside the vocabulary of 100"),
        ([1, 2**80, 5], "outside the vocabulary of 100 (1 such"),
        (np.array([3, 2**63 + 1], dtype=np.uint64), "outside the vocabulary of 100 (1 such"),
        (np.array([3, -1], dtype=np.int8), "token id -1"),
        (np.array([3, -1], dtype=np.int32), "token id -1"),
        (torch.tensor([3, -200]), "token id -200"),
        ([-1], "token id -1"),
        ([1, "a"], "'a' where a token id should be"),
        ([1, True], "True where a token id"),
        ([True, 1.5, None], "True where a token id"),
        ([1, None, b"iiiiiiiii"], "None where a token id"),
        ([1, [105] * 5], "[105, 105, 105, 105, 105] where a token id"),
        ([1, 2**31], "token id 2147483648"),
        ([1, 2**32 + 5], "token id 4294967301"),
        ([1, -(2**31)], "token id -2147483648"),
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
        assert options == {
            "add_generation_prompt": True, "continue_final_message": False, "tokenize": True, "return_dict": True,
        }  # fmt: skip
        if messages[0]["role"] == "bad":
            raise ValueError("roles must alternate")
        return {"input_ids": [len(messages), 9]}


def test_a_chat_goes_through_the_template() -> None:
    assert encode(CHAT, ChatTokenizer()) == (1, 9)


def test_a_template_that_refuses_is_a_prompt_error() -> None:
    with pytest.raises(PromptError, match="roles must alternate"):
        encode([{"role": "bad", "content": ""}], ChatTokenizer())


def test_an_answer_that_has_begun_is_gone_on_with() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "x = {"}
    texts = [
        tokenizer.decode(encode_prompt(chat, 0, tokenizer=tokenizer, tokenizer_problem=None, vocab_size=4096))
        for chat in ([question], [question, answer], [question, answer, question])
    ]
    assert [text.removeprefix(tokenizer.bos_token or "") for text in texts] == [
        "[user]q[end][assistant]",
        "[user]q[end][assistant]x = {",
        "[user]q[end][assistant]x = {[end][user]q[end][assistant]",
    ]


def test_no_chat_template() -> None:
    tokenizer = ChatTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="chat template"):
        encode(CHAT, tokenizer)


PADDED = {"input_ids": [[0, 0, 5, 6], [7, 8, 9, 4]], "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}


def of_kind(convert: Any) -> dict[str, Any]:
    return {name: convert(rows) for name, rows in PADDED.items()}


@pytest.mark.parametrize(
    "batch",
    [
        PADDED,
        of_kind(torch.tensor),
        of_kind(np.array),
        of_kind(lambda rows: [torch.tensor(row) for row in rows]),
        {"input_ids": torch.tensor(PADDED["input_ids"]), "attention_mask": PADDED["attention_mask"]},
        {"input_ids": PADDED["input_ids"], "attention_mask": torch.tensor(PADDED["attention_mask"]).bool()},
        {"input_ids": [[5, 6, 1], [7, 8, 9, 4]], "attention_mask": [[1, 1, 0], [1.0, 1.0, 1.0, 1.0]]},
        BatchEncoding(PADDED),
        BatchEncoding(PADDED, tensor_type="pt"),
    ],
)
def test_padding_is_dropped(batch: Any) -> None:
    items, single = split_prompts(batch)
    assert not single
    assert [encode(item) for item in items] == [(5, 6), (7, 8, 9, 4)]


@pytest.mark.parametrize("convert", [list, torch.tensor, np.array])
def test_padding_of_one_prompt_is_dropped(convert: Any) -> None:
    items, single = split_prompts({"input_ids": convert([5, 6, 0]), "attention_mask": convert([1, 1, 0])})
    assert single
    assert [encode(item) for item in items] == [(5, 6)]


def test_a_mask_of_none_keeps_all() -> None:
    assert split_prompts({"input_ids": [5, 6, 0], "attention_mask": None}) == ([[5, 6, 0]], True)


def test_nothing_but_padding() -> None:
    items, _ = split_prompts({"input_ids": [5, 6], "attention_mask": [0, 0]})
    with pytest.raises(PromptError, match="no tokens"):
        encode(items[0])


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        ([1, 2, 3], [1, 1]),
        ([1, 2, 3], 1),
        ([1, 2, 3], [[1, 1, 1]]),
        ([1, 2, 3], [0, 2, 1]),
        ([1, 2, 3], [0, None, 1]),
        ([1, 2, 3], [0, float("nan"), 1]),
        ([1, 2, 3], "111"),
        ([[1, 2, 3]], [1, 1, 1]),
        ([[1, 2, 3]], [[1, 1, 1], [1, 1, 1]]),
        ([[1, 2, 3]], 5),
        ([[1, 2, 3], [1, 2]], [[1], [1, 1]]),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(3)),
        (torch.ones(2, 3, dtype=torch.int64), torch.tensor(1)),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 1, 3, 3)),
        (["a text"], [[1]]),
    ],
)
def test_a_mask_that_does_not_fit(ids: Any, mask: Any) -> None:
    with pytest.raises(PromptError, match="attention_mask") as caught:
        split_prompts({"input_ids": ids, "attention_mask": mask})
    assert len(str(caught.value)) < 210


@pytest.mark.parametrize("data", [b"text", b"", bytearray(b"text"), memoryview(b"text")])
def test_bytes_are_no_token_ids(data: Any) -> None:
    with pytest.raises(PromptError, match=f"is {type(data).__name__}, not text; decode it first"):
        split_prompts(data)
    items, _ = split_prompts([data, data])
    with pytest.raises(PromptError, match=f"prompt 3 is .*{type(data).__name__} and not text; decode it first"):
        encode(items[0])


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
@pytest.mark.parametrize("shape", [(0, 0), (0, 4)])
def test_a_tensor_of_no_prompts(make: Any, shape: tuple[int, int]) -> None:
    with pytest.raises(PromptError, match=r"shape \(0, \d\) is empty; give at least one"):
        split_prompts(make(shape))


class Refusing:
    """A tokenizer that takes no text."""

    def __call__(self, text: str) -> dict[str, Any]:
        raise TypeError("TextEncodeInput must be Union[...] " * 20)


class Nested:
    """A tokenizer that returns a batch, as with `return_tensors="pt"`."""

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[4, 5]])}


def test_what_a_tokenizer_raises_is_a_prompt_error() -> None:
    with pytest.raises(
        PromptError, match=r"prompt 3 \('some text'\) cannot be encoded by the tokenizer: TypeErr"
    ) as it:
        encode("some text", Refusing())
    assert len(str(it.value)) < 210
    assert isinstance(it.value.__cause__, TypeError)
    assert encode("some text", Nested()) == (4, 5)


def test_a_lone_surrogate() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    text = "some \ud800 text"
    with pytest.raises(
        PromptError, match=r"prompt 3 \('some \\ud800 text'\) .* lone surrogate, '\\ud800'\) at 5; give"
    ):
        encode(text, tokenizer)
    repaired = text.encode(errors="replace").decode()
    assert encode_prompt(repaired, 0, tokenizer=tokenizer, tokenizer_problem=None, vocab_size=len(tokenizer))
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(PromptError, match=r"prompt 3 .* the chat template refused the messages: "):
        encode([{"role": "user", "content": text}], tokenizer)


@pytest.mark.parametrize("token", [10**400, 10**5000, -(10**5000)], ids=["long", "longer", "negative"])
def test_a_huge_token_id(token: int) -> None:
    with pytest.raises(PromptError, match="outside the vocabulary") as caught:
        encode([1, token])
    assert len(str(caught.value)) < 200
