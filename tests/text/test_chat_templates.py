"""Chat templates in their own process: the same text as in this one, and an end to those that have none."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest
from transformers import AutoTokenizer

from hybridgen.demo import model_path
from hybridgen.text.chat_templates import ChatTemplateError, Renderer, apply_chat_template

GOOD = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | tojson }}{% if m.more is defined %}"
    "{{ m.more }}{% endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
CHAT = [{"role": "user", "content": "x"}]


class Role(str, enum.Enum):  # noqa: UP042
    USER = "user"


@dataclasses.dataclass
class More:
    a: int


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    loaded = AutoTokenizer.from_pretrained(model_path())
    loaded.chat_template = GOOD
    return loaded


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    """One with a short time and little room."""
    made = Renderer(seconds=1.0, memory=2**27, output=10_000)
    yield made
    made.close()


@pytest.mark.parametrize(
    "messages",
    [
        CHAT,
        [
            {"role": "system", "content": "é 漢 🙂 \n<x>&'\""},
            *CHAT,
            {"role": "assistant", "content": "y", "none": None},
        ],
        [{"role": "user", "content": [{"type": "text", "text": "x"}], "more": {1: (2, 3.5, None, True), "b": []}}],
        [{"role": "user", "content": "half \ud800"}],
        [MappingProxyType({"role": "user", "content": "x"})],
    ],
)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}])
def test_the_same_text(tokenizer: Any, messages: Any, options: dict[str, Any]) -> None:
    expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert apply_chat_template(tokenizer, messages, tokenize=False, **options) == expected


def test_the_same_ids(tokenizer: Any) -> None:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    assert dict(apply_chat_template(tokenizer, CHAT, **options)) == dict(tokenizer.apply_chat_template(CHAT, **options))


def test_values_of_other_types(tokenizer: Any) -> None:
    chat = [{"role": Role.USER, "content": "x", "more": More(5)}]
    assert apply_chat_template(tokenizer, chat, tokenize=False).endswith("[user]\"x\"{'a': 5}")
    with pytest.raises(TypeError, match="a chat holds a object"):
        apply_chat_template(tokenizer, [{"role": "user", "content": object()}], tokenize=False)


def test_the_users_tokenizer_is_unchanged(tokenizer: Any) -> None:
    before = type(tokenizer).apply_chat_template
    apply_chat_template(tokenizer, CHAT, tokenize=False)
    assert type(tokenizer).apply_chat_template is before
    assert before.__globals__["render_jinja_template"].__module__.startswith("transformers.")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
        "{{ 9 ** (9 ** 9) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ '%010000000000d' % 1 }}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{{ (range(99999) | list) * 99999 }}",
        "{{ 'a' * 20000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_without_an_end(renderer: Renderer, template: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"ended|memory|10000|without end"):
        renderer.render(conversations=[CHAT], chat_template=template)
    assert renderer.render(conversations=[CHAT], chat_template="{{ messages[0].content }}") == (["x"], [])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% if %}", "TemplateSyntaxError: "),
        ("{{ messages[7].content }}", "UndefinedError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
    ],
)
def test_templates_that_refuse(renderer: Renderer, template: str, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        renderer.render(conversations=[CHAT], chat_template=template)


def test_after_a_fork(renderer: Renderer) -> None:
    template = "{{ messages[0].content }}"
    assert renderer.render(conversations=[CHAT], chat_template=template) == (["x"], [])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if renderer.render(conversations=[CHAT], chat_template=template) == (["x"], []) else 2
            renderer.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert renderer.render(conversations=[CHAT], chat_template=template) == (["x"], [])


def test_closing_leaves_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    made = Renderer()
    made.start()
    process = made._process
    made.close()
    made.close()
    assert process is not None
    assert process.poll() is not None
    assert len(os.listdir("/proc/self/fd")) == before
    made.start()  # and begins again
    made.close()
