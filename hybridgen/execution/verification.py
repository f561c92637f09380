"""Which drafted tokens are accepted.

A step of several tokens a row fed a row's last token and what was drafted behind it. The sampler chose a token behind
each of them, with its own position's noise. A draft is accepted while it equals the token that was chosen in its place:
then the next choice was made on what the row really has. So the tokens are those of steps of one token, whoever drafts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridgen.kernels.step.advance import REJECTED


def accepted_run(chosen: Tensor, drafts: Tensor) -> Tensor:
    """The tokens that each row has now, `REJECTED` behind them: [B, Q].

    Args:
        chosen: int64 [B, Q], the sampler's token behind each token that was fed; -1 where it had none.
        drafts: int64 [B, Q - 1], the tokens that were fed behind the first.
    """
    right = (chosen[:, :-1] == drafts).cumprod(dim=1).bool()
    first = torch.ones_like(chosen[:, :1], dtype=torch.bool)
    return torch.where(torch.cat((first, right), dim=1), chosen, REJECTED)
