"""Tables, CSV, JSON, pictures and the page of a made-up result; the texts are kept in `golden/`.

After a wanted change: `HYBRIDGEN_GOLDEN=1 pytest tests/comparison/render/test_compare_report.py` writes them anew.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import os
import re
import struct
from pathlib import Path

import pytest
from compare_cases import comparison

import hybridgen
from hybridgen.comparison.render import plots, report
from hybridgen.comparison.render.html import page
from hybridgen.comparison.results import Comparison, read
from hybridgen.engine.warm_start import PHASES
from hybridgen.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("name", "render"),
    [
        ("terminal.txt", report.terminal),
        ("comparison.md", report.markdown),
        ("comparison.csv", report.comma_separated),
        ("comparison.html", lambda found: page(found, {"ttft": b"picture"})),
    ],
)
def test_the_texts_are_as_kept(name: str, render: object) -> None:
    text = render(comparison())  # type: ignore[operator]
    path = GOLDEN / name
    if os.environ.get("HYBRIDGEN_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_speed_is_never_shown_without_correctness() -> None:
    [head] = [table.head for table in report.tables(comparison()) if "tokens/s" in table.head]
    assert {"= eager", "first diff.", "logit error"} <= set(head)


def test_the_table_says_what_did_not_go_well() -> None:
    text = report.terminal(comparison())
    assert "hf-dynamic, prompt 8, batch 2: out of memory: OutOfMemoryError: 3 GiB" in text
    assert "token 2 of prompt 1" in text
    assert "hybrid: 2 times: a layer runs eagerly" in text
    assert "3 cells not within it when the budget of 5 s ended" in text
    assert text.endswith("a note")


def test_a_bar_in_a_reason_does_not_break_a_markdown_table() -> None:
    found = comparison()
    found.cells[1].graphs = {**(found.cells[1].graphs or {}), "reasons": {"a|b": 1}}
    assert r"a\|b" in report.markdown(found)


def test_the_csv_has_a_row_per_cell() -> None:
    rows = list(csv.DictReader(io.StringIO(report.comma_separated(comparison()))))
    assert len(rows) == 12
    fast = next(row for row in rows if row["subject"] == "hybrid")
    slow = next(row for row in rows if row["subject"] == "eager")
    assert float(slow["tpot_p50"]) / float(fast["tpot_p50"]) == pytest.approx(3)
    assert rows[-1]["status"] == "out of memory"
    assert rows[-1]["ttft_p50"] == ""


def test_json_brings_the_result_back() -> None:
    found = comparison()
    text = json.dumps(found.as_dict(), allow_nan=False)
    again = Comparison.of(json.loads(text))
    assert again.as_dict() == found.as_dict()
    assert str(again) == str(found)


def test_json_of_something_else_is_refused(tmp_path: Path) -> None:
    for name, text in (("a.json", "{}"), ("b.json", "[1]"), ("c.json", "not json"), ("d.json", '{"schema": 99}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=r"comparison\.json"):
            read(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "absent.json")


def test_pictures_are_drawn() -> None:
    for name, data in plots.draw(comparison()).items():
        assert data.startswith(b"\x89PNG"), name
        width, height = struct.unpack(">II", data[16:24])
        assert width > 700, name
        assert height > 300, name


def test_every_row_has_its_own_look() -> None:
    looks = [plots._style(index) for index in range(8)]
    assert len({look["color"] for look in looks}) == len({look["marker"] for look in looks}) == 8


def test_a_plot_has_every_row_and_its_unit() -> None:
    figure = plots.ttft(comparison())
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["eager", "hybrid", "hf-dynamic"]
    assert all("ms" in axes.get_ylabel() for axes in figure.axes)
    medians = [comparison().cell("eager", length, 1).ttft.p50 * 1e3 for length in (4, 8)]  # type: ignore[union-attr]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx(medians)


def test_at_most_a_few_panels_with_the_first_and_the_last() -> None:
    assert plots._spread(range(10), 4) == [0, 3, 6, 9]
    assert plots._spread([1, 2], 4) == [1, 2]


def test_no_two_parts_of_a_start_look_alike() -> None:
    parts = [*PHASES, "other", "first calls"]
    found = comparison()
    subjects = [dataclasses.replace(found.subjects[0], startup=dict.fromkeys(reversed(parts), 1.0))]
    found = dataclasses.replace(found, subjects=subjects)
    assert report.startup_parts(found) == parts
    (axes,) = plots.startup(found).axes
    looks = {(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in axes.containers}
    assert len(looks) == len(parts)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = page(comparison(), plots.draw(comparison()))
    assert text.count("data:image/png;base64,") == 4
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert "<script" not in text
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text)


def test_what_users_name_is_escaped_on_the_page() -> None:
    text = page(comparison(model="<b>model</b>"), {})
    assert "<b>model</b>" not in text
    assert "&lt;b&gt;model&lt;/b&gt;" in text


def test_saving_writes_every_file(tmp_path: Path) -> None:
    written = comparison().save(tmp_path / "new" / "folder")
    assert {path.name for path in written} == {
        "comparison.json", "comparison.csv", "comparison.md", "comparison.html",
        "ttft.png", "throughput.png", "latency.png", "startup.png",
    }  # fmt: skip
    assert all(path.stat().st_size for path in written)
    assert read(tmp_path / "new" / "folder" / "comparison.json").as_dict() == comparison().as_dict()


def test_a_directory_that_cannot_be_written_is_found_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output="):
        hybridgen.compare("no/such/model", output=tmp_path / "file")


@pytest.mark.parametrize("missing", ["matplotlib", "tabulate"])
def test_what_is_not_installed_is_said(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    with pytest.raises(ConfigError, match=rf"need {missing}, which is not installed; install hybridgen\[compare\]"):
        if missing == "matplotlib":
            hybridgen.compare("no/such/model", output=tmp_path)  # before anything is looked for
        else:
            str(comparison())


def test_a_cell_is_found_by_its_place() -> None:
    assert comparison().cell("hybrid", 8, 2).batch_size == 2
    with pytest.raises(ConfigError, match="no cell"):
        comparison().cell("hybrid", 9, 2)


def test_it_is_short_in_a_list_and_a_table_in_a_notebook() -> None:
    made = comparison()
    assert repr(made).startswith("Comparison(")
    assert len(repr(made)) < 200
    assert "<table>" in made._repr_html_()
    assert "<html" not in made._repr_html_()


def test_rows_of_one_call_are_marked_and_told_of_first() -> None:
    made = comparison()
    assert "one call" not in made.__str__()
    made.cells[0].repeats = made.cells[1].repeats = 1
    text = str(made)
    assert text.startswith("2 of ")
    assert "rows are of one call (calls 1*)" in text.splitlines()[0]
    assert text.count("  1*  ") == 2
    page = made._repr_html_()
    assert page.index("rows are of one call") < page.index("<table>")
