"""Pages of requests, and which of them are shared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from hybridgen.cache import DUMMY_PAGE, PageManager, RequestPages, in_order, pages_for_tokens, pages_in_turn

SIZE = 4


def admit(manager: PageManager, ids: str, new: int = 1, salt: str | None = None) -> RequestPages:
    """Admit a prompt, each letter a token, and launch its prefill."""
    pages = manager.admit([ord(letter) for letter in ids], len(ids) + new, salt)
    assert pages is not None
    manager.launched(pages, len(ids))
    return pages


def test_full_pages_of_the_same_tokens_are_shared() -> None:
    manager = PageManager(20, SIZE)
    first = admit(manager, "abcdefghij")
    second = admit(manager, "abcdefghxyz")
    assert (first.cached, second.cached) == (0, 8)
    assert second.table[:2] == first.table[:2]
    assert not set(second.table[2:]) & set(first.table)
    assert manager.free == 19 - 3 - 1
    third = admit(manager, "abcdxfgh")
    assert third.cached == 4
    assert admit(manager, "xbcdefgh").cached == 0
    assert (manager.asked, manager.found) == (10 + 11 + 8 + 8, 12)


def test_ids_are_compared_whole() -> None:
    """Ids that are the same in their low bytes, and pages that are the same behind other ones."""
    manager = PageManager(40, SIZE)
    manager.admit([1, 2, 3, 4, 5], 6)
    for other in ([257, 2, 3, 4, 5], [1, 2, 3, 2**24 + 4, 5], [0, 1, 2, 3, 4], [1, 0, 2, 0, 5]):
        assert manager.admit(other, 6).cached == 0
    admit(manager, "abcdefgh")
    admit(manager, "xxxx")
    assert admit(manager, "xxxxefghi").cached == 4


def test_the_last_token_of_a_prompt_is_always_fed() -> None:
    manager = PageManager(20, SIZE)
    first = admit(manager, "abcdefgh")
    again = admit(manager, "abcdefgh")
    assert again.cached == 4
    assert again.table[0] == first.table[0]
    assert again.table[1] != first.table[1]  # an equal page of its own, which is not kept twice
    assert manager.kept == 2
    longer = admit(manager, "abcdefghi")
    assert longer.cached == 8
    assert longer.table[:2] == first.table[:2]
    for pages in (first, again, longer):
        manager.release(pages)
    assert (manager.free, manager.kept) == (19, 2)


def test_salts_keep_prefixes_apart() -> None:
    manager = PageManager(40, SIZE)
    for salt in (None, "", "a", "b"):
        assert admit(manager, "abcdefghi", salt=salt).cached == 0
    assert admit(manager, "abcdefghi", salt="a").cached == 8


def test_generated_tokens_are_found_too() -> None:
    manager = PageManager(20, SIZE)
    first = admit(manager, "abcde", new=10)
    manager.keep(first, [ord(letter) for letter in "abcdefghijklm"])
    manager.release(first)
    assert manager.kept == 3
    assert admit(manager, "abcdefghijklmnop").cached == 12


def test_what_was_given_back_first_is_evicted_first_and_from_its_end() -> None:
    manager = PageManager(1 + 6, SIZE)
    old, new = admit(manager, "aaaabbbb"), admit(manager, "ccccdddd")
    manager.release(old)
    manager.release(new)
    assert manager.free == 6
    assert manager.kept == 4
    manager.release(admit(manager, "xxxxyyyyz", new=0))  # three pages: two unused ones, and the end of the oldest
    assert manager.evicted == 1
    assert admit(manager, "ccccddddz", new=0).cached == 8
    assert admit(manager, "aaaabbbbz", new=0).cached == 4


def test_what_a_request_shares_does_not_count_as_free() -> None:
    """Six pages, four of them kept: a request for all six that shares two gets the four others."""
    manager = PageManager(1 + 6, SIZE)
    manager.release(admit(manager, "aaaabbbbccccdddd", new=0))
    request = admit(manager, "aaaabbbbx", new=24 - 9)
    assert request.cached == 8
    assert sorted(request.table) == [1, 2, 3, 4, 5, 6]
    assert manager.free == 0
    assert manager.admit([1], 1) is None
    assert manager.admit([ord(letter) for letter in "aaaabbbbx"], 9) is None
    manager.release(request)
    assert manager.free == 6


def test_a_request_that_does_not_fit_takes_nothing() -> None:
    manager = PageManager(1 + 4, SIZE)
    kept = admit(manager, "aaaabbbb", new=0)
    assert manager.admit([ord(letter) for letter in "aaaabbbbc"], 20) is None
    manager.release(kept)
    assert manager.free == 4
    assert manager.admit([ord(letter) for letter in "aaaabbbbc"], 20) is None
    assert manager.free == 4


def test_pages_that_were_not_written_are_not_found_once_their_writer_is_gone() -> None:
    manager = PageManager(20, SIZE)
    writer = manager.admit([1] * 13, 13)
    manager.launched(writer, 5)  # the first chunk
    twin, other = manager.admit([1] * 13, 13), manager.admit([1] * 4 + [2] * 9, 13)
    assert (twin.cached, other.cached) == (12, 4)
    assert manager.awaits(twin, writer)
    assert not manager.awaits(other, writer)
    assert manager.release(writer)
    late = manager.admit([1] * 13, 13)
    assert late.cached == 4
    manager.launched(late, 13)
    assert not manager.release(twin)
    assert not manager.release(other)
    assert not manager.release(late)
    assert manager.free == 19
    assert manager.admit([1] * 13, 13).cached == 12


def test_clear_lets_nothing_be_found_and_requests_keep_what_they_have() -> None:
    manager = PageManager(20, SIZE)
    idle, running, short = admit(manager, "aaaab"), admit(manager, "ccccd", new=9), admit(manager, "ee", new=9)
    manager.release(idle)
    manager.clear()
    assert manager.kept == 0
    assert manager.free == 19 - len(running.table) - len(short.table)
    assert admit(manager, "ccccd").cached == 0
    for pages, ids in ((running, "ccccddddd"), (short, "eeeeeeeee")):
        manager.keep(pages, [ord(letter) for letter in ids])  # from before: not kept
        manager.release(pages)
    assert admit(manager, "ccccdddde").cached == 4
    assert admit(manager, "eeeeeeeee").cached == 0


def test_without_sharing_every_request_has_its_own_pages() -> None:
    manager = PageManager(20, SIZE, shares=False)
    first, second = admit(manager, "aaaabbbbc"), admit(manager, "aaaabbbbc")
    assert (second.cached, manager.kept) == (0, 0)
    assert not set(first.table) & set(second.table)
    manager.keep(first, [1] * 10)
    manager.release(first)
    assert manager.kept == 0


def test_pages_are_used_in_turn_where_too_few_are_free() -> None:
    manager = PageManager(1 + 10, SIZE, ring_pages=3)
    first = admit(manager, "aaaabbbbc", new=15)
    assert not first.in_turn
    second = admit(manager, "aaaabbbbd", new=15)
    assert not second.in_turn  # four pages beside the two that it shares
    assert manager.admit([1] * 9, 24) is None
    manager.release(second)
    third = admit(manager, "ddddeeeef", new=15)
    assert (third.in_turn, len(third.table), len(set(third.table))) == (True, 6, 3)
    assert third.table[:3] == third.table[3:]
    assert not set(third.table) & set(first.table)
    manager.keep(third, [1] * 24)
    manager.release(third)
    assert manager.free == 4
    assert admit(manager, "ddddeeeef", new=0).cached == 0  # what it wrote is not there any more
    manager.release(first)


def test_short_requests_do_not_use_pages_in_turn() -> None:
    manager = PageManager(1 + 3, SIZE, ring_pages=3)
    assert not admit(manager, "aaaabbbbc").in_turn
    assert manager.admit([1], 12) is None


@settings(deadline=None)
@given(
    size=st.sampled_from([1, 2, 4, 8]),
    reach=st.integers(1, 20),
    most=st.integers(1, 20),
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.booleans()), min_size=1, max_size=4),
    data=st.data(),
)
def test_no_query_sees_a_position_that_was_written_over(
    size: int, reach: int, most: int, requests: list[tuple[int, int, bool]], data: st.DataObject
) -> None:
    """Requests, some of which begin alike, are fed in turn by calls of up to `most` tokens."""
    ring = pages_in_turn(reach, most, size)
    room = data.draw(st.integers(ring, 3 * ring))
    manager = PageManager(1 + room, size, ring_pages=ring)
    pool: dict[tuple[int, int], tuple[int, ...]] = {}
    """What each place of a page holds: all tokens up to that position."""
    running: list[tuple[list[int], RequestPages, int]] = []
    for number, (prompt, new, alike) in enumerate(requests):
        ids = [0 if alike else number + 1] * (prompt - 1) + [number + 1] * (new + 1)
        pages = manager.admit(ids[:prompt], len(ids))
        if pages is not None:
            # As the scheduler does it: a prompt that others share is fed before they are.
            running.append((ids, pages, prompt))
    fed = [pages.cached for _, pages, _ in running]
    while any(done < len(ids) for done, (ids, _, _) in zip(fed, running, strict=True)):
        behind = [i for i, (_, _, prompt) in enumerate(running) if fed[i] < prompt]
        open_ = [i for i, (ids, _, _) in enumerate(running) if fed[i] < len(ids)]
        chosen = behind[0] if behind else data.draw(st.sampled_from(open_))
        ids, pages, prompt = running[chosen]
        count = data.draw(st.sampled_from([1, most]))
        end = min(fed[chosen] + count, prompt if fed[chosen] < prompt else len(ids))
        for position in range(fed[chosen], end):
            pool[pages.table[position // size], position % size] = tuple(ids[: position + 1])
        for query in range(fed[chosen], end):
            for seen in range(max(0, query + 1 - reach), query + 1):
                assert pool[pages.table[seen // size], seen % size] == tuple(ids[: seen + 1])
        manager.launched(pages, end)
        fed[chosen] = end
    for ids, pages, _ in running:
        manager.keep(pages, ids)
        manager.release(pages)
    assert manager.free == room


@pytest.mark.parametrize(
    ("prompts", "order"),
    [
        (["x", "b", "a"], [0, 1, 2]),
        (["aaaab", "cccc", "aaaad", "cccce"], [0, 2, 1, 3]),
        (["aaaabbbbx", "aaaaccccx", "z", "aaaabbbby", "aaaaccccx"], [0, 3, 1, 4, 2]),
        (["aaaabbbb", "aaaa", "aaaabbbb"], [1, 0, 2]),
    ],
)
def test_prompts_that_share_pages_follow_one_another(prompts: list[str], order: list[int]) -> None:
    packed = [(None, [ord(letter) for letter in prompt]) for prompt in prompts]
    assert in_order(packed, SIZE) == order


def test_order_keeps_salts_apart() -> None:
    assert in_order([("a", [1] * 5), ("b", [1] * 5), ("a", [1] * 6)], SIZE) == [0, 2, 1]


@dataclass(eq=False)
class Held:
    """A request of the test: its tokens so far, and how many of them were fed."""

    ids: list[int]
    limit: int
    salt: str | None
    pages: RequestPages
    order: int
    fed: int = 0
    awaits: list[Held] = field(default_factory=list)


class Requests(RuleBasedStateMachine):
    """Random admissions, chunks, ends and evictions, with what each page really holds beside the manager.

    Requests are prefilled in the order of their admission, as the scheduler does it, and those that count on a request
    that failed are released with it.
    """

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.manager = PageManager(1 + 12, SIZE)
        self.running: list[Held] = []
        self.contents: dict[int, tuple[str | None, tuple[int, ...]]] = {}
        """What was written to each page: the salt and all tokens up to the page's end."""
        self.count = 0

    @rule(
        target=held,
        ids=st.lists(st.integers(0, 1), min_size=1, max_size=18),
        new=st.integers(1, 12),
        salt=st.sampled_from([None, None, None, "s"]),
    )
    def admit(self, ids: list[int], new: int, salt: str | None) -> object:
        free = self.manager.free
        pages = self.manager.admit(ids, len(ids) + new, salt)
        if pages is None:
            assert self.manager.free == free
            # It must fit when nobody else has anything.
            assert self.running or pages_for_tokens(len(ids) + new, SIZE) > self.manager.capacity
            return multiple()
        assert len(pages.table) == pages_for_tokens(len(ids) + new, SIZE)
        assert pages.cached < len(ids)
        assert pages.cached % SIZE == 0
        one = Held(list(ids), len(ids) + new, salt, pages, self.count, fed=pages.cached)
        self.count += 1
        self.running.append(one)
        return one

    @rule(one=held, tokens=st.integers(1, 30))
    def prefill(self, one: Held, tokens: int) -> None:
        """Feed everybody's prompt up to this one's, then some of its own."""
        if one not in self.running:
            return
        for other in self.running[: self.running.index(one)]:
            self.feed(other, len(other.ids))
        self.feed(one, min(len(one.ids), one.fed + tokens))

    def feed(self, one: Held, end: int) -> None:
        for position in range(one.fed, end):
            page = one.pages.table[position // SIZE]
            for other in self.running:
                # Nobody else reads what is written here.
                assert page not in other.pages.table or other is one or self.shared_ahead(other, one, position)
            if position % SIZE == SIZE - 1:
                self.contents[page] = (one.salt, tuple(one.ids[: position + 1]))
            else:
                self.contents.pop(page, None)
        if one.fed < end:
            self.check_what_it_reads(one)
        one.fed = max(one.fed, end)
        self.manager.launched(one.pages, one.fed)

    @staticmethod
    def shared_ahead(other: Held, one: Held, position: int) -> bool:
        """Whether the other waits for this page: it was admitted later, and has fed nothing."""
        return other.order > one.order and other.fed == other.pages.cached > position

    def check_what_it_reads(self, one: Held) -> None:
        for index in range(one.pages.cached // SIZE):
            expected = one.salt, tuple(one.ids[: (index + 1) * SIZE])
            assert self.contents[one.pages.table[index]] == expected

    @rule(one=held)
    def decode(self, one: Held) -> None:
        if one not in self.running or len(one.ids) == one.limit:
            return
        for other in self.running[: self.running.index(one) + 1]:
            self.feed(other, len(other.ids))
        one.ids.append(one.fed % 2)

    @rule(one=consumes(held))
    def finish(self, one: Held) -> None:
        """A normal end; the last token was not fed."""
        if one not in self.running:
            return
        for other in self.running[: self.running.index(one) + 1]:
            self.feed(other, len(other.ids))
        ids = [*one.ids, 1]
        self.manager.keep(one.pages, ids[:-1], one.salt)
        self.take_out(one)

    @rule(one=consumes(held))
    def cancel(self, one: Held) -> None:
        if one in self.running:
            self.take_out(one)

    def take_out(self, one: Held) -> None:
        self.running.remove(one)
        if self.manager.release(one.pages):
            waits = [other for other in self.running if self.manager.awaits(other.pages, one.pages)]
            assert waits
            for other in reversed(waits):
                assert other.fed == other.pages.cached  # nothing of it was launched
                self.running.remove(other)
                assert not self.manager.release(other.pages)

    @rule()
    def clear(self) -> None:
        self.manager.clear()
        assert self.manager.kept == 0

    @invariant()
    def no_page_is_lost_and_none_has_two_owners(self) -> None:
        manager = self.manager
        owners = Counter(page for one in self.running for page in set(one.pages.table))
        assert DUMMY_PAGE not in owners
        assert manager.free + len(owners) == manager.capacity  # none both free and held, none lost
        for one in self.running:
            assert len(set(one.pages.table)) == len(one.pages.table)
            # From the page on that it writes next, a request is alone; but others may wait for pages of its prompt.
            for page in one.pages.table[len(one.ids) // SIZE :]:
                assert owners[page] == 1

    def teardown(self) -> None:
        for one in list(self.running):
            if one in self.running:
                self.take_out(one)
        assert self.manager.free == self.manager.capacity
        assert self.manager.admit([9], self.manager.capacity * SIZE) is not None


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
