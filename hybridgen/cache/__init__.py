"""What layers keep between steps; first of all the paged KV cache: a pool of fixed-size pages per layer, handed out to
requests through block tables.

`prefix.PageManager` gives requests their pages, and lets those whose tokens begin alike share them.
`state.LayerState` is the contract of a layer's state. `paged_kv.PagedKV` is the kind that keeps keys and values,
`slot_state.SlotState` the kind that has one size whatever the request's length.

A *page* holds the keys and values of `page_size` positions of one request. A request's row of the *block table*
(its *slot*) lists its pages in order. Page 0 belongs to nobody: unused block-table entries point to it, so that
padding may write somewhere harmless. The idea is vLLM's PagedAttention (Kwon et al. 2023, arXiv:2309.06180).
"""

from hybridgen.cache.paged_kv import KeyValueState, KVScales, LayerPages, LayerShape, PagedKV, PagedState, SharedKV
from hybridgen.cache.paged_latent import LatentShape, PagedLatent
from hybridgen.cache.pages import (
    DUMMY_PAGE,
    NO_PAGES,
    PageAllocator,
    PageManager,
    RequestPages,
    in_order,
    pages_for_tokens,
)
from hybridgen.cache.sizing import pages_in_turn, plan_pages
from hybridgen.cache.slot_state import MixerShapes, MixerTensors, SlotShape, SlotState
from hybridgen.cache.state import LayerState, allocate, total_bytes

__all__ = [
    "DUMMY_PAGE",
    "NO_PAGES",
    "KVScales",
    "KeyValueState",
    "LatentShape",
    "LayerPages",
    "LayerShape",
    "LayerState",
    "MixerShapes",
    "MixerTensors",
    "PageAllocator",
    "PageManager",
    "PagedKV",
    "PagedLatent",
    "PagedState",
    "RequestPages",
    "SharedKV",
    "SlotShape",
    "SlotState",
    "allocate",
    "in_order",
    "pages_for_tokens",
    "pages_in_turn",
    "plan_pages",
    "total_bytes",
]
