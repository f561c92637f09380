"""What timed trials at a start chose. An entry of the compile cache keeps it: its compiled layers are those of these
choices, and a busy device may be timed differently at the next start."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class Measured:
    """For each pair of ways that was timed, whether ours was left for the other one."""

    def __init__(self, known: Mapping[str, object] | None = None) -> None:
        """
        Args:
            known: what an earlier start's `known` was; what is no text is left out.
        """
        self.known = {what: why for what, why in (known or {}).items() if isinstance(why, str)}
        """By what was timed: why our way is not taken; empty where it is."""
        self.is_new = False
        """Whether something was timed here."""

    def slower(self, what: str, measure: Callable[[], str | None]) -> str | None:
        """Why our way is not taken, in words; None where it is. `measure` says it the first time."""
        if what not in self.known:
            self.known[what] = measure() or ""
            self.is_new = True
        return self.known[what] or None
