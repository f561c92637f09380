"""Random `Decoder`s of any shape, without Hugging Face, and a paged cache for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybridgen.cache import LayerPages
from hybridgen.kernels.linear.layout import Block, pack_int4
from hybridgen.models.decoder import Decoder, DecoderLayer, Linear, Norm, cut
from hybridgen.models.quantised import QuantisedWeight
from hybridgen.models.share import Share
from hybridgen.models.weights import DenseWeight, SeparateWeights

PROJECTIONS = ("qkv", "out", "gate_up", "down")


@dataclass
class Shape:
    """What a random decoder is made of."""

    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    vocab: int = 70
    layers: int = 2
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    """Of `qkv`, `out`, `gate_up`, `down`."""
    head_norm: str = ""
    """``, `head` or `all`."""
    windows: tuple[int, ...] = (0,)
    """Of the layers, in turn."""
    rotates: tuple[bool, ...] = (True,)
    post_norms: bool = False
    pre_norms: bool = True
    embedding_scale: float = 1.0
    residual: float = 1.0
    logits_scale: float = 1.0
    attention_scale: float = 0.25
    max_context: int = 256
    eps: float = 1e-5
    gain: float = 1.0
    """Size of the embedding."""


def random_decoder(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Decoder:
    """Weights whose projections keep the size of what they are given."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(of)

    def norm(width: int) -> Norm:
        return Norm(1 + normal(width, scale=0.2, of=torch.float32), shape.eps)

    def linear(name: str, out: int, inner: int) -> Linear:
        bias = normal(out, scale=0.2) if name in shape.biases else None
        return Linear(DenseWeight(normal(out, inner, scale=inner**-0.5)), bias)

    attended, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    width = {"": 0, "head": shape.head_dim, "all": -1}[shape.head_norm]
    layers = tuple(
        DecoderLayer(
            before_attention=norm(shape.hidden) if shape.pre_norms else None,
            qkv=linear("qkv", attended + 2 * keys, shape.hidden),
            query_norm=norm(attended if width < 0 else width) if width else None,
            key_norm=norm(keys if width < 0 else width) if width else None,
            rotates=shape.rotates[index % len(shape.rotates)],
            attention_scale=shape.attention_scale,
            window=shape.windows[index % len(shape.windows)],
            out=linear("out", shape.hidden, attended),
            after_attention=norm(shape.hidden) if shape.post_norms else None,
            before_mlp=norm(shape.hidden) if shape.pre_norms else None,
            gate_up=linear("gate_up", 2 * shape.intermediate, shape.hidden),
            down=linear("down", shape.hidden, shape.intermediate),
            after_mlp=norm(shape.hidden) if shape.post_norms else None,
            residual=shape.residual,
        )
        for index in range(shape.layers)
    )
    angles = torch.arange(shape.max_context, device=device)[:, None] * 10000.0 ** (
        -torch.arange(shape.head_dim // 2, device=device) / (shape.head_dim // 2)
    )
    return Decoder(
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=shape.intermediate,
        vocab=shape.vocab,
        activation=shape.activation,
        embedding=normal(shape.vocab, shape.hidden, scale=shape.gain),
        embedding_scale=shape.embedding_scale,
        layers=layers,
        norm=norm(shape.hidden),
        head=linear("head", shape.vocab, shape.hidden),
        logits_scale=shape.logits_scale,
        rotary=(angles.cos().float(), angles.sin().float()) if any(shape.rotates) else None,
        max_context=shape.max_context,
        dtype=dtype,
    )


@dataclass
class Context:
    """What a decode step reads: rows of some cached lengths, in shuffled pages and slots."""

    pages: tuple[LayerPages, ...]
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_table: Tensor

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments of `ChainStep`, but the last."""
        return self.tokens, self.positions, self.slots, self.block_table

    def copy_pages(self) -> tuple[LayerPages, ...]:
        return tuple(LayerPages(pages.keys.clone(), pages.values.clone()) for pages in self.pages)


def make_context(
    model: Decoder, lengths: list[int], page_size: int = 16, seed: int = 0, cache: torch.dtype | None = None
) -> Context:
    """Pages whose unwritten places are NaN; page 0, where unused entries of the table lead, too.

    Args:
        cache: the pages' dtype; None: the model's.
    """
    generator = torch.Generator().manual_seed(seed)
    device = str(model.device)
    counts = [length // page_size + 1 for length in lengths]
    order = torch.randperm(sum(counts), generator=generator) + 1
    slots = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
    table = torch.zeros(len(lengths) + 2, max(counts) + 1, dtype=torch.int32)
    used = 0
    for slot, count in zip(slots.tolist(), counts, strict=True):
        table[slot, :count] = order[used : used + count]
        used += count
    size = sum(counts) + 1, model.kv_heads, page_size, model.head_dim
    pages = []
    for _ in model.layers:
        keys, values = (torch.full(size, torch.nan, dtype=model.dtype) for _ in range(2))
        for slot, length in zip(slots.tolist(), lengths, strict=True):
            for part in (keys, values):
                cached = torch.randn(model.kv_heads, length, model.head_dim, generator=generator).to(model.dtype)
                for page in range(0, length, page_size):
                    run = cached[:, page : page + page_size]
                    part[table[slot, page // page_size].item(), :, : run.shape[1]] = run
        pages.append(LayerPages(*(part.to(cache or model.dtype).to(device) for part in (keys, values))))
    tokens = torch.randint(0, model.vocab, (len(lengths),), generator=generator)
    positions = torch.tensor(lengths)
    return Context(
        tuple(pages), tokens.to(device), positions.to(device), slots.to(torch.int32).to(device), table.to(device)
    )


def quantised_decoder(
    model: Decoder, kind: str, group: int = 0, head: str = "fp8", zeros: bool = False, outputs_of_a_block: int = 1
) -> Decoder:
    """The same shape with projections of random codes.

    Args:
        kind: `fp8`, `int8`, `int4` or `mxfp4`.
        group: inputs that share a scale; 0: all of an output, 128 for int4, and 32 for mxfp4.
        head: `fp8` or `int8`, with a scale for each output, or `dense` for the head as it is.
        zeros: int4 has zero points; else it is symmetric.
        outputs_of_a_block: outputs that share a scale, of 8 bits.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(1)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device) * 0.5 + 0.75

    def quantised(linear: Linear, kind: str, group: int = group) -> Linear:
        outputs, inputs = linear.weight.shape
        block = Block(outputs_of_a_block if group else 1, group or {"int4": 128, "mxfp4": 32}.get(kind, inputs))
        # Their mean is zero, or outputs would have one large part in common, and be alike whatever else is wrong.
        if kind == "fp8":
            data, size = torch.randn(outputs, inputs, generator=generator, device=device) * 64, 64.0
            codes = data.to(torch.float8_e4m3fn)
        elif kind == "int8":
            codes = torch.randint(-127, 128, (outputs, inputs), generator=generator, device=device).to(torch.int8)
            size = 73.0
        elif kind == "mxfp4":
            codes = torch.randint(0, 256, (outputs, inputs // 2), generator=generator, device=device).to(torch.uint8)
            size = 2.9
        else:
            codes = pack_int4(torch.randint(1, 16, (outputs, inputs), generator=generator, device=device))
            size = 4.7
        scales = uniform(*block.grid(outputs, inputs)) / (size * inputs**0.5)
        if kind == "mxfp4":
            scales = (127 + scales.log2() + uniform(*scales.shape)).round().to(torch.uint8)
        elif kind != "fp8":
            scales = scales.to(model.dtype)
        points = None
        if zeros and kind == "int4":
            points = torch.randint(6, 11, scales.shape, generator=generator, device=device).to(torch.uint8)
        return Linear(QuantisedWeight(kind, codes, scales, points, inputs, block, model.dtype), linear.bias)

    layers = tuple(
        replace(layer, **{name: quantised(getattr(layer, name), kind) for name in PROJECTIONS})
        for layer in model.layers
    )
    return replace(model, layers=layers, head=model.head if head == "dense" else quantised(model.head, head, 0))


def mixed_decoder(model: Decoder, other: Decoder, takes: Callable[[int, str], bool]) -> Decoder:
    """A decoder some of whose projections are another's: those of which `takes(layer, name)` is true."""
    layers = tuple(
        replace(ours, **{name: getattr(theirs, name) for name in PROJECTIONS if takes(index, name)})
        for index, (ours, theirs) in enumerate(zip(model.layers, other.layers, strict=True))
    )
    return replace(model, layers=layers)


def in_parts(model: Decoder) -> Decoder:
    """The same decoder with q, k, v and gate, up in tensors of their own, as a live module has them."""
    width, keys, inner = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.intermediate

    def apart(linear: Linear, sizes: list[int]) -> Linear:
        pieces = [(weight.clone(), None if bias is None else bias.clone()) for weight, bias in cut(linear, sizes)]
        parts = tuple(Linear(DenseWeight(weight), bias) for weight, bias in pieces)
        return Linear(SeparateWeights(tuple(DenseWeight(weight) for weight, _ in pieces)), parts=parts)

    layers = tuple(
        replace(layer, qkv=apart(layer.qkv, [width, keys, keys]), gate_up=apart(layer.gate_up, [inner, inner]))
        for layer in model.layers
    )
    return replace(model, layers=layers)


def share_of(model: Decoder, share: Share) -> Decoder:
    """A rank's share: heads, the intermediate size and the vocabulary are cut evenly; biases of sums are whole."""
    rank, ranks, dim = share.rank, share.size, model.head_dim
    heads, kv_heads, inner, vocab = (
        size // ranks for size in (model.heads, model.kv_heads, model.intermediate, model.vocab)
    )

    def outputs(linear: Linear, sizes: list[int]) -> Linear:
        pieces = cut(linear, [size * ranks for size in sizes])
        places = [slice(rank * size, (rank + 1) * size) for size in sizes]
        weights = [weight[place] for (weight, _), place in zip(pieces, places, strict=True)]
        biases = [bias[place] for (_, bias), place in zip(pieces, places, strict=True) if bias is not None]
        return Linear(DenseWeight(torch.cat(weights)), torch.cat(biases) if biases else None)

    def inputs(linear: Linear, size: int) -> Linear:
        ((weight, bias),) = cut(linear, [model.hidden])
        return Linear(DenseWeight(weight[:, rank * size : (rank + 1) * size].contiguous()), bias)

    layers = tuple(
        replace(
            layer,
            qkv=outputs(layer.qkv, [heads * dim, kv_heads * dim, kv_heads * dim]),
            out=inputs(layer.out, heads * dim),
            gate_up=outputs(layer.gate_up, [inner, inner]),
            down=inputs(layer.down, inner),
        )
        for layer in model.layers
    )
    sizes = {"heads": heads, "kv_heads": kv_heads, "intermediate": inner, "vocab": vocab}
    return replace(model, layers=layers, head=outputs(model.head, [vocab]), share=share, **sizes)


class Turns:
    """Ranks as threads of this process, of which one runs at a time, until it waits for the others."""

    def __init__(self, size: int, adds_to_state: bool = False) -> None:
        """`adds_to_state`: whether a sum and what follows it are one call."""
        self.size = size
        self.adds_to_state = adds_to_state
        self._given: list[Tensor | None] = [None] * size
        self._turn = threading.Condition()
        self._whose = 0
        self.calls = 0
        """Of `add_up`, by all ranks."""

    def run(self, work: Callable[[Share], None]) -> None:
        """Call `work` for each rank; the first error is raised."""
        errors: list[BaseException] = []

        def begin(rank: int) -> None:
            try:
                self._wait(rank)
                work(_Rank(rank, self.size, self))
            except BaseException as error:
                errors.append(error)
            finally:
                self._pass(rank)

        threads = [threading.Thread(target=begin, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        if errors:
            raise errors[0]

    def _wait(self, rank: int) -> None:
        with self._turn:
            if not self._turn.wait_for(lambda: self._whose == rank, 100):
                raise AssertionError(f"rank {rank} waits for another rank, which is not where it is")

    def _pass(self, rank: int) -> None:
        with self._turn:
            self._whose = (rank + 1) % self.size
            self._turn.notify_all()

    def meet(self, rank: int, x: Tensor) -> list[Tensor]:
        """What each rank has given."""
        self.calls += 1
        self._given[rank] = x.clone()
        self._pass(rank)
        self._wait(rank)
        found = [each for each in self._given if each is not None]
        self._pass(rank)  # all have read before anybody gives more
        self._wait(rank)
        return found


@dataclass
class _Rank:
    """A `Share` of `Turns`."""

    rank: int
    size: int
    turns: Turns

    def agree(self, reason: str) -> str:
        """Of ranks that all have none."""
        return reason

    def add_up(self, x: Tensor) -> Tensor:
        """See `Share`."""
        return torch.stack(self.turns.meet(self.rank, x)).float().sum(0).to(x.dtype)

    def parts(self, rows: int, width: int) -> int:
        """As a kernel has them that takes 32 numbers a block."""
        return -(-width // 32) if self.turns.adds_to_state else 0

    def add_to_state(
        self, product: Tensor, state: Tensor, handed: Tensor, gain: Tensor | None, squares: Tensor, factor: float
    ) -> None:
        """See `Share`."""
        rows, width = product.shape
        state[:rows] += factor * self.add_up(product).float()
        handed[:rows] = state[:rows] if gain is None else state[:rows] * gain
        for part in range(self.parts(rows, width)):
            squares[part, :rows] = state[:rows, 32 * part : 32 * part + 32].square().sum(-1)

    def gather(self, logits: Tensor) -> Tensor:
        """See `Share`."""
        return torch.cat(self.turns.meet(self.rank, logits), -1)

    def memory(self, size: int) -> list[int]:
        """None on a CPU."""
        raise NotImplementedError

    def on_end(self, call: Callable[[], None]) -> None:
        """It does not end early."""
