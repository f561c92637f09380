"""How many drafts are checked, from what rows have shown and what steps take."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hybridgen.speculation.pace import Choice, RowPace, choose, choose_or_pause


def row(*steps: tuple[int, int], waiting: int = 7) -> RowPace:
    """A row after steps of (checked, accepted) drafts, for which so many wait."""
    pace = RowPace()
    for checked, accepted in steps:
        pace.read(checked, accepted, waiting)
    pace.waiting = waiting
    return pace


def unknown(query_len: int) -> None:
    return None


def taking(**seconds: float | None) -> Callable[[int], float | None]:
    """Seconds of steps of one, four and eight tokens a row."""
    return lambda query_len: seconds[f"t{query_len}"]


RIGHT, WRONG = (7, 7), (7, 0)


def test_nothing_is_asked_of_more_places_than_drafts() -> None:
    """A step that is asked for is recorded when it was missing."""
    asked: list[int] = []

    def seconds(query_len: int) -> float | None:
        asked.append(query_len)
        return 1.0 if query_len == 1 else None

    assert choose([row(waiting=3)], seconds) == 1
    assert asked == [1, 4]


def test_without_drafts_a_step_is_plain() -> None:
    assert choose([], unknown) == 1
    assert choose([row(waiting=0), row(RIGHT, waiting=0)], unknown) == 1


@pytest.mark.parametrize(("waiting", "query_len"), [(1, 4), (3, 4), (4, 8), (7, 8)])
def test_no_more_places_than_drafts(waiting: int, query_len: int) -> None:
    assert choose([row(*[RIGHT] * 20, waiting=waiting)], unknown) == query_len


def test_drafts_that_are_never_right_are_not_checked_and_tried_again_later() -> None:
    pace = row(*[WRONG] * 40)
    assert choose([pace], unknown) == 1
    steps = 0
    while choose([pace], unknown) == 1:
        pace.read(0, 0, 7)
        steps += 1
    assert 2 < steps < 20


@pytest.mark.parametrize("t4", [1.1, 1.5, 1.92, 2.5])
def test_a_new_row_is_tried_once_where_right_drafts_would_bring_more(t4: float) -> None:
    """Also where a step with drafts takes twice as long as a plain one, as beside the fused kernel of one row."""
    times = taking(t1=1.0, t4=t4)
    pace = row(waiting=3)
    assert choose([pace], times) == 4
    pace.read(3, 3, 3)
    assert choose([pace], times) == 4
    wrong = row((3, 0), waiting=3)
    if t4 > 1.6:
        assert choose([wrong], times) == 1


def test_a_row_that_is_never_right_is_tried_less_and_less() -> None:
    times = taking(t1=1.0, t4=1.92)
    pace, tried, plain = row(waiting=3), [], 0
    for _ in range(400):
        if choose([pace], times) == 4:
            tried.append(plain)
            plain = 0
            pace.read(3, 0, 3)
        else:
            plain += 1
            pace.read(0, 0, 3)
    assert len(tried) < 400 / 15
    assert tried[2] > tried[1] > 5


def test_a_row_that_is_right_carries_others() -> None:
    rows = [row(*[WRONG] * 40), row(*[RIGHT] * 40)]
    assert choose(rows, unknown) == 8
    assert choose([rows[0]] * 30 + [rows[1]], taking(t1=1.0, t4=1.2, t8=1.5)) == 1


@pytest.mark.parametrize(
    ("seconds", "query_len"),
    [
        ({"t1": 1.0, "t4": 1.1, "t8": 1.2}, 8),
        ({"t1": 1.0, "t4": 1.1, "t8": 3.0}, 4),
        ({"t1": 1.0, "t4": 4.1, "t8": 8.1}, 1),
        ({"t1": 1.0, "t4": None, "t8": None}, 1),  # they would run without a recording
        ({"t1": 1.0, "t4": None, "t8": 1.2}, 8),
        ({"t1": None, "t4": 1.2, "t8": 1.4}, 8),
    ],
)
def test_the_most_tokens_in_a_second(seconds: dict[str, float | None], query_len: int) -> None:
    assert choose([row(*[RIGHT] * 40)], taking(**seconds)) == query_len


def test_what_a_row_has_shown() -> None:
    """The second draft was only judged where the first was right."""
    pace = RowPace()
    for _ in range(200):
        pace.read(3, 1, 3)
    assert pace.likely == pytest.approx(0.5)
    for _ in range(200):
        pace.read(3, 3, 3)
    assert pace.likely == pytest.approx(1.0)
    assert pace.expected(7) == pytest.approx(3.0)
    assert pace.expected(2) == pytest.approx(2.0)


def costing(quiet: float | None, checks: float | None, drafts: float | None = 1.0) -> Callable[[Choice], float | None]:
    """Seconds of steps of one token: quiet, and with drafts made; and of four tokens."""
    return lambda kind: quiet if kind.quiet else checks if kind.query_len == 4 else drafts


@pytest.mark.parametrize(
    ("checks", "chosen"),
    [(1.2, Choice(4)), (2.7, Choice(4)), (2.8, Choice(1, quiet=True)), (9.0, Choice(1, quiet=True))],
)
def test_drafting_pauses_where_new_rows_could_not_gain(checks: float, chosen: Choice) -> None:
    """Three drafts of a row that has shown nothing are expected to bring 1.73 tokens more."""
    assert choose_or_pause([row(waiting=3)] * 8, 3, costing(1.0, checks)) == chosen


def test_drafting_begins_again_where_none_wait() -> None:
    """By a step that makes drafts, or by one that could check some where the other is not recorded."""
    assert choose_or_pause([row(waiting=0)], 3, costing(1.0, 1.5, 1.2)) == Choice(1)
    assert choose_or_pause([row(waiting=0)], 3, costing(1.0, 1.5, None)) == Choice(4)
    assert choose_or_pause([row(*[WRONG] * 9, waiting=0)], 3, costing(1.0, 1.5)) == Choice(1, quiet=True)
    assert choose_or_pause([], 3, costing(1.0, 1.5)) == Choice(1, quiet=True)


def test_without_times_it_drafts_in_each_step() -> None:
    assert choose_or_pause([row(waiting=3)], 3, costing(None, None, None)) == Choice(4)
    assert choose_or_pause([row(*[WRONG] * 40, waiting=3)], 3, costing(1.0, None)) == Choice(1)


def test_quiet_rows_are_tried_again_now_and_then() -> None:
    times, pace, tried, quiet = costing(1.0, 1.5), row(waiting=3), [], 0
    for _ in range(600):
        chosen = choose_or_pause([pace], 3, times)
        if chosen == Choice(4):
            tried.append(quiet)
            quiet = 0
            pace.read(3, 0, 3)
        else:
            quiet += chosen.quiet
            pace.read(0, 0, 0 if chosen.quiet else 3, quiet=chosen.quiet)
    assert 3 < len(tried) < 600 / 9
    assert min(tried[2:]) > 5


def test_a_step_has_no_more_tokens_than_it_may() -> None:
    rows = [row(*[RIGHT] * 20) for _ in range(2)]
    assert choose(rows, unknown) == 8
    assert choose(rows, unknown, most=8) == 4
    assert choose(rows * 2, unknown, most=8) == 1
    assert choose(rows[:1], unknown, most=8) == 8
    assert choose_or_pause(rows, 3, costing(1.0, 1.0), 8) == Choice(4)
    assert choose_or_pause(rows * 2, 3, costing(1.0, 1.0), 8) == Choice(1, quiet=True)
