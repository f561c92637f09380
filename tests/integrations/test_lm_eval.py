"""lm-evaluation-harness on an engine: the numbers of its own Hugging Face model, by request and by task."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hybridgen
from hybridgen.cli import main
from hybridgen.demo import model_path

FIELDS: dict[str, Any] = {"mode": "eager", "dtype": "float32", "device": "cpu", "kv_memory": "64MiB", "max_batch": 8}
TEXT = Path(hybridgen.errors.__file__).read_text()
PAIRS = [
    ("def f(a, b):\n    return", " a + b"),
    ("def f(a, b):\n    return ", "a + b"),  # the space belongs to what follows
    ("", "import os"),
    ("import ", "os"),
    (TEXT, "\n\n\nclass Last(HybridgenError):"),  # longer than the context
    ("x", " = 1"),
]


def test_without_the_harness_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "hybridgen.integrations.lm_eval", raising=False)
    assert main(["lm-eval", "--tasks", "x"]) == 2
    assert "pip install 'hybridgen[lm-eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def engine() -> Iterator[hybridgen.Engine]:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    with hybridgen.Engine.load(None, **FIELDS) as engine:
        yield engine


@pytest.fixture(scope="module")
def models(engine: hybridgen.Engine) -> tuple[Any, Any]:
    """Ours, and the harness's own."""
    from lm_eval.models.huggingface import HFLM

    from hybridgen.integrations.lm_eval import HybridgenLM

    theirs = HFLM(pretrained=str(model_path()), device="cpu", dtype="float32", batch_size=4)
    return HybridgenLM(engine, max_gen_toks=16), theirs


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def test_lengths_and_ids_are_the_same(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    assert ours.max_length == theirs.max_length
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    for text in ("import os", theirs.tokenizer.decode([theirs.prefix_token_id]) + "x"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)


def test_likelihoods(models: tuple[Any, Any]) -> None:
    ours, theirs = (model.loglikelihood(instances("loglikelihood", PAIRS)) for model in models)
    for (mine, greedy), (other, expected) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
        assert greedy == expected
    assert models[0].loglikelihood([]) == []


def test_rolling_likelihoods(models: tuple[Any, Any]) -> None:
    """One window and many."""
    texts = [("import os\n",), (TEXT,), ("x",)]
    ours, theirs = (model.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for model in models)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-3)


def test_generation(models: tuple[Any, Any]) -> None:
    asked = [
        ("def main():\n", {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}),
        ("import os\n", {"until": ["\n\n", "def"], "max_gen_toks": 24}),
        ("class A:\n", {"max_gen_toks": 8}),
        (TEXT, {"until": [")"], "max_gen_toks": 8}),
    ]
    ours, theirs = (model.generate_until(instances("generate_until", asked)) for model in models)
    assert ours == theirs
    drawn = instances(
        "generate_until", [("x", {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 3})]
    )
    assert len(models[0].generate_until(drawn)) == 1


def test_what_it_cannot_do_is_refused(models: tuple[Any, Any], engine: hybridgen.Engine) -> None:
    from hybridgen.integrations.lm_eval import HybridgenLM

    with pytest.raises(hybridgen.ConfigError, match=r"num_beams.*not known here"):
        models[0].generate_until(instances("generate_until", [("x", {"num_beams": 4})]))
    with pytest.raises(hybridgen.ConfigError, match="asks for 9999 tokens"):
        models[0].generate_until(instances("generate_until", [("x", {"max_gen_toks": 9999})]))
    with pytest.raises(hybridgen.ConfigError, match="is over max_length"):
        models[0].loglikelihood(instances("loglikelihood", [("x", TEXT)]))
    with pytest.raises(hybridgen.ConfigError, match="mode= cannot be changed"):
        HybridgenLM(engine, mode="jit")
    with pytest.raises(hybridgen.ConfigError, match="unknown keyword 'modus'"):
        HybridgenLM(None, modus="jit")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Tasks of three kinds, with their data, in a directory."""
    rows = [
        {
            "question": f"{a} + {b} =",
            "choices": [f" {a + b}", f" {a}", " 99"],
            "label": 0,
            "text": f"x = {a}\ny = {b}\n",
        }
        for a in range(3)
        for b in range(3)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\ntest_split: test\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: choice\n{data}output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (tmp_path / "rolling.yaml").write_text(
        f"task: rolling\n{data}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    (tmp_path / "until.yaml").write_text(
        f"task: until\n{data}output_type: generate_until\ndoc_to_text: text\ndoc_to_target: text\n"
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n"
    )
    return tmp_path


def test_tasks_have_the_same_results(models: tuple[Any, Any], tasks: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = []
    for model in models:
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        names = ["choice", "rolling", "until"]
        found.append(
            simple_evaluate(model=model, tasks=names, task_manager=manager, num_fewshot=0, bootstrap_iters=0)["results"]
        )
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name in theirs:
        for metric, value in theirs[name].items():
            if isinstance(value, float):
                assert ours[name][metric] == pytest.approx(value, rel=1e-4), (name, metric)


def test_the_command(engine: hybridgen.Engine, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--mode", "eager", "--dtype", "float32", "--device", "cpu", "--kv-memory", "64MiB", "--max-batch", "4"]
    arguments = ["--tasks", "choice", "--include_path", str(tasks), "--output_path", str(tasks / "out")]
    before = list(sys.argv)
    assert main(["lm-eval", *options, *arguments, "--model", str(model_path())]) == 0
    assert sys.argv == before
    [results] = (tasks / "out").rglob("results*.json")
    assert "choice" in json.loads(results.read_text())["results"]
    assert "choice" in capsys.readouterr().out
    assert main(["lm-eval", "--model", "a,b=c", "--tasks", "choice"]) == 2
    assert "has a comma" in capsys.readouterr().err
