"""The passes of a drafting head as a chain of Triton kernels: each reads the head's weights once, whatever the rows.

The head is a decoder layer whose attention reads two vectors side by side, an embedding and a hidden state
(`speculation.eagle`). The first pass takes the hidden states of the tokens that the model's step fed; each further one
the state that the pass before left, and the draft that was chosen on it:

    place -> fc -> pair -> qkv [-> settle] -> attend -> out -> gate and up -> down -> logits
    pair -> qkv -> attend -> out -> gate and up -> down -> logits                               once for each more draft
    name                                                                                      where all rows are greedy

`settle` is there where a step fed several tokens of a row: their keys and values go to pages before the last of them
attends. Projections and attention are those of `ChainStep`, with the same roundings. Who chooses the drafts is the
caller's affair.

Imports Triton; import it only where that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hybridgen.device.launcher import power_of_two
from hybridgen.fused.chain.draft_kernels import name_kernel, pair_kernel, place_kernel, settle_kernel
from hybridgen.fused.chain.setup import check_places, stored
from hybridgen.fused.chain.step import MAX_ROWS, ChainStep
from hybridgen.fused.chain.tiles import PROJECTIONS
from hybridgen.models.decoder import Decoder, Linear, Norm, Unfit
from hybridgen.models.quantised import product


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadParts:
    """What a head has beside a decoder of one layer."""

    join: Linear
    """[H, inputs]: makes one hidden state of those of several layers."""
    token_norm: Norm
    """Of embeddings."""
    hidden_norm: Norm
    """Of hidden states; its eps is the other's, too."""
    normed_residual: bool
    """Whether the normed hidden state goes around attention."""
    names: Tensor | None
    """int64 [draft vocabulary]: the model's id of each column of the logits; None: each is its own."""


