"""The model or head that drafts for an engine's model: opened and checked before weights are read, then loaded."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hybridgen.config import EngineConfig, ResolvedConfig
from hybridgen.engine.ready import make_ready, ready_model
from hybridgen.errors import ConfigError, shown
from hybridgen.execution.drafting import check_unused
from hybridgen.loading import Checkpoint
from hybridgen.loading.checkpoint import CannotQuantise
from hybridgen.loading.eagle import EagleFiles, find_head, read_head
from hybridgen.loading.files import generation_untold
from hybridgen.loading.mtp import MtpFiles, find_mtp, read_mtp
from hybridgen.models import BoundModel
from hybridgen.models.twin import Twin
from hybridgen.speculation.eagle import EagleDrafter, check_head
from hybridgen.speculation.head import EagleHead
from hybridgen.speculation.model import ModelDrafter, check_drafter, check_states
from hybridgen.speculation.mtp import JoinedEmbedding, MtpDrafter


class LoadedDrafter(NamedTuple):
    """A model or a head that drafts, on the device."""

    drafter: ModelDrafter | EagleDrafter | MtpDrafter
    twin: Twin[Any] | None
    """Whose tree it is, for a live module."""
    weight_bytes: int
    """Of its parameters and buffers."""
    seconds: float
    """What opening it and reading its weights took."""
    notes: dict[str, int]
    """What is not as its checkpoint asks for, counted by reason."""


class OpenedHead(NamedTuple):
    """A head that drafts, whose files were checked."""

    files: EagleFiles
    layers: tuple[int, ...]
    """The model's layers whose inputs it reads."""
    seconds: float
    """What finding and checking them took."""


class OpenedMtp(NamedTuple):
    """The head for multi-token prediction that a checkpoint carries, whose tensors were checked."""

    files: MtpFiles
    seconds: float
    """What finding and checking them took."""


Opened = Checkpoint | OpenedHead | OpenedMtp


def open_drafter(model: Checkpoint, config: EngineConfig, resolved: ResolvedConfig) -> Opened | None:
    """Find the model or the head that drafts, and check that it can for this one; None where none is to.

    Raises:
        ConfigError: it has another vocabulary, a shorter context, or is on another device; a head is for another model.
        EngineError: another engine has the object that drafts.
        LoadError, DeviceError: see `Checkpoint.open` and `find_head`.
    """
    given = config.drafter
    if given is None:
        check_unused(config.speculation)
        return None
    if given == "mtp":
        if config.quantize_drafter is not None:
            raise ConfigError(
                f'quantize_drafter={config.quantize_drafter!r} with drafter="mtp": the layer of such a head runs as it '
                "is stored; leave it out"
            )
        if config.quantize_head is not None:
            raise ConfigError(
                f'quantize_head={config.quantize_head!r} with drafter="mtp": such a head multiplies by that of the '
                "model, as it is stored; leave one of them out"
            )
        start = time.perf_counter()
        return OpenedMtp(find_mtp(model), time.perf_counter() - start)
    live = hasattr(given, "named_parameters")
    own = config.replace(
        drafter=None,
        device="auto" if live else str(model.device),
        dtype="auto" if live else config.dtype,
        max_context=None,
        revision=None,
        adapter=None,
        quantization=config.quantize_drafter,
        quantize_drafter=None,
        quantize_head=None,
        fp8_activations=False,
        kv_dtype=None,
    )
    start = time.perf_counter()
    head = find_head(given, own)
    if head is not None:
        if config.quantize_drafter not in (None, "fp8"):
            raise ConfigError(
                f"quantize_drafter={config.quantize_drafter!r}: {head.name!r} is a head, whose passes read fp8 or what "
                'is stored; use "fp8" or leave it out'
            )
        return OpenedHead(head, check_head(head, model), time.perf_counter() - start)
    try:
        with generation_untold():  # requests choose as the model's own config and they themselves say
            found = Checkpoint.open(given, own)
    except CannotQuantise as error:
        raise ConfigError(
            f"quantize_drafter={config.quantize_drafter!r} with drafter={shown(given)}: {error.why}"
        ) from error
    check_drafter(found, model, resolved.max_context)
    return found


