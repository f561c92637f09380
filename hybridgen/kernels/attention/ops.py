"""Paged attention: the ops `hybridgen::write_kv`, `schedule_attention`, `decode_attention` and `prefill_attention`.

All tokens of a step are packed: T tokens, each with a slot (its row of the block table) and a position.

| tensor | shape | dtype |
|---|---|---|
| q | [T, Hq, D] | float32, bfloat16 or float16 |
| k, v | [T, Hkv, D], [T, Hkv, Dv] | as q |
| k_pages, v_pages | [pages, Hkv, page_size, D], [.., Dv], contiguous | as q, or float8_e4m3fn |
| block_table | [max_batch, max_pages], rows contiguous | int32 page ids; page 0 is the dummy page |
| slots, positions | [T] | int32, int64 (0 or more) |
| query_starts | [max_batch + 1] | int32 |
| sinks | [Hq] | any float |
| schedule | by `make_schedule` | int32 |

Hq is a multiple of Hkv; D and Dv are multiples of 8 up to 256; page_size is a power of two from 8 to 256.
q, k and v may be views with any strides over tokens and heads. Every output is contiguous. Page ids of a row
beyond its last position, and cache positions that no query sees, are never used, whatever they hold.

Pages of float8_e4m3fn halve what is read. K and V are rounded to it when they are written, those beyond 448 to 448, and
unpacked where they are multiplied: products and sums are those of 16-bit (or float32) numbers. A decode step that
writes its own K and V attends to them as they are rounded, as later steps do. Scales are the caller's: a factor on K is
one on q, a factor on V one on the result.

The CPU implementations (`cpu` for decode, else `reference`) are plain torch and may read lengths on the host. The CUDA
implementations (`write`, `balanced`, `decode`, `prefill`) are Triton and never do: launch grids
and scratch sizes follow from shapes, so a captured graph replays with other lengths and block tables. The first
call of a kind compiles its kernels: call once before a capture.

The ops are defined with `torch.library.Library`: `torch.library.custom_op` adds about 10 us to a call that
mutates its arguments.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridgen.device.watched import is_watched
from hybridgen.kernels.attention import cpu, reference

_PAGES = "Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor slots, Tensor positions"
_OPTIONS = "float scale, int window, int chunk, float softcap, Tensor? sinks"

_NO_CHANGE = nullcontext()

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor slots, "
    "Tensor positions) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "decode_attention(Tensor q, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor slots, "
    f"Tensor positions, {_OPTIONS}, Tensor? k=None, Tensor? v=None, Tensor? schedule=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"schedule_attention({_PAGES}, int query_heads, int window, int chunk, Tensor(a!) schedule) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"prefill_attention(Tensor q, {_PAGES}, Tensor query_starts, {_OPTIONS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Places(NamedTuple):
    """Where a step's tokens lie in the cache of one layer; shapes are in the module's text."""

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    slots: Tensor
    positions: Tensor


class Options(NamedTuple):
    """How a layer attends."""

    scale: float
    """Factor on q.k, above 0."""
    window: int = 0
    """See only the last `window` positions, the token's own included; 0 is no limit."""
    chunk: int = 0
    """See only positions of the own chunk of so many, counted from 0 (Llama 4); 0 is no limit."""
    softcap: float = 0.0
    """`s = softcap * tanh(s / softcap)` on scaled scores (Gemma 2); 0 is off."""
    sinks: Tensor | None = None
    """[Hq], a logit per head that takes part in the softmax's denominator only (GPT-OSS)."""


def write_kv(k: Tensor, v: Tensor, places: Places) -> None:
    """Write K and V of each token into its page: page `block_table[slot, position // page_size]`, row
    `position % page_size`.

    Tokens that share a destination (padding rows on the dummy page) leave one of their values there.
    """
    torch.ops.hybridgen.write_kv.default(k, v, *places)


def is_balanced(rows: int) -> bool:
    """Whether a decode step of so many rows attends by a schedule; the only place that decides it.

    From 24 rows on. On an H200 with the heads of an 8B, a layer of 24, 32 and 48 rows over contexts of 100 to 2000
    takes 33, 37 and 54 us by the streamed kernel, 43, 48 and 68 by Triton's by a schedule, and 56, 69 and 92 by the
    kernel that cuts row by row; with 1024 positions each 29, 33 and 53, 44, 49 and 65, and 41, 43 and 77
    (`tried-streamed-h200.json`).
    """
    return rows >= _BALANCED_ROWS


_BALANCED_ROWS = 24


def make_schedule(
    k_pages: Tensor, v_pages: Tensor, block_table: Tensor, query_heads: int, rows: int, window: int, chunk: int
) -> Tensor:
    """Room for the schedules of steps of up to `rows` rows: int32, empty where none of them needs one.

    Layers whose pages are alike in shape and dtype, and that agree in heads, window and chunk, share it.
    """
    words = 0
    if k_pages.is_cuda and is_balanced(rows):
        from hybridgen.kernels.attention.balanced import words_needed

        words = words_needed(k_pages, v_pages, query_heads, rows, block_table.shape[1], window, chunk)
    return torch.zeros(words, dtype=torch.int32, device=k_pages.device)


