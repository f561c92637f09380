"""What a config leaves open, decided."""

from __future__ import annotations

from typing import NamedTuple

from hybridgen.config.modes import Mode


class ResolvedConfig(NamedTuple):
    """What an `EngineConfig` leaves open, decided for one model on one device."""

    mode: Mode
    """How steps run; never `auto`."""
    max_context: int
    """Tokens of a request at most, its prompt and its output together."""
    token_budget: int
    """Prompt tokens of one prefill call at most."""
    query_len: int = 1
    """Tokens of a row in a decode step at most: above 1 where drafts are checked."""
    slots: int = 32
    """Requests that the step's buffers have room for; at least `max_batch`. Compiled code knows it."""

    @property
    def max_tokens(self) -> int:
        """Tokens of any prefill call at most: those of all requests, or the budget."""
        return min(self.token_budget, self.slots * self.max_context)
