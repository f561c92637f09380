"""Which page belongs to whom. Host-side bookkeeping only; no tensors."""

from __future__ import annotations

from collections.abc import Sequence

DUMMY_PAGE = 0
"""Never handed out; the target of unused block-table entries and of padding rows."""


def pages_for_tokens(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` positions."""
    return -(-tokens // page_size)


class PageAllocator:
    """Hands out page ids 1 to `num_pages - 1`.

    The pages freed last are handed out first, so that a short run touches few of them.
    """

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, DUMMY_PAGE, -1))
        self._used: set[int] = set()
        self.capacity = num_pages - 1
        """Pages that can be handed out."""

    @property
    def free(self) -> int:
        """Pages that are not handed out."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` page ids, or None when fewer are free (then nothing is taken)."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Take pages back.

        Raises:
            ValueError: a page is not in use (a double free would give one page to two requests).
        """
        strangers = [page for page in pages if page not in self._used]
        if strangers or len(set(pages)) != len(pages):
            raise ValueError(f"pages {strangers or list(pages)} are not in use")
        self._used.difference_update(pages)
        self._free.extend(reversed(pages))
