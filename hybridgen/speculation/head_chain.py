"""An EAGLE-3 head as a chain of Triton kernels: described as data, made, and tried against its plain passes.

Imports Triton; import it only where that is there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from hybridgen.execution.drafting import DraftCall
from hybridgen.fused.chain.draft_head import HeadChain, HeadParts
from hybridgen.fused.chain.search import COMPILED_AT_ONCE
from hybridgen.loading.eagle import LAYERS_READ
from hybridgen.models.decoder import Decoder, DecoderLayer, Linear, Norm, Unfit
from hybridgen.speculation.eagle import EagleDrafter
from hybridgen.speculation.head import EagleHead

_TOLERANCE = 5e-2
"""Largest relative error of a trial's logits; bfloat16 itself gives 1e-2 to 2e-2."""


def fuse_head(drafter: EagleDrafter, context: int, *, rows: int, most: int) -> None:
    """From now on run a head's passes of up to 16 rows as a chain of kernels, if it gives the same logits. Overwrites
    the dummy page.

    Args:
        context: tokens of a sequence at most.
        rows: of a step at most.
        most: drafts of a row, which are as many as a step checks of it.

    Raises:
        Unfit: the kernels do not compute this head; it goes on without them.
    """
    drafter.use_chain(None)
    _ = drafter.embedding
    chain = make_chain(drafter.head, context, rows=rows, fed=most + 1, most=most)
    chain.attach((drafter.pages,))
    _try(drafter, chain)
    drafter.use_chain(chain)


def make_chain(head: EagleHead, context: int, *, rows: int, fed: int, most: int) -> HeadChain:
    """The chain of a head, on its device.

    Args:
        context: tokens of a sequence at most.
        rows, fed, most: see `HeadChain`.

    Raises:
        Unfit: the kernels do not compute this head.
    """
    shape = head.shape

    def norm(weight: Tensor) -> Norm:
        return Norm(weight.detach().float(), shape.eps)

    def linear(name: str) -> Linear:
        return Linear(head.weights[name])

    layer = DecoderLayer(
        before_attention=None,
        qkv=linear("qkv"),
        query_norm=None,
        key_norm=None,
        rotates=True,
        attention_scale=shape.head_dim**-0.5,
        window=0,
        out=linear("out"),
        after_attention=None,
        before_mlp=norm(head.post_attention_layernorm),
        gate_up=linear("gate_up"),
        down=linear("down"),
        after_mlp=None,
        residual=1.0,
    )
    cos, sin = head.turns(torch.arange(context, device=head.norm.device))
    model = Decoder(
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=shape.intermediate,
        vocab=shape.draft_vocab,
        activation="silu",
        embedding=head.norm.detach(),
        embedding_scale=1.0,
        layers=(layer,),
        norm=norm(head.norm),
        head=linear("lm_head"),
        logits_scale=1.0,
        rotary=(cos.contiguous(), sin.contiguous()),
        max_context=context,
        dtype=head.dtype,
    )
    parts = HeadParts(
        join=linear("fc"),
        token_norm=norm(head.input_layernorm),
        hidden_norm=norm(head.hidden_norm),
        normed_residual=shape.norm_before_residual,
        names=head.ids,
    )
    with torch.inference_mode():
        return HeadChain(model, parts, max_rows=rows, fed=fed, most=most)


def _try(drafter: EagleDrafter, chain: HeadChain) -> None:
    """Compile the chain's kernels and run it on random hidden states, as the drafter does by itself.

    Raises:
        Unfit: it gives other logits.
    """
    head, block_table = drafter.head, drafter.block_table
    padding_slot = drafter.padding_slot
    device, dtype, most = head.norm.device, head.dtype, chain.most
    if device.type == "cuda":
        sizes = sorted({1, min(2, chain.most_rows), chain.most_rows})
        with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool, torch.inference_mode():
            list(pool.map(lambda compile_kernel: compile_kernel(), chain.prepared(sizes, (1, most + 1), block_table)))
    make = torch.Generator(device).manual_seed(0)
    text = torch.randint(head.shape.vocab, (padding_slot + 1, most + 6), generator=make, device=device).to(torch.int32)
    states = torch.randn(most + 1, LAYERS_READ * head.shape.model_hidden, generator=make, device=device).to(dtype)

    def line(value: int) -> Tensor:
        return torch.tensor([value], device=device)

    def logits_by(by: HeadChain | None) -> Tensor:
        found: list[Tensor] = []

        def choose(logits: Tensor, drafts: object) -> Tensor:
            found.append(logits.float().masked_fill(logits == -torch.inf, 0.0))
            return line(len(found))

        call = DraftCall(line(padding_slot), line(5), text, most, line(most + 1), choose, line(2), states)
        drafter.draft_by(by, call)
        return torch.stack(found)

    with torch.inference_mode():
        expected, found = logits_by(None), logits_by(chain)
        error = float((found - expected).norm() / expected.norm())
    if not error <= _TOLERANCE:
        raise Unfit(f"a trial's logits differ by {error:.2g} from those of PyTorch's operators")