def load_drafter(
    checkpoint: Opened,
    model: Checkpoint,
    target: BoundModel,
    config: EngineConfig,
    resolved: ResolvedConfig,
    undo: ExitStack,
) -> LoadedDrafter:
    """Read its weights and bind it.

    Args:
        model, target: whom it drafts for.
        undo: gets what gives a live module back.

    Raises:
        ConfigError: its layers keep what cannot be taken back.
        LoadError: see `Checkpoint.load` and `read_head`.
    """
    if isinstance(checkpoint, OpenedHead):
        return _load_head(checkpoint, model, target, config)
    if isinstance(checkpoint, OpenedMtp):
        return _load_mtp(checkpoint, model, target, config, resolved, undo)
    loaded = checkpoint.load()
    bound, twin = make_ready(checkpoint, loaded, config, resolved, undo)
    if twin is not None:
        twin.settle()
    check_states(checkpoint.name, bound, resolved.max_context, config.page_size, checkpoint.dtype)
    states = bound.layer_states(config.page_size, checkpoint.dtype)
    return LoadedDrafter(
        ModelDrafter(checkpoint.name, bound, checkpoint.vocab_size, states),
        twin,
        _bytes_of(bound.model),
        checkpoint.seconds + loaded.seconds,
        dict(loaded.notes),
    )


def _load_head(opened: OpenedHead, model: Checkpoint, target: BoundModel, config: EngineConfig) -> LoadedDrafter:
    start = time.perf_counter()
    files, layers = opened.files, opened.layers
    if max(layers) >= len(target.layers):
        raise ConfigError(
            f"drafter={files.name!r} reads what goes into the layers {layers}, and {model.name!r} has "
            f"{len(target.layers)} of them"
        )
    weights = read_head(files, model.dtype, model.device)
    with torch.device("cpu"):  # not the caller's default device
        rotary = LlamaRotaryEmbedding(files.rotary)
    head = EagleHead(files.shape, weights, rotary, fp8=config.quantize_drafter is not None)
    drafter = EagleDrafter(files.name, head, target, layers, config.page_size)
    return LoadedDrafter(drafter, None, _bytes_of(head), opened.seconds + time.perf_counter() - start, {})


def _load_mtp(
    opened: OpenedMtp,
    model: Checkpoint,
    target: BoundModel,
    config: EngineConfig,
    resolved: ResolvedConfig,
    undo: ExitStack,
) -> LoadedDrafter:
    start = time.perf_counter()
    weights = read_mtp(opened.files, model, target.model)
    one: Any = weights.model
    beside = weights.token_norm, weights.hidden_norm, weights.join
    joined = JoinedEmbedding(target.model.get_input_embeddings(), *beside, float(one.config.rms_norm_eps))
    one.set_input_embeddings(joined)
    one.set_output_embeddings(target.model.get_output_embeddings())
    bound = ready_model(one, model.dtype, config, resolved, undo)
    check_states("mtp", bound, resolved.max_context, config.page_size, model.dtype)
    states = bound.layer_states(config.page_size, model.dtype)
    drafter = MtpDrafter(bound, joined, target, states, int(one.config.hidden_size))
    theirs = {tensor.untyped_storage().data_ptr() for tensor in target.model.parameters()}
    own = _bytes_of(one, but=theirs)
    return LoadedDrafter(drafter, None, own, opened.seconds + time.perf_counter() - start, {})


def _bytes_of(module: nn.Module, but: Collection[int] = ()) -> int:
    """Bytes of its parameters and buffers, but for storages at these addresses."""
    stored = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    found = {storage.data_ptr(): storage.nbytes() for storage in stored}
    return sum(size for address, size in found.items() if address not in but)
