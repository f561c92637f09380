"""A model whose weights were read, made ready to run: its own or a twin, projections joined, bound to our attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hybridgen.config import EngineConfig, Mode, ResolvedConfig
from hybridgen.errors import HybridgenError, UnsupportedModelError, described
from hybridgen.loading import Checkpoint, LoadedModel
from hybridgen.loading.live_adapters import merge_live
from hybridgen.loading.live_quantised import read_live
from hybridgen.models import BoundModel, bind
from hybridgen.models.experts_check import ExpertsCheck, check_packed, checked_routers, checked_sites, chosen_of
from hybridgen.models.few_int4 import check_few_rows
from hybridgen.models.few_rows import RowsCheck
from hybridgen.models.packed_experts import packed_experts
from hybridgen.models.probe import ProbedCall
from hybridgen.models.projections import fuse_projections, use_rows
from hybridgen.models.quantised import quantised_modules
from hybridgen.models.twin import Twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Ready(NamedTuple):
    """A bound model."""

    bound: BoundModel
    twin: Twin[Any] | None
    """Whose tree it is, for a live module. `settle()` it when everything that reads its tensors is built."""


def make_ready(
    checkpoint: Checkpoint,
    loaded: LoadedModel,
    config: EngineConfig,
    resolved: ResolvedConfig,
    undo: ExitStack,
    *,
    fusing: AbstractContextManager[Any] | None = None,
    fall_back: Callable[[str], None] | None = None,
) -> Ready:
    """Make a model ready for this mode and context.

    Args:
        undo: gets what gives a live module back.
        fusing: entered while projections are joined.
        fall_back: told what of a live module's own way is not kept, and what cannot run as it should.

    Raises:
        UnsupportedModelError: see `bound_model`.
        EngineError: packed experts compute something else on their device than they should.
    """
    twin = None if loaded.owned else Twin(loaded.model)
    model = loaded.model if twin is None else twin.model
    for note in [] if twin is None else read_live(twin, checkpoint.dtype):
        if fall_back is not None:
            fall_back(note)
    if twin is not None and config.merge_adapters:
        merge_live(twin)
    if config.fuse_projections and loaded.owned:
        with fusing or nullcontext():
            fuse_projections(model)
            use_rows(model)
    with torch.device("cpu"):  # what a probe makes is not to go by the caller's default device
        known = checkpoint.probed(resolved.max_context) if loaded.owned else None
        bound = bound_model(model, resolved.max_context, known)
    undo.callback(bound.release)
    if resolved.mode is not Mode.EAGER:  # the reference
        check = ExpertsCheck(chosen_of(model), checkpoint.dtype, fall_back)
        _use_ops(bound, check, resolved, fall_back)
        check_packed(check, packed_experts(model))
        check_few_rows(model, fall_back)
    for _, module in quantised_modules(model):
        module.dequantises = resolved.mode is Mode.EAGER  # the reference
    for experts in packed_experts(model):
        experts.dequantises = resolved.mode is Mode.EAGER
    return Ready(bound, twin)


def ready_model(
    model: PreTrainedModel, dtype: torch.dtype, config: EngineConfig, resolved: ResolvedConfig, undo: ExitStack
) -> BoundModel:
    """Make a model of an engine's own ready that no checkpoint was opened for.

    Args:
        undo: gets what gives its attention back.

    Raises:
        UnsupportedModelError: see `bound_model`.
    """
    if config.fuse_projections:
        fuse_projections(model)
        use_rows(model)
    with torch.device("cpu"):
        bound = bound_model(model, resolved.max_context)
    undo.callback(bound.release)
    if resolved.mode is not Mode.EAGER:  # the reference
        _use_ops(bound, ExpertsCheck(chosen_of(model), dtype), resolved, None)
    return bound


def _use_ops(
    bound: BoundModel, check: ExpertsCheck, resolved: ResolvedConfig, fall_back: Callable[[str], None] | None
) -> None:
    """Experts, routers and projections go by ops of ours in decode, where these were tried and found right."""
    bound.use_experts(checked_sites(check, fall_back))
    bound.use_routers(checked_routers(check, fall_back))
    # In mixtures of experts alone: in dense models the kernel for few rows has not run on a GPU yet.
    if resolved.mode.records and bound.routers:
        bound.use_few_rows(RowsCheck(fall_back))


def bound_model(model: PreTrainedModel, context: int, calls: tuple[ProbedCall, ...] | None = None) -> BoundModel:
    """`bind(model, context, calls)`, where a model whose own code fails is refused.

    Raises:
        UnsupportedModelError: a forward pass of a few tokens fails, or see `bind`.
    """
    try:
        return bind(model, context, calls)
    except HybridgenError:
        raise
    except Exception as error:  # what a model's own code raises for a config that it cannot run
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot run: a forward pass of two tokens raises "
            f"{described(error)}; does its config fit its code?"
        ) from error


def device_of(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which this is the current CUDA device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
