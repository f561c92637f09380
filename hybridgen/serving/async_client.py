"""Where `AsyncClient` is imported from; it lives in `hybridgen.serving.client`."""

from hybridgen.serving.client.async_client import AsyncClient

__all__ = ["AsyncClient"]
