"""The model that drafts for an engine's model: opened and checked before weights are read, then loaded and bound."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

from hybridgen.config import EngineConfig, ResolvedConfig
from hybridgen.engine.ready import make_ready
from hybridgen.loading import Checkpoint
from hybridgen.loading.files import generation_untold
from hybridgen.models.twin import Twin
from hybridgen.speculation.model import ModelDrafter, check_drafter, check_states


class LoadedDrafter(NamedTuple):
    """A model that drafts, on the device."""

    drafter: ModelDrafter
    twin: Twin[Any] | None
    """Whose tree it is, for a live module."""
    weight_bytes: int
    """Of its parameters and buffers."""
    seconds: float
    """What opening it and reading its weights took."""
    notes: dict[str, int]
    """What is not as its checkpoint asks for, counted by reason."""


def open_drafter(model: Checkpoint, config: EngineConfig, resolved: ResolvedConfig) -> Checkpoint | None:
    """Find the model that drafts, and check that it can for this one; None where none is to.

    Raises:
        ConfigError: it has another vocabulary, a shorter context, or is on another device.
        LoadError, DeviceError: see `Checkpoint.open`.
    """
    given = config.drafter
    if given is None:
        return None
    live = hasattr(given, "named_parameters")
    own = config.replace(
        drafter=None,
        device="auto" if live else str(model.device),
        dtype="auto" if live else config.dtype,
        max_context=None,
        revision=None,
        adapter=None,
        quantization=None,
        quantize_head=None,
        fp8_activations=False,
        kv_dtype=None,
    )
    with generation_untold():  # requests choose as the model's own config and they themselves say
        found = Checkpoint.open(given, own)
    check_drafter(found, model, resolved.max_context)
    return found


def load_drafter(
    checkpoint: Checkpoint, config: EngineConfig, resolved: ResolvedConfig, undo: ExitStack
) -> LoadedDrafter:
    """Read its weights and bind it.

    Args:
        undo: gets what gives a live module back.

    Raises:
        ConfigError: its layers keep what cannot be taken back.
        LoadError: see `Checkpoint.load`.
    """
    loaded = checkpoint.load()
    bound, twin = make_ready(checkpoint, loaded, config, resolved, undo)
    if twin is not None:
        twin.settle()
    check_states(checkpoint.name, bound, resolved.max_context, config.page_size, checkpoint.dtype)
    states = bound.layer_states(config.page_size, checkpoint.dtype)
    stored = [tensor.untyped_storage() for tensor in (*bound.model.parameters(), *bound.model.buffers())]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in stored}
    return LoadedDrafter(
        ModelDrafter(checkpoint.name, bound, checkpoint.vocab_size, states),
        twin,
        sum(sizes.values()),
        checkpoint.seconds + loaded.seconds,
        dict(loaded.notes),
    )
