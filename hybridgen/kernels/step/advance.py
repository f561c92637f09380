"""The end of a step on the device: the ops `hybridgen::publish` and `hybridgen::advance`.

What a step produced goes into rings that the host reads one or more steps later; line `counter % lines` is the
step's. `advance` also stores the tokens and the new counts as the state that the next step begins with, and moves the
counter on, so that a replayed step needs nothing from the host.

| tensor | shape | dtype |
|---|---|---|
| tokens | [B], or [B, Q] of several a row | int64; -1 where a row has none; `REJECTED` behind what was accepted |
| rows | [B] | int64: each row's slot; the last slot is the padding slot |
| lengths, generated | [B] | int64: tokens of the sequence, and generated ones, the new ones not counted in either |
| table | [3, slots] | int64: last token (0 for -1), length, generated |
| ring | [lines, n] or [lines, n, width], n at least B x Q | as what is published |
| counter | [1] | int64: steps so far |
| counts | [slots, vocab_size] | int32: how often each slot's output has each token |

Several tokens of a row lie next to each other in the ring: token j of row b is at place `b * Q + j`. Rings may be
pinned host memory that the device addresses (`execution.ring`). A row of the padding slot changes no state. Two other
rows must not share a slot.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

REJECTED = -2
"""In the place of a token that was not accepted: all behind the last accepted one of a row."""

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "publish(Tensor values, Tensor(a!) ring, Tensor counter) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "advance(Tensor tokens, Tensor rows, Tensor lengths, Tensor generated, Tensor(a!) table, Tensor(b!) ring, "
    "Tensor(c!) counter, Tensor(d!)? counts=None) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def publish(values: Tensor, ring: Tensor, counter: Tensor) -> None:
    """Write [B] or [B, w] values into the step's line of a ring of the same dtype, at least as wide."""
    torch.ops.hybridgen.publish.default(values, ring, counter)


def advance(
    tokens: Tensor,
    rows: Tensor,
    lengths: Tensor,
    generated: Tensor,
    table: Tensor,
    ring: Tensor,
    counter: Tensor,
    counts: Tensor | None = None,
) -> None:
    """Publish the tokens, store the rows' new state, and count the step and, where `counts` is given, the tokens.

    A row's state moves by the tokens that it accepted, at least one. The last op of a step, and the only one that moves
    state on: a step that fails before can run again.
    """
    torch.ops.hybridgen.advance.default(tokens, rows, lengths, generated, table, ring, counter, counts)


def publish_on_cpu(values: Tensor, ring: Tensor, counter: Tensor) -> None:
    """`publish` in torch operators."""
    window = ring[:, : values.shape[0]] if values.dim() == 1 else ring[:, : values.shape[0], : values.shape[1]]
    window.index_copy_(0, counter % ring.shape[0], values[None])


def advance_on_cpu(
    tokens: Tensor,
    rows: Tensor,
    lengths: Tensor,
    generated: Tensor,
    table: Tensor,
    ring: Tensor,
    counter: Tensor,
    counts: Tensor | None = None,
) -> None:
    """`advance` in torch operators, for compilers."""
    # No value is read on the host and no shape depends on one, so that a step's operators can be recorded.
    publish_on_cpu(tokens.flatten(), ring, counter)
    accepted: Tensor | int = 1
    last = tokens
    if tokens.dim() == 2:
        accepted = (tokens != REJECTED).sum(dim=1)
        last = tokens.gather(1, accepted[:, None] - 1)[:, 0]
    real = rows < table.shape[1] - 1
    state = torch.stack((last.clamp(min=0), lengths + accepted - 1, generated + accepted))
    table.index_copy_(1, rows, torch.where(real, state, table.index_select(1, rows)))
    if counts is not None:
        several = tokens.view(rows.shape[0], -1) if tokens.numel() else tokens[:, None]
        chosen = real[:, None] & (several >= 0)
        cells = rows[:, None].expand_as(several), several.clamp(min=0)
        counts.index_put_(cells, chosen.to(counts.dtype), accumulate=True)
    counter += 1


def _advance_on_host(
    tokens: Tensor,
    rows: Tensor,
    lengths: Tensor,
    generated: Tensor,
    table: Tensor,
    ring: Tensor,
    counter: Tensor,
    counts: Tensor | None = None,
) -> None:
    """`advance` by numpy: the same writes without two dozen operators, each of which costs several microseconds."""
    if tokens.dim() == 2:
        advance_on_cpu(tokens, rows, lengths, generated, table, ring, counter, counts)
        return
    chosen, cells, state = tokens.numpy(), rows.numpy(), table.numpy()
    ring.numpy()[int(counter) % ring.shape[0], : chosen.shape[0]] = chosen
    real = cells < table.shape[1] - 1
    cells = cells[real]
    state[0, cells] = np.maximum(chosen[real], 0)
    state[1, cells] = lengths.numpy()[real]
    state[2, cells] = generated.numpy()[real] + 1
    if counts is not None:
        told = chosen[real] >= 0
        counts.numpy()[cells[told], chosen[real][told]] += 1
    counter.numpy()[:] += 1


def _publish_cuda(values: Tensor, ring: Tensor, counter: Tensor) -> None:
    from hybridgen.kernels.step.advance_kernels import launch_publish

    launch_publish(values, ring, counter)


def _advance_cuda(
    tokens: Tensor,
    rows: Tensor,
    lengths: Tensor,
    generated: Tensor,
    table: Tensor,
    ring: Tensor,
    counter: Tensor,
    counts: Tensor | None = None,
) -> None:
    from hybridgen.kernels.step.advance_kernels import launch_advance

    launch_advance(tokens, rows, lengths, generated, table, ring, counter, counts)


def _no_output(*_: Tensor | None) -> None:
    return None


_library.impl("publish", publish_on_cpu, "CPU")
_library.impl("publish", _publish_cuda, "CUDA")
_library.impl("advance", _advance_on_host, "CPU")
_library.impl("advance", _advance_cuda, "CUDA")
torch.library.register_fake("hybridgen::publish", _no_output, lib=_library)
torch.library.register_fake("hybridgen::advance", _no_output, lib=_library)
