"""Which pages a request has: its own, and those that it shares with requests whose tokens begin alike.

Full pages are kept in a trie. A page is found by the exact ids of its tokens and by the page before it, so that two
prompts are never taken for one. Nothing is copied: a shared page lies in the block tables of several requests. It is
written by the request that met its tokens first, and read by those that are admitted later: within a prefill call, keys
and values of all tokens are written before any are read, and calls follow one another on one stream.

Where every layer sees only the last positions, a request that finds too few pages for all of its positions can have a
few that it uses in turn (`ring_pages`): a page is written again once no query sees what it holds. Others never find
these.

Pages that nobody uses stay in the trie until a request needs them; the one that was given back first goes first.
Radix trees of this kind are SGLang's (Zheng et al. 2023, arXiv:2312.07104); whole pages and counts are vLLM's.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

_ID_BYTES = 4
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


@dataclass(eq=False, slots=True)
class _Node:
    """A full page of the trie."""

    key: tuple[_Node | str | None, bytes]
    """The node of the page before, or the salt where this is the first; and the ids of its tokens."""
    page: int
    writer: RequestPages | None = None
    """Whose prefill writes it; None once that is launched."""
    holders: int = 1
    """Requests that have it. Who has a page has those before it too."""


@dataclass(eq=False, slots=True)
class RequestPages:
    """The pages of one request, from `PageManager.admit` to `release`."""

    table: list[int] = field(default_factory=list)
    """Its pages in order: its row of the block table. Where it uses some in turn they are there several times."""
    cached: int = 0
    """Positions at the beginning that it need not compute."""
    nodes: list[_Node] = field(default_factory=list)
    """Those of its first pages. When it ends, some can have another page than `table`: equal ones of other requests."""
    written: int = 0
    """How many of them are launched."""
    generation: int = 0
    """How often the cache had been cleared when it came."""
    in_turn: bool = False
    """It writes to its pages again and again, so that no other request can have them."""


NO_PAGES = RequestPages()
"""What every request has that is not admitted: one object for all, in which nothing is changed."""


class PageManager:
    """Gives requests their pages and takes them back; keeps those that others may share."""

    def __init__(self, num_pages: int, page_size: int, *, shares: bool = True, ring_pages: int | None = None) -> None:
        """
        Args:
            num_pages: of the pool, the dummy page included.
            page_size: positions that a page holds.
            shares: whether requests share pages at all.
            ring_pages: by `pages_in_turn`, how many pages a request can do with that uses them in turn; None: it needs
                all of its positions to its end.
        """
        self.shares = shares
        self.page_size = page_size
        self.ring_pages = ring_pages
        self.asked = 0
        """Prompt tokens of the requests that were admitted."""
        self.found = 0
        """How many of them lay in shared pages."""
        self.evicted = 0
        """Pages that were taken out of the trie because others needed room."""
        self._allocator = PageAllocator(num_pages)
        self._table: dict[tuple[_Node | str | None, bytes], _Node] = {}
        self._idle: OrderedDict[_Node, None] = OrderedDict()
        """Nodes without a holder, in the order in which they are evicted. A page comes before the page that it follows,
        because whoever gave it up gave that one up later or has it still."""
        self._generation = 0

    @property
    def capacity(self) -> int:
        """Pages of the pool that can be handed out."""
        return self._allocator.capacity

    @property
    def free(self) -> int:
        """Pages that no request has, those included that are kept for sharing."""
        return self._allocator.free + len(self._idle)

    @property
    def kept(self) -> int:
        """Pages that can be found by their tokens, whether a request has them or not."""
        return len(self._table)

    def admit(
        self, ids: Sequence[int], positions: int, salt: str | None = None, most: int | None = None
    ) -> RequestPages | None:
        """Pages for a request, or None when too few are free (then nothing is taken).

        What it shares is held first, and does not count as free any more. The last token of the prompt is never among
        it, because something has to be computed to choose the next one. Where too few pages are free for all positions,
        it gets `ring_pages` in turn.

        Args:
            ids: what is fed of its prompt.
            positions: that it can ever use.
            salt: requests share pages with those of the same salt alone.
            most: how many of the first tokens it may share; None: all but the last.
        """
        size = self.page_size
        packed = _packed(ids) if self.shares else b""
        shared = self._match(packed, salt, min(len(ids) - 1, len(ids) - 1 if most is None else most) // size)
        self._hold(shared)
        count = pages_for_tokens(positions, size) - len(shared)
        own = self._take(count)
        in_turn = own is None and self.ring_pages is not None and self.ring_pages < count
        if in_turn and self.ring_pages is not None:
            own = self._take(self.ring_pages)
        if own is None:
            self._let_go(shared)
            return None
        table = [node.page for node in shared] + [own[index % len(own)] for index in range(count)]
        request = RequestPages(table, len(shared) * size, shared, generation=self._generation, in_turn=in_turn)
        if not in_turn:
            self._enter(request, packed, salt, request)
        self.asked += len(ids)
        self.found += request.cached
        return request

    def launched(self, request: RequestPages, positions: int) -> None:
        """Note that a request's tokens up to this position were fed, by a call that did not fail."""
        full = min(positions // self.page_size, len(request.nodes))
        for node in request.nodes[request.written : full]:
            if node.writer is request:
                node.writer = None
        request.written = max(request.written, full)

    def keep(self, request: RequestPages, ids: Sequence[int], salt: str | None = None) -> None:
        """Let others find all full pages of a request that is about to end.

        Args:
            ids: all tokens that were fed, from the first on.
        """
        if self.shares and request.generation == self._generation and not request.in_turn:
            known = len(request.nodes) * self.page_size
            self._enter(request, _packed(ids[known:]), salt, None)

    def release(self, request: RequestPages) -> bool:
        """Take a request's pages back, once.

        Returns:
            Whether another request waits for pages that this one was to write and has not (`awaits`).
        """
        own = [
            page
            for index, page in enumerate(request.table)
            if index >= len(request.nodes) or request.nodes[index].page != page
        ]
        unwritten = [node for node in request.nodes if node.writer is request]
        for node in unwritten:
            if self._table.get(node.key) is node:
                del self._table[node.key]
        self._allocator.release(list(dict.fromkeys(own)))
        self._let_go(request.nodes)
        return any(node.holders for node in unwritten)

    @staticmethod
    def awaits(request: RequestPages, other: RequestPages) -> bool:
        """Whether a request has a page that the other one was to write and has not."""
        return any(node.writer is other for node in request.nodes)

    @staticmethod
    def has_alone(request: RequestPages) -> bool:
        """Whether no other request has one of its pages."""
        return all(node.holders == 1 for node in request.nodes)

    def clear(self) -> None:
        """Let nothing be found any more that is there now. Requests keep the pages that they have."""
        self._generation += 1
        self._table.clear()
        self._allocator.release([node.page for node in self._idle])
        self._idle.clear()

    def _match(self, packed: bytes, salt: str | None, most: int) -> list[_Node]:
        """The nodes of the first pages of a prompt, as far as there are any."""
        nodes: list[_Node] = []
        parent: _Node | str | None = salt
        width = self.page_size * _ID_BYTES
        for index in range(most):
            node = self._table.get((parent, packed[index * width : (index + 1) * width]))
            if node is None:
                break
            nodes.append(node)
            parent = node
        return nodes

    def _enter(self, request: RequestPages, packed: bytes, salt: str | None, writer: RequestPages | None) -> None:
        """Put the full pages behind a request's nodes into the trie.

        Args:
            packed: for a new request its prompt; for others the tokens behind its nodes.
            writer: who is still to write them.
        """
        nodes, width = request.nodes, self.page_size * _ID_BYTES
        if writer is not None:
            packed = packed[len(nodes) * width :]
        for start in range(0, len(packed) - width + 1, width):
            key = (nodes[-1] if nodes else salt, packed[start : start + width])
            node = self._table.get(key)
            if node is None:
                node = self._table[key] = _Node(key, request.table[len(nodes)], writer)
            elif writer is not None:  # the page of its last token, which it feeds again into a page of its own
                break
            else:
                self._hold([node])
            nodes.append(node)

    def _hold(self, nodes: Sequence[_Node]) -> None:
        for node in nodes:
            if not node.holders:
                del self._idle[node]
            node.holders += 1

    def _let_go(self, nodes: Sequence[_Node]) -> None:
        for node in reversed(nodes):
            node.holders -= 1
            if node.holders:
                continue
            if self._table.get(node.key) is node:
                self._idle[node] = None
            else:
                self._allocator.release([node.page])

    def _take(self, count: int) -> list[int] | None:
        """So many pages, some of them from the trie where too few are unused."""
        short = count - self._allocator.free
        if short > len(self._idle):
            return None
        for _ in range(short):
            node, _ = self._idle.popitem(last=False)
            del self._table[node.key]
            self._allocator.release([node.page])
            self.evicted += 1
        return self._allocator.allocate(count)


def in_order(prompts: Sequence[tuple[str | None, Sequence[int]]], page_size: int) -> list[int]:
    """In which order to admit prompts, so that those that share pages follow one another: their indices.

    Else they stay in the order that they have.

    Args:
        prompts: the salt and the ids of each.
    """
    first = [(salt, _packed(ids[:page_size])) for salt, ids in prompts]
    if len(set(first)) == len(first):
        return list(range(len(prompts)))
    # A prompt's path names its full pages by the order in which they were met first.
    met: dict[tuple[int | str | None, bytes], int] = {}
    paths: list[list[int]] = []
    width = page_size * _ID_BYTES
    for salt, ids in prompts:
        packed, path = _packed(ids), []
        parent: int | str | None = salt
        for start in range(0, len(packed), width):
            parent = met.setdefault((parent, packed[start : start + width]), len(met))
            path.append(parent)
        paths.append(path)
    return sorted(range(len(prompts)), key=paths.__getitem__)


def _packed(ids: Sequence[int]) -> bytes:
    """The ids, each in `_ID_BYTES` bytes."""
    return array("i", ids).tobytes()
