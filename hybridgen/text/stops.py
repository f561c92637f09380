"""Stop strings: where a text ends, found while it arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopChecker:
    """Cuts a text before the first stop string.

    The first stop string is the one that is complete first; of several that end at the same character, the
    longest. So the cut does not depend on how the text was split into pieces, and a match never has to wait
    for text that may
    not come: with the stops "cd" and "abcdef", "abcd" ends the text before "cd".

    Text that may be the start of a stop string is held back until it is known not to be. The search is Aho
    and Corasick's (CACM 18, 1975): a constant number of steps per character on average, for any number of
    stop strings.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._automaton = _automaton(tuple(stop_strings)) if stop_strings else None
        self._node = 0
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next piece of the text.

        Returns:
            The text that can be given out, and the stop string that ended it or None. After a match, every
            call returns no text and that match.
        """
        if self._automaton is None:
            return text, None
        if self._matched is not None:
            return "", self._matched
        automaton, node = self._automaton, self._node
        held = self._held + text
        for index, char in enumerate(text, len(self._held)):
            node = automaton.step(node, char)
            match = automaton.match[node]
            if match is not None:
                self._matched, self._held = match, ""
                return held[: index + 1 - len(match)], match
        self._node = node
        keep = len(held) - automaton.depth[node]
        self._held = held[keep:]
        return held[:keep], None

    def flush(self) -> str:
        """The text still held back, at the end of the text. Empty after a match."""
        held, self._held, self._node = self._held, "", 0
        return held


class _Automaton:
    """The prefixes of the stop strings as a tree (node 0 is empty), each linked to its longest proper suffix
    there.

    The node reached after a text is its longest suffix that begins a stop string: what has to be held back.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.child: dict[tuple[int, str], int] = {}
        self.depth = [0]
        """Length of each node's prefix."""
        self.match: list[str | None] = [None]
        """The longest stop string that each node's prefix ends with."""
        self._link = [0]
        for stop in stops:
            self._insert(stop)
        self._connect()

    def step(self, node: int, char: str) -> int:
        """The node after one more character."""
        child, link = self.child, self._link
        while (following := child.get((node, char))) is None:
            if node == 0:
                return 0
            node = link[node]
        return following

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            if (node, char) not in self.child:
                self.child[node, char] = len(self.depth)
                self.depth.append(self.depth[node] + 1)
                self.match.append(None)
                self._link.append(0)
            node = self.child[node, char]
        self.match[node] = stop

    def _connect(self) -> None:
        # By depth, because a link leads to a shallower node, which must be complete.
        for (parent, char), node in sorted(self.child.items(), key=lambda edge: self.depth[edge[1]]):
            if parent != 0:
                self._link[node] = self.step(self._link[parent], char)
            if self.match[node] is None:
                self.match[node] = self.match[self._link[node]]


@lru_cache(maxsize=8)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)
