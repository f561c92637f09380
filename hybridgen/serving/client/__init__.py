"""The clients. They import neither torch nor transformers, so that a script that uses one starts at once."""

from hybridgen.serving.client.client import Client

__all__ = ["Client"]