def schedule_attention(places: Places, query_heads: int, window: int, chunk: int, schedule: Tensor) -> None:
    """Say which program attends to what in a decode step, before its first layer: writes `schedule`.

    Nothing is done where nobody reads it: on the CPU, and for steps that are not balanced.

    Args:
        places: of one of the layers that share the schedule.
        schedule: by `make_schedule`.
    """
    if schedule.is_cpu and not is_watched():
        return
    torch.ops.hybridgen.schedule_attention.default(*places, query_heads, window, chunk, schedule)


def decode_attention(
    q: Tensor,
    places: Places,
    options: Options,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    schedule: Tensor | None = None,
) -> Tensor:
    """Attention of one query token per sequence over its pages: [T, Hq, Dv].

    Token t sees positions 0 to `positions[t]`. Its own K and V are written to its page first if they are given as
    `k` and `v` (as `write_kv` would, without its launch), else they must have been written. On CUDA the context is
    cut into chunks that programs attend to and that are then combined (flash-decoding,
    https://pytorch.org/blog/flash-decoding/). Where a row is cut depends on its own length and on shapes, never on
    other rows: its bits do not change with its neighbours.

    Args:
        schedule: by `schedule_attention` for these rows and options. None: the step is not balanced, however many rows
            it has.
    """
    if q.is_cpu and not is_watched():
        return cpu.decode_attention(q, *places, *options, k, v, schedule)
    return torch.ops.hybridgen.decode_attention.default(q, *places, *options, k, v, schedule)


def prefill_attention(q: Tensor, places: Places, query_starts: Tensor, options: Options) -> Tensor:
    """Causal attention of packed sequences over their pages: [T, Hq, Dv].

    Sequence i is tokens `query_starts[i]` to `query_starts[i + 1]`: one slot, consecutive positions. Each token
    sees its sequence's positions up to its own, those of earlier chunks and cached prefixes included; K and V of
    this call's tokens must have been written, those of other sequences too, whose pages it may share. `query_starts`
    ends with T, repeated for sequences without tokens.
    The CUDA kernel follows FlashAttention-2 (arXiv:2307.08691) over pages.
    """
    return torch.ops.hybridgen.prefill_attention.default(q, *places, query_starts, *options)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    index = tensor.get_device()
    return _NO_CHANGE if index == torch.cuda.current_device() else torch.cuda.device(index)


def _write_kv_cuda(*args: Any) -> None:
    from hybridgen.kernels.attention.write import write_kv as launch

    with on_device_of(args[0]):
        launch(*args)


def _schedule_cpu(*args: Any) -> None:
    return None


def _schedule_cuda(*args: Any) -> None:
    positions = args[4]
    if not is_balanced(positions.shape[0]):
        return
    from hybridgen.kernels.attention.balanced import write_schedule

    with on_device_of(positions):
        write_schedule(*args)


def _decode_cuda(q: Tensor, *args: Any) -> Tensor:
    # The dispatcher leaves out arguments at the end that are None.
    rest = [*args, None, None, None][:13]
    schedule = rest[-1]
    with on_device_of(q):
        if schedule is not None and is_balanced(q.shape[0]):
            from hybridgen.kernels.attention.balanced import decode_attention as by_schedule

            return by_schedule(q, *rest)
        from hybridgen.kernels.attention.decode import decode_attention as by_row

        return by_row(q, *rest[:-1])


def _prefill_cuda(*args: Any) -> Tensor:
    from hybridgen.kernels.attention.prefill import prefill_attention as launch

    with on_device_of(args[0]):
        return launch(*args)


def _write_kv_fake(*args: Any) -> None:
    return None


def _attention_fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *args: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v_pages.shape[3]))


_library.impl("write_kv", reference.write_kv, "CPU")
_library.impl("schedule_attention", _schedule_cpu, "CPU")
_library.impl("decode_attention", cpu.decode_attention, "CPU")
_library.impl("prefill_attention", reference.prefill_attention, "CPU")
_library.impl("write_kv", _write_kv_cuda, "CUDA")
_library.impl("schedule_attention", _schedule_cuda, "CUDA")
_library.impl("decode_attention", _decode_cuda, "CUDA")
_library.impl("prefill_attention", _prefill_cuda, "CUDA")
torch.library.register_fake("hybridgen::write_kv", _write_kv_fake, lib=_library)
torch.library.register_fake("hybridgen::schedule_attention", _schedule_cpu, lib=_library)
torch.library.register_fake("hybridgen::decode_attention", _attention_fake, lib=_library)
torch.library.register_fake("hybridgen::prefill_attention", _attention_fake, lib=_library)
