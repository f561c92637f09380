"""Which drafted tokens are accepted.

A step of several tokens a row fed a row's last token and what was drafted behind it. The sampler chose a token behind
each of them, with its own position's noise. A draft is accepted while it equals the token that was chosen in its place:
then the next choice was made on what the row really has. So the tokens are those of steps of one token, whoever drafts
(Daliri, Musco, Suresh, arXiv:2408.07978, call it drafter-invariant).

Where the run ends early, at an end-of-sequence token or a stop string, whoever reads the tokens cuts it: the request
ends there, and nobody looks at its state again. It never reaches past a row's limit, because no draft does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridgen.kernels.step.advance import REJECTED

NO_DRAFT = -1
"""In the place of a draft: there is none, and none behind it."""


def accepted_run(chosen: Tensor, drafts: Tensor) -> Tensor:
    """The tokens that each row has now, `REJECTED` behind them: [B, Q].

    Args:
        chosen: int64 [B, Q], the sampler's token behind each token that was fed; -1 where it had none.
        drafts: int64 [B, Q - 1], the tokens that were fed behind the first; `NO_DRAFT` where a row had none.
    """
    right = ((chosen[:, :-1] == drafts) & (drafts != NO_DRAFT)).cumprod(dim=1).bool()
    first = torch.ones_like(chosen[:, :1], dtype=torch.bool)
    return torch.where(torch.cat((first, right), dim=1), chosen, REJECTED)
