"""Cases of the ops that feed, accept and keep drafts, and the kernels on them in Triton's interpreter."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from hybridgen.kernels.step.drafts import NO_DRAFT, accept_drafts, feed_drafts, keep_drafts

SLOTS, WIDTH, VOCAB = 6, 7, 50  # the last slot is padding


def random_tables(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The state table, drafts of each slot, and rows: slots of which none comes twice, then padding."""
    rng = random.Random(seed)
    table = torch.tensor([[rng.randrange(VOCAB) for _ in range(SLOTS)] for _ in range(3)])
    table[:, -1] = 0
    drafts = torch.full((SLOTS, WIDTH), NO_DRAFT)
    for slot in range(SLOTS - 1):
        count = rng.choice([0, 0, 1, 3, WIDTH])
        drafts[slot, :count] = torch.tensor([rng.randrange(VOCAB) for _ in range(count)], dtype=torch.int64)
    rows = rng.sample(range(SLOTS - 1), rng.randint(1, SLOTS - 1)) + [SLOTS - 1] * rng.randint(0, 2)
    return table, drafts, torch.tensor(rows)


def random_chosen(seed: int, drafts: Tensor, rows: Tensor, count: int) -> Tensor:
    """Tokens of which many equal the drafts; -1 among them."""
    rng = random.Random(seed)
    chosen = torch.tensor([[rng.choice([-1, *range(VOCAB)]) for _ in range(count)] for _ in rows])
    for row, slot in enumerate(rows.tolist()):
        right = rng.randint(0, min(count, WIDTH))
        chosen[row, :right] = torch.where(drafts[slot, :right] < 0, chosen[row, :right], drafts[slot, :right])
    return chosen


def random_made(seed: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What a drafter says, with what is no id among it; and the room of each row."""
    rng = random.Random(seed)
    ids = [*range(VOCAB)] * 3 + [NO_DRAFT, -2, VOCAB, 2**62, -(2**62)]
    made = torch.tensor([[rng.choice(ids) for _ in range(WIDTH)] for _ in rows])
    return made, torch.tensor([rng.choice([-3, 0, 1, 2, 5, 8, 100]) for _ in rows])


def check_kernels() -> None:
    """The kernels on all cases; only in the interpreter, where test_drafts.py runs it."""
    from hybridgen.kernels.step.drafts_kernels import launch_accept, launch_feed, launch_keep

    for seed in range(40):
        table, drafts, rows = random_tables(seed)
        for count in (1, 2, 4, WIDTH + 1):
            ours, theirs = launch_feed(table, drafts, rows, count), feed_drafts(table, drafts, rows, count)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), seed
            assert [a.dtype for a in ours] == [b.dtype for b in theirs]
            chosen = random_chosen(seed, drafts, rows, count)
            ours, theirs = launch_accept(chosen, drafts, rows), accept_drafts(chosen, drafts, rows)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), seed
            made, room = random_made(seed, rows)
            left, right = drafts.clone(), drafts.clone()
            told = launch_keep(made, left, rows, room, VOCAB, count - 1)
            assert torch.equal(told, keep_drafts(made, right, rows, room, VOCAB, count - 1)), seed
            assert torch.equal(left, right), seed
