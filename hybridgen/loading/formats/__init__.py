"""Quantised checkpoints: one file for each way in which they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridgen.errors import UnsupportedModelError
from hybridgen.loading.formats import awq, bitsandbytes, compressed, fine_grained, gptq, mxfp4, torchao
from hybridgen.loading.formats.scheme import Format

__all__ = ["METHODS", "Format", "read_format"]

_READERS: dict[str, Any] = {
    compressed.METHOD: compressed.read,
    fine_grained.METHOD: fine_grained.read,
    gptq.METHOD: gptq.read,
    awq.METHOD: awq.read,
    mxfp4.METHOD: mxfp4.read,
    bitsandbytes.METHOD: bitsandbytes.read,
    torchao.METHOD: torchao.read,
}
METHODS = tuple(_READERS)
"""Values of `quant_method` that are read."""


def read_format(values: Any) -> Format | None:
    """How the weights are stored, from the `quantization_config` of a config; None where it has none.

    Raises:
        UnsupportedModelError: the method, or something about it, is not known here.
    """
    if not values:
        return None
    method = values.get("quant_method") if isinstance(values, Mapping) else None
    if method is None and isinstance(values, Mapping) and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        method = bitsandbytes.METHOD  # which did not name itself once
    reader = _READERS.get(str(method))
    if reader is None:
        raise UnsupportedModelError(
            f"its weights are quantised (quantization_config, method {str(method or 'unknown')!r}), and of quantised "
            f"checkpoints those of {', '.join(METHODS)} are read; load one of these, or a float32, bfloat16 or float16 "
            "checkpoint"
        )
    return reader(values)
