"""What cannot be spread over processes, found before weights are read and processes started."""

from __future__ import annotations

import torch

from hybridgen.config import EngineConfig
from hybridgen.errors import ConfigError, DeviceError, UnsupportedModelError, shown
from hybridgen.loading import Checkpoint
from hybridgen.parallel.launched import find_place
from hybridgen.parallel.plan import shard
from hybridgen.parallel.weights import whole

_NOT_YET = {
    "drafter": "a model that drafts is not loaded on several processes yet",
    "adapter": "adapters are not merged into parts of weights yet",
    "fp8_activations": "activations have one scale for all of a row, of which a rank has a part",
    "validate": "replays are not compared over several processes yet",
    "check_addresses": "addresses are not checked over several processes yet",
}
"""Fields that must be as they are by default, and why."""


def check_parallel(checkpoint: Checkpoint, config: EngineConfig) -> None:
    """Refuse what `tensor_parallel` cannot be combined with.

    Raises:
        ConfigError: a field, a mode or a live module.
        DeviceError: there are too few GPUs, or this build of torch has no collectives.
        UnsupportedModelError: the model cannot be spread over so many processes; names the reason.
    """
    size = config.tensor_parallel
    if size == 1:
        return
    for name, why in _NOT_YET.items():
        value = getattr(config, name)
        if value not in (None, False):
            raise ConfigError(f"tensor_parallel={size} with {name}={shown(value)}: {why}; leave one of them out")
    if config.speculation not in (None, "ngram"):
        raise ConfigError(
            f"tensor_parallel={size} with speculation={shown(config.speculation)}: a drafter of one's own is code, "
            'which other processes do not get; give "ngram", or leave one of them out'
        )
    if checkpoint.module is not None:
        raise ConfigError(
            f"tensor_parallel={size}, and the model is a live module, which is whole on one device; give the directory "
            "or hub id of its checkpoint"
        )
    if not torch.distributed.is_available():
        raise DeviceError(f"tensor_parallel={size}, and this build of PyTorch has no torch.distributed")
    if checkpoint.device.type == "cuda":
        _check_gpus(checkpoint, config, size)
    found = checkpoint.model_class()
    if found is None or not found.__module__.startswith("transformers."):
        raise UnsupportedModelError(
            f"tensor_parallel={size}: {checkpoint.name!r} brings code of its own, and what it computes with parts of "
            "its weights is not known; leave tensor_parallel out"
        )
    shard(whole(checkpoint), checkpoint.hf_config, 0, size)


def _check_gpus(checkpoint: Checkpoint, config: EngineConfig, size: int) -> None:
    place = find_place(size)
    if place is not None:
        if checkpoint.device.index != place.local:
            raise ConfigError(
                f"tensor_parallel={size} under torchrun, and local rank {place.local} is on {checkpoint.device}: load "
                "with Engine.load() and leave device out"
            )
        return
    if config.device not in ("auto", "cuda", "cuda:0"):
        raise ConfigError(
            f"tensor_parallel={size} uses the first {size} GPUs, and device={config.device!r} names one; leave device "
            "out, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    count = torch.cuda.device_count()
    if count < size:
        raise DeviceError(f"tensor_parallel={size}, but there are {count} GPUs; give at most that many")
