"""Reads the weights of a validated checkpoint into a model, through `from_pretrained`."""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from hybridgen.config import EngineConfig
from hybridgen.errors import CheckpointError, OutOfMemoryError
from hybridgen.loading.checks import few, read_header
from hybridgen.loading.formats import Format
from hybridgen.loading.kv_scales import is_scale
from hybridgen.loading.quantised import load_quantised
from hybridgen.loading.source import Source, load_errors
from hybridgen.models.text_part import as_text_part, is_multimodal, left_out_names

logger = logging.getLogger(__name__)

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def read_weights(
    source: Source,
    files: list[Path],
    hf_config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    config: EngineConfig,
    layout: Format | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> tuple[PreTrainedModel, Counter[str]]:
    """The model, in evaluation mode on the device, its parameters without gradients; what is not as asked for, counted.

    Args:
        source: the checkpoint, pinned.
        files: its weight files, validated.
        hf_config: its config.
        dtype: the dtype to load to.
        device: CPU, or one CUDA device.
        config: for `allow_pickle`, `trust_remote_code`, `progress`, and what is quantised while it is read.
        layout: how quantised weights are stored; None: there are none.
        model_class: of code that the checkpoint brings, or of a multimodal model without its encoders, whose weights
            are not read then.

    Raises:
        CheckpointError: weights are missing, have other shapes than the config says, or cannot be read.
        OutOfMemoryError: they do not fit.
    """
    problem = None
    quantised = layout is not None or config.quantization is not None or config.quantize_head is not None
    notes: Counter[str] = Counter()
    with progress_bars(config.progress), _captured_logs() as logs:
        try:
            with load_errors(source, f"the weights of {source.name!r} cannot be read"):
                if quantised:
                    arguments = source, files, hf_config, dtype, device, config, layout, model_class
                    model, info, notes = load_quantised(*arguments)
                else:
                    model, info = _from_pretrained(source, hf_config, dtype, device, config, model_class)
        except CheckpointError as error:
            problem = _memory_problem(error, source, files, dtype, device)
            if problem is None:
                if logs:
                    raise CheckpointError(f"{error}\n{logs[-1]}") from error
                raise
    if problem is not None:
        # Raised only here: an exception raised inside `except` would keep the half-loaded model alive.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemoryError(problem)
    left_out = left_out_names(model)
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(left_out)]
    # Scales of the KV cache have been read already.
    info["unexpected_keys"] = [name for name in unexpected if config.kv_dtype is None or not is_scale(name)]
    check_loading_info(source, info)
    return as_text_part(model).eval().requires_grad_(False), notes


def _from_pretrained(
    source: Source,
    hf_config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    config: EngineConfig,
    model_class: type[PreTrainedModel] | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    # The stubs do not know that output_loading_info=True makes it a pair.
    loader: Any = AutoModelForCausalLM.from_pretrained
    if model_class is not None and is_multimodal(hf_config):
        loader = model_class.from_pretrained
    return loader(
        source.name,
        config=hf_config,
        dtype=dtype,
        device_map=None if device.type == "cpu" else {"": device},
        # None: safetensors where there are any, else .bin.
        use_safetensors=None if config.allow_pickle else True,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
        # With this, transformers lists mismatches (names and shapes) instead of raising without them; those
        # are raised below.
        ignore_mismatched_sizes=True,
        **source.arguments,
    )


def check_loading_info(source: Source, info: dict[str, Any]) -> None:
    """Raises for what transformers fills with random values. Tied weights and keys that a model class calls
    ignorable are not on its lists.
    """
    if info["mismatched_keys"]:
        shapes = [
            f"{name} is {list(file)}, the config says {list(model)}" for name, file, model in info["mismatched_keys"]
        ]
        raise CheckpointError(f"weights of {source.name!r} have other shapes than its config: {few(sorted(shapes))}")
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{source.name!r} lacks {len(names)} weights that its config asks for: {few(names)}; "
            "its weights and config.json do not belong together, or a file is incomplete"
        )
    if info["error_msgs"]:
        raise CheckpointError(f"the weights of {source.name!r} cannot be used: {'; '.join(info['error_msgs'][:3])}")
    if info["unexpected_keys"]:
        names = sorted(info["unexpected_keys"])
        logger.warning(
            "%s: %d weights have no place in the model and are left out: %s",
            source.name,
            len(names),
            few(names),
        )


def _memory_problem(
    error: BaseException, source: Source, files: list[Path], dtype: torch.dtype, device: torch.device
) -> str | None:
    """The message for an allocation that failed, or None if the error is another."""
    cause = error.__cause__
    if not isinstance(cause, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(cause):
        return None
    message = f"the weights of {source.name!r} need {weight_bytes(files, dtype) / 2**30:.2f} GiB as {dtype}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        message += f", and {device} had {min(free + reserved, total) / 2**30:.2f} of {total / 2**30:.2f} GiB free"
    return f"{message}; free memory there, choose a smaller dtype, a smaller model or another device"


def weight_bytes(files: list[Path], dtype: torch.dtype) -> int:
    """Bytes of the weights in `dtype`; for `.bin` files, the files' own size."""
    safetensors = [f for f in files if f.suffix == ".safetensors"]
    elements = sum(entry.numel for f in safetensors for entry in read_header(f).values())
    return elements * dtype.itemsize + sum(f.stat().st_size for f in files if f.suffix != ".safetensors")


@contextmanager
def progress_bars(wanted: bool | None) -> Iterator[None]:
    """Shows or hides the bars of transformers and of the hub client, then puts them back as they were.

    Args:
        wanted: True and False decide; None hides them unless standard error is a terminal.
    """
    transformers_on, hub_on = hf_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    if wanted is True:
        hf_logging.enable_progress_bar()
    elif wanted is False or not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        (hf_logging.enable_progress_bar if transformers_on else hf_logging.disable_progress_bar)()
        (enable_progress_bars if hub_on else disable_progress_bars)()


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(_ANSI.sub("", record.getMessage()).strip())


@contextmanager
def _captured_logs() -> Iterator[list[str]]:
    """Collects transformers' warnings instead of printing them: its loading report repeats what is raised or
    warned about here, and is the only place with the details of a failed conversion.
    """
    library = logging.getLogger("transformers")
    collector = _Collector()
    handlers, library.handlers = library.handlers, [collector]
    try:
        yield collector.messages
    finally:
        library.handlers = handlers
        for message in collector.messages:
            logger.debug("transformers: %s", message)