class HeadChain(ChainStep):
    """A head's passes for up to 16 rows, of which a step fed up to `fed` tokens each."""

    projections = (*PROJECTIONS, "join")
    takes_codes = True

    def __init__(self, model: Decoder, parts: HeadParts, *, max_rows: int, fed: int, most: int) -> None:
        """
        Args:
            model: the head's one layer, its norm and head; `qkv` has 2 * `hidden` inputs, and `embedding` is any tensor
                of its dtype and device.
            max_rows: rows of a call at most; more than 16 are left to others.
            fed: tokens of a row in a step at most.
            most: drafts of a row.

        Raises:
            Unfit: the kernels do not compute this head.
        """
        self._parts = parts
        self.most = most
        """Drafts of a row."""
        self.most_rows = min(max_rows, MAX_ROWS)
        """Rows of a call at most."""
        super().__init__(model, max_rows=min(self.most_rows * fed, MAX_ROWS))
        for name, weights in self._linears().items():
            if stored(weights, codes=True)[1] is not None:
                for rows in (8, 16):
                    self._widen(name, rows)
        [join], _ = stored(parts.join, codes=True)
        check_places([join])
        if parts.join.weight.shape[1] % (16 // join.element_size()):
            raise Unfit(f"its fc has {parts.join.weight.shape[1]} inputs: its rows would not start at 16 bytes")
        tokens, rows, hidden = self.most_rows * fed, self.most_rows, model.hidden
        heads = model.heads + 2 * model.kv_heads

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self._scratch |= {
            "joined": zeros(tokens, hidden),
            "pair": zeros(tokens, 2 * hidden, dtype=model.dtype),
            "around": zeros(tokens, hidden),
            "projected": zeros(tokens, heads, model.head_dim),
            "logits": zeros(rows, model.vocab, dtype=model.dtype),
            "tokens": zeros(tokens, dtype=torch.int64),
            "positions": zeros(tokens, dtype=torch.int64),
            "token slots": zeros(tokens, dtype=torch.int32),
            "places": zeros(most, rows, dtype=torch.int64),
            "place slots": zeros(most, rows, dtype=torch.int32),
            "made": zeros(rows, most, dtype=torch.int64),
        }

    def _linears(self) -> dict[str, Linear]:
        layer, head = self.model.layers[0], self.model.head
        projections = {"qkv": layer.qkv, "out": layer.out, "gate_up": layer.gate_up, "down": layer.down}
        return projections | {"head": head, "join": self._parts.join}

    def _widen(self, name: str, rows: int) -> None:
        """Have a program ask for as many bytes of codes as it would of 16-bit numbers: the defaults are for these."""
        tile = self.tiles.get(f"{name}.{rows}")
        if tile is None:
            return
        _, inner, gated = self.shape(name)
        most = triton.next_power_of_2(triton.cdiv(inner, tile.splits))
        columns = max(32, min(2 * tile.columns, most))
        iterations = triton.next_power_of_2(triton.cdiv(inner, columns * tile.splits))
        tile = tile._replace(columns=columns, ahead=min(tile.ahead, iterations))
        self.tiles[f"{name}.{rows}"] = tile.fitted(rows, gated, self.model.dtype.itemsize, self.device.shared_memory)

    def shape(self, name: str) -> tuple[int, int, bool]:
        """See `ChainStep.shape`."""
        model = self.model
        if name == "join":
            outputs, inputs = self._parts.join.weight.shape
            return outputs, inputs, False
        if name == "qkv":
            return (model.heads + 2 * model.kv_heads) * model.head_dim, 2 * model.hidden, False
        return super().shape(name)

    def first(
        self, states: Tensor, text: Tensor, slots: Tensor, lengths: Tensor, brought: Tensor, room: Tensor,
        embedding: Tensor, block_table: Tensor, padding_slot: int,
    ) -> Tensor:  # fmt: skip
        """The first pass. Keys and values of the tokens that the step brought are written.

        Args:
            states: [B * Q, inputs] in the head's dtype, of the Q tokens that the step fed of each row.
            text: int32 [slots, context].
            slots, lengths, brought, room: int64 [B], as in `execution.drafting.DraftCall`.
            embedding: [vocabulary, hidden] in the head's dtype, contiguous.
            block_table: int32 [slots, pages].

        Returns:
            Logits [B, draft vocabulary]; the next pass overwrites them.
        """
        scratch, rows = self._scratch, len(slots)
        fed = len(states) // rows
        total = rows * fed
        tokens, positions, token_slots = (scratch[n][:total] for n in ("tokens", "positions", "token slots"))
        places, place_slots = scratch["places"].flatten(), scratch["place slots"].flatten()
        launcher = self._launcher(
            place_kernel,
            {
                "FED": fed,
                "BLOCK_FED": triton.next_power_of_2(fed),
                "MOST": self.most,
                "BLOCK_MOST": triton.next_power_of_2(self.most),
                "num_warps": 1,
            },
        )
        inputs = text, slots, lengths, brought, room
        sizes = text.stride(0), text.shape[1], padding_slot, rows
        launcher((rows, 1, 1), (*inputs, tokens, positions, token_slots, places, place_slots, *sizes))
        joined = scratch["joined"][:total]
        if total <= MAX_ROWS:
            self._plain("join", self._parts.join, states, joined, total)
        else:
            joined.copy_(product(states, self._parts.join.weight))
        single = fed == 1
        around = scratch["state" if single else "around"]
        self._pair(joined, tokens, embedding, around, total, named=False, squares=single)
        qkv = self.model.layers[0].qkv
        projected = scratch["qkv" if single else "projected"]
        pair = scratch["pair"][:total]
        if total <= MAX_ROWS:
            self._plain("qkv", qkv, pair, projected, total)
        else:
            projected[:total].flatten(1).copy_(product(pair, qkv.weight))
        if not single:
            self._settle(brought, positions, token_slots, block_table, rows, fed)
        return self._rest(0, rows, block_table, overlap=single)

    def further(self, number: int, columns: Tensor, embedding: Tensor, block_table: Tensor, *, named: bool) -> Tensor:
        """The pass behind `number` drafts; see `first`.

        Args:
            columns: int64 [B], the last draft.
            named: whether that is a column of the logits, else an id of the model.
        """
        rows, state = len(columns), self._scratch["state"]
        self._pair(state, columns, embedding, state, rows, named=named, squares=True)
        self._plain("qkv", self.model.layers[0].qkv, self._scratch["pair"][:rows], self._scratch["qkv"], rows)
        return self._rest(number, rows, block_table, overlap=True)

    def named(self, columns: Tensor, room: Tensor) -> Tensor:
        """int64 [B, drafts]: the ids of columns [B, drafts], -2 where there was none, -1 behind a row's room."""
        rows = len(columns)
        names, made = self._parts.names, self._scratch["made"][:rows]
        constants = {"MOST": self.most, "BLOCK_MOST": triton.next_power_of_2(self.most), "num_warps": 1}
        launcher = self._launcher(name_kernel, constants | {"NAMED": names is not None})
        launcher((rows, 1, 1), (columns, columns if names is None else names, room, made, self.model.vocab))
        return made

    def prepared(self, rows: Iterable[int], fed: Iterable[int], block_table: Tensor) -> list[Callable[[], object]]:
        """What compiles the kernels of calls of so many rows and tokens of each, a call for each; any thread may make
        them."""
        probe: Any = self._probe()
        sizes = list(fed)
        zeros = torch.zeros
        for count in rows:
            line = zeros(count, dtype=torch.int64, device=self.model.device)
            text = zeros(1, 2, dtype=torch.int32, device=self.model.device)
            for each in sizes:
                if count * each > MAX_ROWS:
                    continue
                states = zeros(count * each, self.shape("join")[1], dtype=self.model.dtype, device=self.model.device)
                embedding = self.model.embedding
                probe.first(states, text, line, line, line, line, embedding, block_table, 0)
            for named in (False, True):
                probe.further(1, line, self.model.embedding, block_table, named=named)
            probe.named(zeros(count, self.most, dtype=torch.int64, device=self.model.device), line)
        return probe.wanted  # type: ignore[no-any-return]

    def _pair(
        self, hidden: Tensor, tokens: Tensor, embedding: Tensor, around: Tensor, count: int, *, named: bool,
        squares: bool,
    ) -> None:  # fmt: skip
        parts, scratch, wide = self._parts, self._scratch, self.model.hidden
        counters = scratch["counters"].numel()
        named = named and parts.names is not None
        launcher = self._launcher(
            pair_kernel,
            {
                "FEATURES": wide,
                "BLOCK": triton.next_power_of_2(wide),
                "COUNTERS": counters,
                "BLOCK_COUNTERS": triton.next_power_of_2(counters),
                "NAMED": named,
                "NORMED": parts.normed_residual,
                "SQUARES": squares,
                "num_warps": 8 if wide >= 2048 else 4,
            },
        )
        names = parts.names if named and parts.names is not None else tokens
        scales = parts.token_norm.scale, parts.hidden_norm.scale
        outputs = scratch["pair"], around, scratch["squares"][0], scratch["counters"]
        sizes = parts.hidden_norm.eps, len(embedding), self.model.vocab
        launcher((count, 1, 1), (hidden, tokens, names, embedding, *scales, *outputs, *sizes))

    def _plain(self, name: str, weights: Linear, source: Tensor, out: Tensor, rows: int) -> None:
        """A projection of what is no handed-on state."""
        constants = {"PARTS": 1, "STRIDE": self.shape(name)[0]}
        self._project(name, weights, source, out, None, rows, 0, 0.0, 1.0, constants)

    def _settle(
        self, brought: Tensor, positions: Tensor, token_slots: Tensor, block_table: Tensor, rows: int, fed: int
    ) -> None:
        model, scratch = self.model, self._scratch
        keys, values = self._pages[0]
        if model.rotary is None:
            raise RuntimeError("a head without rotary positions")
        launcher = self._launcher(
            settle_kernel,
            {
                "FED": fed,
                "HEADS": model.heads,
                "KV": model.kv_heads,
                "DIM": model.head_dim,
                "PAGE": keys.shape[2],
                "BLOCK_KV": triton.next_power_of_2(model.kv_heads),
                "BLOCK_DIM": power_of_two(model.head_dim),
                "BLOCK_LINE": triton.next_power_of_2((model.heads + 2 * model.kv_heads) * model.head_dim),
                "FEATURES": model.hidden,
                "BLOCK": triton.next_power_of_2(model.hidden),
                "num_warps": 8,
            },
        )
        made = scratch["projected"], scratch["around"], scratch["qkv"], scratch["state"], scratch["squares"][0]
        where = brought, positions, token_slots, block_table, block_table.stride(0)
        launcher((rows * fed, 1, 1), (*made, keys, values, *model.rotary, *where))

    def _rest(self, number: int, rows: int, block_table: Tensor, *, overlap: bool) -> Tensor:
        """From attention on; the state and the heads of the pass are there."""
        model, scratch, layer = self.model, self._scratch, self.model.layers[0]
        # [MOST, rows of this call], as `place` wrote them.
        line = slice(number * rows, (number + 1) * rows)
        places, slots = (scratch[name].flatten()[line] for name in ("places", "place slots"))
        cut, partial = self._cut(rows, block_table.shape[1])
        self._attend(0, places, slots, block_table, rows, cut, partial, overlap)
        norm = layer.before_mlp
        parts = self._write("out", layer.out, None, norm, scratch["attended"], layer, rows, 0, 1)
        self._read("gate_up", layer.gate_up, norm, scratch["mlp"], model.intermediate, rows, 1, parts)
        parts = self._write("down", layer.down, None, model.norm, scratch["mlp"], layer, rows, 1, parts)
        logits = scratch["logits"][:rows]
        self._read("head", model.head, model.norm, logits, model.vocab, rows, 0, parts)
        return logits
