"""A head's passes by Triton's interpreter, against PyTorch's operators; run by test_head_chain.py.

float32 and float16: the interpreter's `tl.dot` is wrong on bfloat16. Checks take a seed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hybridgen.execution.drafting import DraftCall
from hybridgen.fused.chain.draft_head import HeadChain
from hybridgen.loading.eagle import HeadShape
from hybridgen.speculation.eagle import EagleDrafter
from hybridgen.speculation.head import EagleHead
from hybridgen.speculation.head_chain import fuse_head, make_chain

MOST, PAGE, CONTEXT = 3, 16, 96


def random_head(
    make: torch.Generator, dtype: torch.dtype, *, fp8: bool = False, device: str = "cpu", **changes: Any
) -> EagleHead:
    sizes = {
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "intermediate": 96,
        "vocab": 90,
        "draft_vocab": 70,
    }
    fields = {"eps": 1e-5, "model_hidden": 48, "layers": None, "norm_before_residual": False}
    shape = HeadShape(**sizes | fields | changes)
    hidden, inside = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def values(*size: int) -> Tensor:
        return (torch.randn(*size, generator=make) * 2 / size[-1] ** 0.5).to(dtype)

    weights = {
        "fc.weight": values(hidden, 3 * shape.model_hidden),
        "layer.self_attn.q_proj.weight": values(queries, 2 * hidden),
        "layer.self_attn.k_proj.weight": values(keys, 2 * hidden),
        "layer.self_attn.v_proj.weight": values(keys, 2 * hidden),
        "layer.self_attn.o_proj.weight": values(hidden, queries),
        "layer.mlp.gate_proj.weight": values(inside, hidden),
        "layer.mlp.up_proj.weight": values(inside, hidden),
        "layer.mlp.down_proj.weight": values(hidden, inside),
        "lm_head.weight": values(shape.draft_vocab, hidden),
    }
    for name in ("layer.hidden_norm", "layer.input_layernorm", "layer.post_attention_layernorm", "norm"):
        weights[f"{name}.weight"] = (1 + 0.2 * torch.randn(hidden, generator=make)).to(dtype)
    if shape.draft_vocab < shape.vocab:
        weights["ids"] = torch.randperm(shape.vocab, generator=make)[: shape.draft_vocab].sort().values
    weights = {name: value.to(device) for name, value in weights.items()}
    config = LlamaConfig(hidden_size=hidden, num_attention_heads=shape.heads, head_dim=shape.head_dim)
    return EagleHead(shape, weights, LlamaRotaryEmbedding(config), fp8=fp8)


def drafter_of(head: EagleHead, slots: int, make: torch.Generator) -> EagleDrafter:
    """One whose pages hold random keys and values of earlier positions."""
    embedding = nn.Embedding(head.shape.vocab, head.shape.hidden, dtype=head.dtype)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(embedding.weight.shape, generator=make))
    device = head.norm.device
    embedding.to(device)
    bound: Any = SimpleNamespace(model=SimpleNamespace(get_input_embeddings=lambda: embedding))
    drafter = EagleDrafter("head", head, bound, (0, 1, 2), PAGE)
    drafter.begin(slots=slots, context=CONTEXT, vocab_size=head.shape.vocab, count=MOST, device=device)
    columns = CONTEXT // PAGE
    table = torch.randperm((slots - 1) * columns, generator=make).view(-1, columns) + 1
    table = torch.cat((table, torch.zeros(1, columns, dtype=torch.int64))).to(torch.int32)
    drafter.states[0].allocate((slots - 1) * columns + 1, slots, device)
    for part in drafter.pages:
        part.copy_(torch.randn(part.shape, generator=make))
    drafter.attach(table.to(device), slots * (MOST + 1))
    return drafter


def random_call(make: torch.Generator, drafter: EagleDrafter, rows: int, fed: int, *, greedy: bool) -> DraftCall:
    shape, slots = drafter.head.shape, drafter.padding_slot + 1

    def numbers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=make)

    brought = numbers(1, fed + 1, rows)
    lengths = torch.maximum(numbers(2, CONTEXT - MOST, rows), brought + 1)
    chosen = torch.randperm(slots - 1, generator=make)[:rows]
    if rows > 2:  # a row of padding
        chosen[1], lengths[1], brought[1] = drafter.padding_slot, 1, 1
    states = torch.randn(rows * fed, 3 * shape.model_hidden, generator=make).to(drafter.head.dtype)
    text = numbers(0, shape.vocab, slots, CONTEXT).to(torch.int32)
    room = torch.minimum(numbers(0, 6, rows), CONTEXT - lengths)

    def choose(logits: Tensor, drafts: object) -> Tensor:
        return logits.float().argmax(-1)

    device = drafter.head.norm.device
    chosen, lengths, text, room, brought, states = (
        tensor.to(device) for tensor in (chosen, lengths, text, room, brought, states)
    )
    return DraftCall(chosen, lengths, text, MOST, room, choose, brought, states, greedy)


def logits_by(drafter: EagleDrafter, chain: HeadChain | None, call: DraftCall) -> Tensor:
    """[MOST, B, V] of each pass, -inf as 0, where the same tokens are drafted whatever they are."""
    found: list[Tensor] = []

    def choose(logits: Tensor, drafts: object) -> Tensor:
        found.append(logits.float().masked_fill(logits == -torch.inf, 0.0))
        return call.lengths + len(found)

    drafter.draft_by(chain, call._replace(choose=choose, greedy=False))
    return torch.stack(found)


@torch.inference_mode()
def check_passes(number: int) -> None:
    """Rows of which several tokens were fed, or one; some accepted; padding; page borders; both ways to choose."""
    odd = {"hidden": 72, "heads": 6, "kv_heads": 3, "head_dim": 24, "intermediate": 40, "model_hidden": 72}
    whole = {"norm_before_residual": True, "draft_vocab": 90, "fp8": True}
    for case, (changes, rows, fed) in enumerate(((odd, 2, 4), (whole, 3, 1), ({}, 5, 4))):
        make = torch.Generator().manual_seed(number + case)
        head = random_head(make, torch.float32, **changes)
        drafter = drafter_of(head, rows + 2, make)
        drafter.use_chain(make_chain(head, CONTEXT, rows=rows, fed=MOST + 1, most=MOST))
        for greedy in (True, False)[: 1 + (rows == 2)]:
            _compare(drafter, random_call(make, drafter, rows, fed, greedy=greedy))


def _compare(drafter: EagleDrafter, call: DraftCall) -> None:
    """Drafts and pages of both ways, of which one begins with scratch that must not be read."""
    before = [part.clone() for part in drafter.pages]
    expected = drafter.draft_by(None, call)
    written = [part.clone() for part in drafter.pages]
    for part, old in zip(drafter.pages, before, strict=True):
        part.copy_(old)
    for tensor in drafter._chain.tensors().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
    found = drafter.draft(call).clone()
    real = call.slots < drafter.padding_slot  # on the dummy page, rows write over each other
    if not torch.equal(found[real], expected[real]):
        raise AssertionError(f"{found.tolist()}, not {expected.tolist()}")
    for ours, theirs in zip(drafter.pages, written, strict=True):
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=2e-4, atol=2e-4)


def check_float16(number: int) -> None:
    """Logits, with the same tokens drafted; states that float16 cannot hold."""
    for size in (1.0, 300.0):
        make = torch.Generator().manual_seed(number)
        head = random_head(make, torch.float16)
        head.fc.data *= size
        drafter = drafter_of(head, 5, make)
        fuse_head(drafter, CONTEXT, rows=3, most=MOST)


def check_refused(number: int) -> None:
    """A head that computes something else is found by its trial; one whose sizes do not fit before it."""
    make = torch.Generator().manual_seed(number)
    head = random_head(make, torch.float32)
    drafter = drafter_of(head, 5, make)
    joined = head.joined
    head.joined = lambda states: joined(states) * 2 + 1  # type: ignore[method-assign]
    _expect("a trial's logits differ", lambda: fuse_head(drafter, CONTEXT, rows=3, most=MOST))
    if drafter._chain is not None:
        raise AssertionError("it goes on with the chain")
    odd = random_head(make, torch.float32, intermediate=42)
    _expect("intermediate size 42", lambda: make_chain(odd, CONTEXT, rows=3, fed=4, most=MOST))
    drafter._bound.model.get_input_embeddings().max_norm = 1.0
    _expect("computes more than a look-up", lambda: fuse_head(drafter, CONTEXT, rows=3, most=MOST))


def _expect(message: str, call: Any) -> None:
    try:
        call()
    except Exception as error:
        if message not in str(error):
            raise
        return
    raise AssertionError(f"nothing was raised that says {message!r}")
