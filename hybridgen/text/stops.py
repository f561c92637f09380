"""Stop strings: where a text ends, found while it arrives in pieces."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence


class StopChecker:
    """Cuts a text before the first stop string.

    The first stop string is the one that is complete first; of several that end at the same character, the
    longest. So the cut does not depend on how the text was split into pieces, and a match never has to wait
    for text that may not come: with the stops "cd" and "abcdef", "abcd" ends the text before "cd".

    Text that may be the start of a stop string is held back until it is known not to be. The search is Aho
    and Corasick's (CACM 18, 1975), whose automaton is made only as far as the text goes: a constant number of steps
    per character on average, and memory for the parts of stop strings that the text has had, whatever their number.

    A piece may be hidden: it is looked through, but not given out (special tokens that a text leaves out).
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._automaton = _Automaton(stop_strings) if stop_strings else None
        self._node = 0
        self._held: deque[tuple[str, bool]] = deque()
        """Pieces that are not given out yet, and whether they are shown; of the first, from `_offset` on."""
        self._offset = 0
        self._length = 0
        """Characters held."""
        self._matched: str | None = None

    def push(self, text: str, *, shown: bool = True) -> tuple[str, str | None]:
        """Take the next piece of the text.

        Returns:
            The text that can be given out, and the stop string that ended it or None. After a match, every
            call returns no text and that match.
        """
        if self._automaton is None:
            return text if shown else "", None
        if self._matched is not None:
            return "", self._matched
        if not text:
            return "", None
        automaton, node = self._automaton, self._node
        if not self._length and automaton.cannot_begin(text):  # so nearly every piece
            return text if shown else "", None
        before = self._length
        self._held.append((text, shown))
        self._length += len(text)
        for index, char in enumerate(text, before + 1):
            node = automaton.step(node, char)
            match = automaton.match[node]
            if match is not None:
                given = self._release(index - len(match))
                self._clear()
                self._matched = match
                return given, match
        self._node = node
        return self._release(self._length - automaton.depth[node]), None

    def flush(self) -> str:
        """The text still held back, at the end of the text. Empty after a match."""
        held = self._release(self._length)
        self._clear()
        return held

    def _clear(self) -> None:
        self._held.clear()
        self._offset = self._length = self._node = 0

    def _release(self, count: int) -> str:
        """Take the first characters out of what is held; those that are shown."""
        self._length -= count
        given = []
        while count:
            piece, shown = self._held[0]
            end = min(len(piece), self._offset + count)
            if shown:
                given.append(piece[self._offset : end])
            count -= end - self._offset
            self._offset = end
            if end == len(piece):
                self._held.popleft()
                self._offset = 0
        return "".join(given)


class _Automaton:
    """The prefixes of the stop strings as a tree (node 0 is empty), each linked to its longest proper suffix
    there. Nodes are made when a text first reaches them.

    The node reached after a text is its longest suffix that begins a stop string: what has to be held back. The stop
    strings are sorted, so that those that begin with a node's prefix are a run of them.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops))
        self._first = {stop[0] for stop in self._stops}
        self._run = [(0, len(self._stops))]
        """Where the stop strings are that begin with each node's prefix."""
        self._child: dict[tuple[int, str], int] = {}
        self._link = [0]
        self.depth = [0]
        """Length of each node's prefix."""
        self.match: list[str | None] = [None]
        """The longest stop string that each node's prefix ends with."""

    def cannot_begin(self, text: str) -> bool:
        """Whether no stop string begins anywhere in a text."""
        return self._first.isdisjoint(text)

    def step(self, node: int, char: str) -> int:
        """The node after one more character."""
        following = self._child.get((node, char))
        if following is not None:
            return following
        path = []
        """New nodes from the longest on: each one's link is the next."""
        while True:
            following = self._child.get((node, char))
            if following is not None:
                break
            if node == 0 and char not in self._first:
                following = 0
                break
            made = self._make(node, char)
            if made is not None:
                path.append(made)
            if node == 0:
                following = 0
                break
            node = self._link[node]
        for made in reversed(path):
            self._link[made] = following
            if self.match[made] is None:
                self.match[made] = self.match[following]
            following = made
        return following

    def _make(self, node: int, char: str) -> int | None:
        """The node's child by a character, without its link; None where no stop string goes on so."""
        low, high = self._run[node]
        depth = self.depth[node]
        if high - low == 1:
            stop = self._stops[low]
            if len(stop) == depth or stop[depth] != char:
                return None
        else:

            def following(stop: str) -> str:
                return stop[depth : depth + 1]

            low = bisect_left(self._stops, char, low, high, key=following)
            high = bisect_right(self._stops, char, low, high, key=following)
            if low == high:
                return None
        made = len(self.depth)
        self._child[node, char] = made
        self._run.append((low, high))
        self.depth.append(depth + 1)
        self._link.append(0)
        stop = self._stops[low]  # the shortest of the run
        self.match.append(stop if len(stop) == depth + 1 else None)
        return made
