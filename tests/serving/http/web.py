"""Asks doors over HTTP."""

from __future__ import annotations

import httpx2 as httpx
from waiting import HANGS

web = httpx.Client(timeout=HANGS, verify=False, limits=httpx.Limits(max_keepalive_connections=0))
"""With a connection for each request. `httpx.get` would read the certificates of the world for each."""
