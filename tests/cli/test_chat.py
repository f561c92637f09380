"""Chats on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hybridgen.cli.main import main
from hybridgen.demo import model_path

FAST = ["--mode", "eager", "--max-new-tokens", "3", "--dtype", "float32", "--max-batch", "4", "--kv-memory", "16MiB"]
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a chat template."""
    path = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(model_path(), path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main(["generate", *map(str, arguments), *FAST])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fed(capsys: pytest.CaptureFixture[str], model: Path, *arguments: Any) -> tuple[Any, str]:
    """The prompt of the one result, and its text as the model was fed it."""
    code, out, err = run(capsys, *arguments, "--model", model, "--json", "--prompt-logprobs", 0)
    assert code == 0, err
    record = json.loads(out)
    return record["prompt"], out


def test_a_prompt_is_what_the_user_says(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    prompt, _ = fed(capsys, model, "--chat", "hi")
    assert prompt == [{"role": "user", "content": "hi"}]
    prompt, _ = fed(capsys, model, "--system", "be short", "hi")
    assert prompt == [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]


def test_messages_come_from_a_file(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(json.dumps(said))
    assert fed(capsys, model, "--messages", file)[0] == said
    assert fed(capsys, model, "--messages", file, "c")[0] == [*said, {"role": "user", "content": "c"}]
    file.write_text(json.dumps({"messages": said, "tools": [{"name": "f"}]}))
    prompt, _ = fed(capsys, model, "--messages", file, "--system", "s", "c")
    assert prompt["tools"] == [{"name": "f"}]
    assert [message["role"] for message in prompt["messages"]] == ["system", "user", "assistant", "user"]


def test_only_the_answer_is_printed(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    code, out, _ = run(capsys, "--chat", "hi", "--model", model)
    assert code == 0
    assert "hi" not in out[:2]
    assert "[user]" not in out


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        (None, [], "cannot be read"),
        ("{", [], "is not JSON"),
        ("5", [], "holds 5; give a list, or"),
        ('{"messages": [], "x": 1}', [], "has 'x'"),
        ('[{"role": "system", "content": "a"}]', ["--system", "b"], "has a system message; leave out --system"),
        ("[]", ["--input", "x.jsonl"], "lines of --input have messages"),
    ],
)
def test_bad_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, more: list[str], words: str
) -> None:
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_text(content)
    code, out, err = run(capsys, "--messages", file, *more, "--model", "/no/such/model")
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_model_without_a_template_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--chat", "hi")
    assert (code, "has no chat template" in err) == (2, True)
