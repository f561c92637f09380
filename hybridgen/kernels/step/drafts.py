"""Steps that check drafts: the ops `hybridgen::feed_drafts`, `accept_drafts` and `keep_drafts`.

A step of Q tokens a row feeds a row's last token and what was drafted behind it. The sampler chooses a token behind
each of them, with its own position's noise. A draft is accepted while it equals the token that was chosen in its place:
then the next choice was made on what the row really has. So the tokens are those of steps of one token, whoever drafts
(Daliri, Musco, Suresh, arXiv:2408.07978, call it drafter-invariant).

Where a run ends early, at an end-of-sequence token or a stop string, whoever reads the tokens cuts it: the request ends
there, and nobody looks at its state again. It never reaches past a row's limit, because no draft is kept that does.

| tensor | shape | dtype |
|---|---|---|
| table | [3, slots] | int64: last token, length, generated tokens, see `advance` |
| drafts | [slots, K], contiguous | int64: what was drafted behind each slot's last token; `NO_DRAFT` behind that |
| rows | [B] | int64: each row's slot; the last slot is the padding slot |
| chosen | [B, Q], Q at most K + 1 | int64: the token chosen behind each that was fed; -1 where there was none |
| made | [B, K] | int64: what a drafter said, `NO_DRAFT` from the first place on where it said nothing |

Grids follow from shapes alone, so that a step can be recorded. The CPU implementations define the results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridgen.kernels.step.advance import REJECTED

NO_DRAFT = -1
"""In the place of a draft: there is none, and none behind it."""

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "feed_drafts(Tensor table, Tensor drafts, Tensor rows, int count) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "accept_drafts(Tensor chosen, Tensor drafts, Tensor rows) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "keep_drafts(Tensor made, Tensor(a!) drafts, Tensor rows, Tensor room, int vocab_size, int checked) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def feed_drafts(table: Tensor, drafts: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a step of `count` tokens a row feeds: ids int64, slots int32 and positions int64, each [B * count].

    Where a row has fewer drafts, the places behind them are padding: token 0 at position 0 of the padding slot.
    """
    ids, slots, positions = torch.ops.hybridgen.feed_drafts.default(table, drafts, rows, count)
    return ids, slots, positions


def accept_drafts(chosen: Tensor, drafts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that each row has now, `REJECTED` behind them: int64 [B, Q]; and how many they are, int64 [B]."""
    accepted, brought = torch.ops.hybridgen.accept_drafts.default(chosen, drafts, rows)
    return accepted, brought


def keep_drafts(made: Tensor, drafts: Tensor, rows: Tensor, room: Tensor, vocab_size: int, checked: int) -> Tensor:
    """Keep what a drafter said for the next step, up to the first that cannot be fed.

    Args:
        room: int64 [B], how many tokens each row may still generate. One of them is chosen by the next step itself.
        vocab_size: ids from here on, and below 0, are dropped.
        checked: drafts of each row that this step had room for.

    Returns:
        int64 [B, 3]: drafts that this step checked, drafts that were kept, and drafts that are no ids.
    """
    return torch.ops.hybridgen.keep_drafts.default(made, drafts, rows, room, vocab_size, checked)


def _feed_cpu(table: Tensor, drafts: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    last, lengths = table[0, rows], table[1, rows]
    ids = torch.cat((last[:, None], drafts[rows, : count - 1]), dim=1)
    fed = ids != NO_DRAFT
    slots = torch.where(fed, rows[:, None], table.shape[1] - 1).to(torch.int32)
    positions = (lengths[:, None] + torch.arange(count)) * fed
    return (ids * fed).flatten(), slots.flatten(), positions.flatten()


def _accept_cpu(chosen: Tensor, drafts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    fed = drafts[rows, : chosen.shape[1] - 1]
    right = ((chosen[:, :-1] == fed) & (fed != NO_DRAFT)).cumprod(dim=1).bool()
    taken = torch.cat((torch.ones_like(chosen[:, :1], dtype=torch.bool), right), dim=1)
    return torch.where(taken, chosen, REJECTED), taken.sum(dim=1)


def _keep_cpu(made: Tensor, drafts: Tensor, rows: Tensor, room: Tensor, vocab_size: int, checked: int) -> Tensor:
    fed = (drafts[rows, :checked] != NO_DRAFT).sum(dim=1)
    real = (rows < drafts.shape[0] - 1)[:, None]
    inside = torch.arange(made.shape[1]) < (room - 1)[:, None]
    kept = ((made >= 0) & (made < vocab_size) & inside & real).cumprod(dim=1).bool()
    drafts[rows] = torch.where(kept, made, NO_DRAFT)
    dropped = ((made < NO_DRAFT) | (made >= vocab_size)) & real
    return torch.stack((fed, kept.sum(dim=1), dropped.sum(dim=1)), dim=1)


def _feed_cuda(table: Tensor, drafts: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    from hybridgen.kernels.step.drafts_kernels import launch_feed

    return launch_feed(table, drafts, rows, count)


def _accept_cuda(chosen: Tensor, drafts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    from hybridgen.kernels.step.drafts_kernels import launch_accept

    return launch_accept(chosen, drafts, rows)


def _keep_cuda(made: Tensor, drafts: Tensor, rows: Tensor, room: Tensor, vocab_size: int, checked: int) -> Tensor:
    from hybridgen.kernels.step.drafts_kernels import launch_keep

    return launch_keep(made, drafts, rows, room, vocab_size, checked)


def _feed_fake(table: Tensor, drafts: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = rows.shape[0] * count
    return rows.new_empty(tokens), rows.new_empty(tokens, dtype=torch.int32), rows.new_empty(tokens)


def _accept_fake(chosen: Tensor, drafts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(chosen), torch.empty_like(rows)


def _keep_fake(made: Tensor, drafts: Tensor, rows: Tensor, room: Tensor, vocab_size: int, checked: int) -> Tensor:
    return rows.new_empty((rows.shape[0], 3))


for _name, _cpu, _cuda, _fake in (
    ("feed_drafts", _feed_cpu, _feed_cuda, _feed_fake),
    ("accept_drafts", _accept_cpu, _accept_cuda, _accept_fake),
    ("keep_drafts", _keep_cpu, _keep_cuda, _keep_fake),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"hybridgen::{_name}", _fake, lib=_library)
