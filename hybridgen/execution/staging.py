"""What steps read, on its way to the device: blocks that the host fills, and where the step finds them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridgen.device.watched import is_watched
from hybridgen.execution.plan import PrefillChunk
from hybridgen.execution.state import DeviceState, SlotRows
from hybridgen.graphs.key import GraphKey
from hybridgen.kernels import MetadataCopy, copy_metadata
from hybridgen.kernels.step.metadata import reference as copy_one_by_one
from hybridgen.models import StepMetadata
from hybridgen.models.attention import Phase

_MAX_PREPARED = 256
_ALIGNMENT = 64
"""Bytes; fields begin at multiples of it."""


class StagedBlock:
    """Named arrays that the host fills and one copy brings to the device.

    The copy is asynchronous and in the order of the stream, so it cannot overtake a step that still reads what the
    device has. The host's side is pinned, and there are two of it (or one): the next block is filled while the last
    one is copied, and an event guards each.
    """

    def __init__(
        self, fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device, *, buffers: int = 2
    ) -> None:
        """Fields by name, with dtype and shape; all zero at first."""
        places: dict[str, tuple[int, int]] = {}
        size = 0
        for name, (dtype, shape) in fields.items():
            bytes_ = dtype.itemsize * math.prod(shape)
            places[name] = size, size + bytes_
            size += -(-bytes_ // _ALIGNMENT) * _ALIGNMENT
        on_cuda = device.type == "cuda"
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._hosts = [torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=on_cuda) for _ in range(buffers)]
        self._events = [torch.cuda.Event() for _ in range(buffers)] if on_cuda else None
        self._turn = 0

        def views(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[slice(*places[name])].view(dtype).view(shape) for name, (dtype, shape) in fields.items()
            }

        self.device: dict[str, Tensor] = views(self._device)
        """The fields as the device has them."""
        self._arrays: list[dict[str, np.ndarray[Any, Any]]] = [
            {name: view.numpy() for name, view in views(host).items()} for host in self._hosts
        ]

    def open(self) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays to fill for the next `send()`; waits while they are still being copied.

        They hold what an earlier turn left.
        """
        if self._events is not None:
            self._events[self._turn].synchronize()
        return self._arrays[self._turn]

    def send(self) -> None:
        """Copy what was filled to the device, on the current stream."""
        self._device.copy_(self._hosts[self._turn], non_blocking=True)
        if self._events is not None:
            self._events[self._turn].record()
        self._turn = (self._turn + 1) % len(self._hosts)


