"""The page allocator."""

import random

import pytest

from hybridgen.cache import DUMMY_PAGE, PageAllocator


def test_hands_out_every_page_but_the_dummy() -> None:
    allocator = PageAllocator(6)
    pages = allocator.allocate(5)
    assert pages is not None
    assert sorted(pages) == [1, 2, 3, 4, 5]
    assert DUMMY_PAGE not in pages
    assert allocator.free == 0


def test_takes_nothing_when_it_cannot_give_all() -> None:
    allocator = PageAllocator(4)
    assert allocator.allocate(4) is None
    assert allocator.free == 3


@pytest.mark.parametrize("wrong", [[0], [7], [1, 1]])
def test_refuses_pages_that_are_not_in_use(wrong: list[int]) -> None:
    allocator = PageAllocator(4)
    assert allocator.allocate(1) == [1]
    with pytest.raises(ValueError, match="not in use"):
        allocator.release(wrong)
    assert allocator.free == 2


def test_never_gives_a_page_to_two_owners() -> None:
    allocator, rng, owned = PageAllocator(50), random.Random(0), []
    for _ in range(2000):
        if owned and rng.random() < 0.5:
            allocator.release(owned.pop(rng.randrange(len(owned))))
        else:
            pages = allocator.allocate(rng.randint(1, 7))
            if pages is not None:
                owned.append(pages)
        flat = [page for pages in owned for page in pages]
        assert len(flat) == len(set(flat))
        assert allocator.free == 49 - len(flat)
