"""One capture at a time."""

from __future__ import annotations

import threading

CAPTURING = threading.RLock()
"""Held while something is captured, and while the allocator's cache is emptied: the allocator of the process takes one
capture at a time, and does not survive being emptied in it."""
