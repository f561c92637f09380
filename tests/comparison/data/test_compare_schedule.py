"""The order of the calls and the prompts follow from the config alone."""

from __future__ import annotations

from itertools import pairwise

from compare_cases import SMALL

from hybridgen.comparison.data.config import CompareConfig
from hybridgen.comparison.data.schedule import cells, in_order, names, prompts


def test_every_cell_is_there_once() -> None:
    found = cells(SMALL, names(SMALL))
    assert len(found) == len(set(found)) == 3 * 2 * 2


def test_a_round_visits_every_cell_once_in_an_order_of_its_own() -> None:
    listed = cells(SMALL, names(SMALL))
    rounds = [in_order(SMALL, names(SMALL), number) for number in range(4)]
    assert all(sorted(order) == sorted(listed) for order in rounds)
    assert len({tuple(order) for order in [listed, *rounds]}) == 5


def test_subjects_are_interleaved() -> None:
    order = [cell.subject for cell in in_order(SMALL, names(SMALL), 0)]
    changes = sum(before != after for before, after in pairwise(order))
    assert changes > 3  # one subject after the other would change twice


def test_the_same_config_gives_the_same_schedule_and_prompts() -> None:
    again = CompareConfig.of(SMALL.as_dict())
    assert again == SMALL.replace(engine={})
    for number in range(3):
        assert in_order(again, names(again), number) == in_order(SMALL, names(SMALL), number)
    assert prompts(again, 8, 2, 500) == prompts(SMALL, 8, 2, 500)


def test_another_seed_gives_another_schedule_and_prompts() -> None:
    other = SMALL.replace(seed=1)
    assert in_order(other, names(other), 0) != in_order(SMALL, names(SMALL), 0)
    assert prompts(other, 8, 2, 500) != prompts(SMALL, 8, 2, 500)


def test_prompts_are_of_the_size_asked_for_and_leave_special_ids_out() -> None:
    found = prompts(SMALL, 40, 3, 50)
    assert [len(prompt) for prompt in found] == [40] * 3
    assert {token for prompt in found for token in prompt} <= set(range(3, 50))
    assert found[0] != found[1]
