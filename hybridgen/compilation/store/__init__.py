"""The persisted compile cache: where it is, what an entry holds, when an entry may be used.

Nothing here imports torch until parts of a key are collected (`parts`), so that the `hybridgen cache` commands that
only look at files start at once.
"""

from hybridgen.compilation.store.entry import Entry, MemoryEntry
from hybridgen.compilation.store.key import Key
from hybridgen.compilation.store.store import Store

__all__ = ["Entry", "Key", "MemoryEntry", "Store"]