class StagedInputs:
    """The inputs of a model's steps, at fixed addresses.

    `stage_*` puts a step's metadata on its way to the device. The step's first node copies it from where the host's
    block arrives to the buffers that the model reads.
    """

    def __init__(
        self, state: DeviceState, *, token_budget: int, longest_run: int, one_copy: bool = True, buffers: int = 2
    ) -> None:
        """
        Args:
            token_budget: tokens of a prefill call at most.
            longest_run: positions that the block table has columns for, those of padding included.
            one_copy: copy a step's metadata in one launch, else tensor by tensor.
            buffers: how many blocks the host fills in turn.
        """
        # One more than a step can have, so that no size of a step equals a buffer's: where they are equal, a compiled
        # step (`graphs.trees`) is specialised to it.
        device, lines, tokens = state.device, state.max_batch + 1, token_budget + 1
        self._state = state
        self._one_copy = one_copy
        self._longest_run = longest_run
        self._decode_block = StagedBlock(
            {"rows": (torch.int64, (lines,)), "slots": (torch.int32, (lines,))}, device, buffers=buffers
        )
        self._prefill_block = StagedBlock(
            {
                "starts": (torch.int32, (lines + 1,)),
                "fed": (torch.int64, (lines,)),
                "keep": (torch.int64, (lines,)),
                "rows": (torch.int64, (lines,)),
                "lengths": (torch.int64, (lines,)),
                "generated": (torch.int64, (lines,)),
                "slots": (torch.int32, (tokens,)),
                "ids": (torch.int64, (tokens,)),
                "positions": (torch.int64, (tokens,)),
                "rope": (torch.int64, (tokens,)),
            },
            device,
            buffers=buffers,
        )
        self._fed_block = StagedBlock(
            {"lines": (torch.int64, (lines,)), "state": (torch.int64, (len(SlotRows._fields), lines))},
            device,
            buffers=buffers,
        )
        with torch.inference_mode():  # as what a step computes is: a compiled layer is specialised to that
            self._decode = {name: torch.zeros_like(field) for name, field in self._decode_block.device.items()}
            self._prefill = {name: torch.zeros_like(field) for name, field in self._prefill_block.device.items()}
        self._zeros = torch.zeros(3, 1, dtype=torch.int64, device=device)
        self._copies: dict[tuple[Phase, int, int], Callable[[], None]] = {}
        empty = self._prefill["ids"][:1]
        self.metadata = StepMetadata(
            state.block_table.tensor,
            self._prefill["slots"][:1],
            empty,
            self._prefill["starts"],
            empty,
            empty,
            fed=self._prefill["fed"],
        )
        """What the model's attention reads; set by each step."""

    def input_tensors(self) -> dict[str, Tensor]:
        """Where inputs arrive and where steps read them, by name."""
        return {
            "zeros": self._zeros,
            **{f"staged {name}": field for name, field in self._decode_block.device.items()},
            **{f"staged prompt {name}": field for name, field in self._prefill_block.device.items()},
            **{f"decode {name}": field for name, field in self._decode.items()},
            **{f"prefill {name}": field for name, field in self._prefill.items()},
        }

    def stage_decode(self, slots: Sequence[int], lines: Sequence[int] | None = None) -> None:
        """Say which slots are the rows of the decode steps that follow.

        Args:
            lines: where the state of each row lies; None: in its slot's line.
        """
        block = self._decode_block.open()
        for name, values in (("rows", slots if lines is None else lines), ("slots", slots)):
            block[name][: len(slots)] = values
            block[name][len(slots) :] = self._state.padding_slot
        self._decode_block.send()

    def stage_together(self, slots: tuple[int, ...], chunks: Sequence[PrefillChunk]) -> None:
        """Say what a decode step feeds that has tokens of prompts in it: the slots that decode, then the last tokens of
        the prompts that end, then the other tokens.

        Each of these tokens is a row whose state the host writes. That of a prompt's last token is in the line of its
        slot, where the next step finds what was sampled. The others take lines of slots that do not decode: nobody
        reads what is sampled for them, and whoever decodes in such a slot later has its line written before.
        """
        ends = [chunk for chunk in chunks if chunk.last]
        last = [(chunk.slot, chunk.start + len(chunk.tokens) - 1, chunk.tokens[-1]) for chunk in ends]
        others = [
            (chunk.slot, place, token)
            for chunk in chunks
            for place, token in enumerate(chunk.tokens[: len(chunk.tokens) - chunk.last], chunk.start)
        ]
        used = {*slots, *(chunk.slot for chunk in ends)}
        spare = (line for line in range(self._state.max_batch) if line not in used)
        lines = [*(chunk.slot for chunk in ends), *itertools.islice(spare, len(others))]
        fed = [*last, *others]
        if len(lines) < len(fed):
            raise ValueError(f"{len(slots)} rows leave no room for {len(fed)} tokens of prompts")
        block = self._fed_block.open()
        block["lines"][:] = self._state.padding_slot
        block["lines"][: len(fed)] = lines
        block["state"][:] = 0
        state = SlotRows([token for *_, token in fed], [place for _, place, _ in fed], [0] * len(fed))  # type: ignore[arg-type]
        block["state"][:, : len(fed)] = state
        self._fed_block.send()
        sent = self._fed_block.device
        self._state.table.index_copy_(1, sent["lines"], sent["state"])
        self.stage_decode([*slots, *(slot for slot, *_ in fed)], [*slots, *lines])

    def stage_prefill(self, chunks: Sequence[PrefillChunk], tokens: int, rows: int) -> None:
        """Set what the next prefill step of this size feeds: the chunks, packed, then padding, in one run or, where
        that would be longer than a request can be, in several; see `has_room`."""
        block = self._prefill_block.open()
        total = 0
        ends = [chunk for chunk in chunks if chunk.last]
        keep = []
        starts = [0]
        for chunk in chunks:
            run = slice(total, total + len(chunk.tokens))
            block["ids"][run] = chunk.tokens
            block["slots"][run] = chunk.slot
            block["positions"][run] = np.arange(chunk.start, chunk.start + len(chunk.tokens))
            block["rope"][run] = chunk.rope_length
            total = run.stop
            starts.append(total)
            if chunk.last:
                keep.append(total - 1)
        padding, count, longest = slice(total, tokens), tokens - total, self._longest_run
        block["ids"][padding] = 0
        block["slots"][padding] = self._state.padding_slot
        block["positions"][padding] = np.arange(count) % longest
        block["rope"][padding] = min(count, longest)
        starts += range(total + longest, tokens, longest)
        padded = ((min(longest, count - first), True) for first in range(0, count, longest))
        self.metadata.runs = (*((len(chunk.tokens), chunk.start == 0) for chunk in chunks), *padded)
        block["fed"][: len(chunks)] = [chunk.slot for chunk in chunks]
        block["fed"][len(chunks) :] = self._state.padding_slot
        block["starts"][: len(starts)] = starts
        block["starts"][len(starts) :] = tokens
        count = len(ends)
        block["keep"][:count] = keep
        block["rows"][:count] = [chunk.slot for chunk in ends]
        block["lengths"][:count] = [chunk.start + len(chunk.tokens) for chunk in ends]
        block["generated"][:count] = [chunk.generated for chunk in ends]
        for name, value in (("keep", 0), ("rows", self._state.padding_slot), ("lengths", 0), ("generated", 0)):
            block[name][count:] = value
        self._prefill_block.send()

    def has_room(self, chunks: int, padding: int) -> bool:
        """Whether a prefill call can have so many chunks and so many tokens of padding behind them."""
        return chunks + -(-padding // self._longest_run) <= self._state.max_batch + 1

    def _set(
        self, phase: Phase, ids: Tensor, slots: Tensor, positions: Tensor, rope: Tensor, *, several: bool = False
    ) -> None:
        step = self.metadata
        step.phase, step.several, step.ids, step.ends = phase, several, ids, None
        step.slots, step.positions, step.rope_lengths = slots, positions, rope

    def _bring_in(self, key: GraphKey) -> None:
        """Copy what arrived from the host to where the step reads it, and reset the padding slot.

        Compiled and captured steps have the registered op in them. Others launch copies that were prepared, which costs
        the host less.
        """
        phase, rows = key.phase, key.rows
        tokens = rows if phase is Phase.DECODE else key.tokens
        if is_watched() or _is_capturing(self._state.device):
            copy_pairs = copy_metadata if self._one_copy else copy_one_by_one
            copy_pairs(*self._pair(phase, tokens, rows))
            return
        copy = self._copies.get((phase, tokens, rows))
        if copy is None:
            if len(self._copies) >= _MAX_PREPARED:  # prompts of every length, without graphs
                self._copies.clear()
            pair = self._pair(phase, tokens, rows)
            copy = MetadataCopy(zip(*pair, strict=True)) if self._one_copy else partial(copy_one_by_one, *pair)
            self._copies[phase, tokens, rows] = copy
        copy()

    def _pair(self, phase: Phase, tokens: int, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        decodes = phase is Phase.DECODE
        block, inputs = (self._decode_block, self._decode) if decodes else (self._prefill_block, self._prefill)
        sizes = dict.fromkeys(("rows", "keep", "lengths", "generated"), rows) | dict.fromkeys(
            ("ids", "positions", "rope"), tokens
        )
        sizes["slots"] = tokens
        sources, destinations = [self._zeros], [self._state.table[:, self._state.padding_slot :]]
        for name, field in block.device.items():
            size = sizes.get(name, field.shape[0])
            sources.append(field[:size])
            destinations.append(inputs[name][:size])
        return sources, destinations


def _is_capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
