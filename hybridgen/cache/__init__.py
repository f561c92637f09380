"""The paged KV cache: a pool of fixed-size pages per layer, handed out to requests through block tables.

A *page* holds the keys and values of `page_size` positions of one request. A request's row of the *block table*
(its *slot*) lists its pages in order. Page 0 belongs to nobody: unused block-table entries point to it, so that
padding may write somewhere harmless. The idea is vLLM's PagedAttention (Kwon et al. 2023, arXiv:2309.06180).
"""

from hybridgen.cache.paged_kv import CacheShape, LayerPages, LayerShape, allocate_pages
from hybridgen.cache.pages import DUMMY_PAGE, BlockTable, PageAllocator, pages_for_tokens
from hybridgen.cache.sizing import plan_pages

__all__ = [
    "DUMMY_PAGE",
    "BlockTable",
    "CacheShape",
    "LayerPages",
    "LayerShape",
    "PageAllocator",
    "allocate_pages",
    "pages_for_tokens",
    "plan_pages",
]
