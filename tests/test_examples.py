"""Every script in docs/examples runs on the demo model as it is."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PRINTED = {
    "best_of_n.py": r"\* *-\d",
    "evaluate.py": r"accuracy [01]\.\d+",
    "grpo.py": r"2 steps, \d+ tokens generated",
    "multiple_choice.py": r"of 2 right",
    "perplexity.py": r"tokens in \d+ windows, perplexity \d",
    "rejection.py": r"[1-6] of 6 prompts have an answer",
    "sampling_callback.py": r"step 3: 'import ' -> ",
    "self_consistency.py": r"with \d+ of 16 votes",
    "steering.py": r"projection without .* with the hook",
    "watermark.py": r"without -?[0-3]\.\d, with the watermark [5-9]\.\d",
}
"""What each prints, among other things."""
NEEDS = {"evaluate.py": "lm_eval", "grpo.py": "trl"}
"""Packages of extras."""


def test_every_script_has_its_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_it_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(PRINTED[name], capsys.readouterr().out)


def test_a_page_links_to_each() -> None:
    pages = "".join(path.read_text() for path in EXAMPLES.parent.glob("*.md"))
    assert [name for name in PRINTED if f"examples/{name}" not in pages] == []
