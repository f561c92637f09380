"""Prompts whose tokens are fed beside decode, in rows that it does not fill.

A decode step of few rows takes nearly as long as one of many, because it reads all weights. So of a list that is wanted
as a whole, some requests are held back: they end long before the others, and their prompts' tokens fill the rows that
decode leaves free, some in each step. This is what chunked prefill is elsewhere (Agrawal et al. 2023,
arXiv:2308.16369), but for that a prompt's token is a row of a decode step as any other: nothing is recorded or compiled
for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybridgen.cache import PageManager
from hybridgen.engine.requests import Request
from hybridgen.models import BoundModel
from hybridgen.models.rotating import RotatingAttention

LONGEST = 768
"""Tokens of a prompt that may be held back: each of its tokens reads all before it, as if it was decoded."""
RUN = 64
"""Tokens of a prompt in a step at most: attention of a decode step may read older ones before they are written (see
`streamed.cu`)."""
_MOST_ROWS = 256
"""With more rows than these, products take as long for each token as in a prefill."""
_LEAST_ROWS = 24
"""That decode: with fewer, steps have faster kernels of their own."""
_LEAST_ROOM = 16
_PART = 0.8
"""Of what the longest request may generate: who may generate more is not held back."""


def always_worth(rows: int, room: int) -> bool:
    """As where nothing is known of times."""
    return True


class Mixing:
    """Says which requests are held back, and how many of their tokens a step feeds."""

    def __init__(
        self,
        pages: PageManager,
        slots: int,
        *,
        worth: Callable[[int, int], bool] = always_worth,
        least_rows: int = _LEAST_ROWS,
        least_room: int = _LEAST_ROOM,
        longest: int = LONGEST,
        everyone: bool = False,
    ) -> None:
        """
        Args:
            slots: requests that run at most.
            worth: whether so many tokens are fed faster beside so many rows than in a prefill call.
            least_rows: that decode, or nothing is fed beside them.
            least_room: rows that are left, or nothing is fed in these.
            longest: tokens of a prompt that may be held back.
            everyone: also feed prompts of requests that are waited for one by one, and of those that generate the most:
                a first token comes later then, and those of others wait for no prefill call.
        """
        self._pages = pages
        self._slots = slots
        self._most = min(slots, _MOST_ROWS)
        self._worth = worth
        self._least_rows = least_rows
        self._least_room = least_room
        self._longest = longest
        self._everyone = everyone

    def held(self, running: Sequence[Request], waiting: int) -> list[Request]:
        """Those of the running requests that are held back: not while others wait for their slots.

        Args:
            waiting: how many requests have no slot yet.
        """
        if len(running) + waiting > self._slots or not all(map(_is_plain, running)):
            return []
        if self._everyone:
            return [request for request in running if self._may_wait(request, request.sampling.max_new_tokens)]
        if not all(request.patient for request in running):
            return []
        longest = max((request.sampling.max_new_tokens for request in running), default=0)
        return [request for request in running if self._may_wait(request, _PART * longest)]

    def _may_wait(self, request: Request, most_new: float) -> bool:
        length = len(request.prefill_ids)
        if request.prefilled == length or length > self._longest or request.sampling.max_new_tokens > most_new:
            return False
        return self._pages.has_alone(request.pages)

    def room(self, rows: int) -> int | None:
        """How many tokens a step feeds beside so many rows; None: they are to be prefilled instead."""
        room = self._most - rows
        if rows < self._least_rows:
            return None
        if room < self._least_room:
            return 0
        return room if self._worth(rows, room) else None


def _is_plain(request: Request) -> bool:
    """Whether nothing is told of the request's prompt, and its sampler keeps no count or text that the tokens of
    others' prompts would go into."""
    sampling = request.sampling
    if request.scored_from is not None or request.hidden is not None:
        return False
    return not (sampling.penalizes or sampling.reads_history or sampling.has_own) and sampling.max_new_tokens > 0


def cannot_mix(bound: BoundModel, *, whole: bool, ranks: bool, drafts: bool) -> str | None:
    """Why no decode step of a model can have tokens of prompts among its rows; None if it can.

    Keys and values of all rows must be written before any is read, and a token's row must be all that it changes.

    Args:
        whole: steps are compiled whole.
        ranks: several processes run the model.
        drafts: somebody drafts.
    """
    if whole or ranks or drafts:
        return "steps are compiled whole" if whole else "several processes run it" if ranks else "tokens are drafted"
    if bound.mixers or bound.latents or bound.counting or bound.length_dependent:
        return "the model keeps more than keys and values, or a token's place is not all that its layers look at"
    writes = all(isinstance(site.module, RotatingAttention) for site in bound.sites)
    if bound.model.device.type == "cuda" and not writes:
        return "its layers do not write keys and values before they attend"
    return None
