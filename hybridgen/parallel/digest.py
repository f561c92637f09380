"""Whether the ranks of a group have the same state, which follows from their having chosen the same tokens."""

from __future__ import annotations

import hashlib

from hybridgen.execution import ModelRunner


def digest(runner: ModelRunner) -> bytes:
    """Of the slots' state on the device (last tokens, positions), and of their texts where all requests' are kept."""
    history = runner.sampler.history
    found = hashlib.sha256(runner.state.table.cpu().numpy().tobytes())
    if history is not None and runner.drafting is not None:
        found.update(history.text.cpu().numpy().tobytes())
    return found.digest()
