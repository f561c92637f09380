"""One process owns the model; clients talk to it over a Unix socket. `docs/serving.md` has the protocol.

The clients import neither torch nor transformers, so that a script that uses one starts at once.
"""
