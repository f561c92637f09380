"""compressed-tensors: what llm-compressor writes (https://github.com/vllm-project/compressed-tensors)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridgen.errors import UnsupportedModelError, shown
from hybridgen.kernels.linear.layout import IN_ORDER, Block, expand, interleave, unpack_e2m1, unpack_int4
from hybridgen.loading.checks import TensorEntry
from hybridgen.loading.formats.scheme import (
    FLOATS,
    WEIGHTS_ALONE,
    Damaged,
    Part,
    Scheme,
    check_codes,
    check_scales,
    compiled,
    dense_2d,
    dot_weight,
    full_block,
    need,
    split_at_dot,
    whole,
)
from hybridgen.models.quantised import QuantisedWeight

KV_NOTE = (
    "the KV cache has 16 bits, though the checkpoint's config asks for 8 (kv_cache_scheme): kv_dtype='fp8' does it"
)
ATTENTION_NOTE = "queries, keys and values are not quantised in attention, as the checkpoint's config asks for"
METHOD = "compressed-tensors"
_PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
)
_PLAIN = ("float-quantized", "int-quantized", "naive-quantized")
_KNOWN = ("pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized", *_PLAIN)
_SIZES = ("I64", "I32")
_STATUSES = ("compressed", "frozen")
"""Both have codes in the files; the second was written by the first versions."""
_REORDERED = "its inputs were quantised in another order (actorder)"
_TWO_SCALES = "nvfp4 has two levels of scales, for which there is no kernel"


@dataclass(frozen=True)
class Packed:
    """`pack-quantized`: integers of 4 or 8 bits in int32 words, along the inputs."""

    bits: int
    group: int | None
    """Inputs that share a scale; None for all."""
    symmetric: bool

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`. The last word of a row need not be full: `weight_shape` says so."""
        outputs, words = need(entries, "weight_packed", 2).shape
        each = 32 // self.bits
        if "weight_shape" not in small:
            return outputs, words * each
        dtype = need(entries, "weight_shape", 1).dtype
        if dtype not in _SIZES:
            raise Damaged("weight_shape", f"is {dtype}, and must be {' or '.join(_SIZES)}")
        shape = small["weight_shape"].tolist()
        if len(shape) != 2 or shape[0] != outputs or -(-shape[1] // each) != words:
            raise Damaged("weight_shape", f"holds {shape}, and weight_packed is {[outputs, words]}")
        return outputs, shape[1]

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        groups = 1 if self.group is None else -(-inputs // self.group)
        each = 32 // self.bits
        found = {
            "weight_packed": Part(("I32",), (outputs, -(-inputs // each)), small=False),
            "weight_scale": Part(FLOATS, (outputs, groups)),
            "weight_shape": Part(_SIZES, (2,), optional=True),
            "weight_g_idx": Part(("I32", "I64"), (inputs,), optional=True),
        }
        if not self.symmetric:
            found["weight_zero_point"] = Part(("I32",), (-(-outputs // each), groups))
        return found

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        check_scales("weight_scale", small["weight_scale"])
        order = small.get("weight_g_idx")
        if order is None or self._in_order(order):
            return None
        groups = small["weight_scale"].shape[1]
        if bool((order >= groups).any()) or bool((order < 0).any()):
            raise Damaged("weight_g_idx", f"names groups outside of the {groups} that there are")
        return _REORDERED

    def _in_order(self, order: Tensor) -> bool:
        """Whether groups hold neighbours. -1 stands for that, too."""
        usual = torch.arange(order.shape[0], device=order.device) // (self.group or order.shape[0])
        return bool((order == -1).all()) or torch.equal(order.long(), usual)

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`. Zero points lie along the outputs, as codes do along the inputs."""
        block = Block(1, self.group or inputs)
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        zeros = tensors.get("weight_zero_point")
        if self.bits == 4:
            if zeros is not None:
                zeros = unpack_int4(zeros.T.contiguous(), outputs, IN_ORDER).T.to(torch.uint8).contiguous()
            kind, data = "int4", interleave(packed)
        else:
            if zeros is not None:
                zeros = _bytes(zeros.T.contiguous(), outputs).T.to(torch.int16).contiguous()
            kind, data = "int8", _bytes(packed, inputs)
        order = tensors.get("weight_g_idx")
        if order is None or self._in_order(order):
            return QuantisedWeight(kind, data, scales, zeros, inputs, block, dtype)
        scales = scales[:, order.long()].contiguous()
        zeros = None if zeros is None else zeros[:, order.long()].contiguous()
        return QuantisedWeight(kind, data, scales, zeros, inputs, Block(1, 1), dtype).dequantise()


def _bytes(packed: Tensor, count: int) -> Tensor:
    """Four codes of 8 bits with offset 128 in each word, as int8 [rows, count]."""
    return (packed.contiguous().view(torch.uint8)[:, :count] ^ 128).view(torch.int8).contiguous()


@dataclass(frozen=True)
class Plain:
    """`float-quantized` and `int-quantized`: one code of 8 bits an item."""

    kind: str
    """`fp8` or `int8`."""
    strategy: str
    """`tensor`, `channel`, `group` or `block`."""
    shape: tuple[int, int] | None
    """Outputs and inputs of a block or group."""
    symmetric: bool

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`."""
        outputs, inputs = need(entries, "weight", 2).shape
        return outputs, inputs

    def _block(self, outputs: int, inputs: int) -> Block:
        if self.strategy == "tensor":
            return full_block(outputs, inputs)
        return Block(1, inputs) if self.shape is None else Block(*self.shape)

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        grid = self._block(outputs, inputs).grid(outputs, inputs)
        found = {
            "weight": Part(("F8_E4M3",) if self.kind == "fp8" else ("I8",), (outputs, inputs), small=False),
            # One scale for all is written as [1] or as a number.
            "weight_scale": Part(FLOATS, None if self.strategy == "tensor" else grid),
        }
        if self.kind == "int8":
            zeros = None if self.strategy == "tensor" else grid
            found["weight_zero_point"] = Part(("I8",), zeros, optional=self.symmetric)
        return found

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        check_scales("weight_scale", small["weight_scale"])
        count = self._block(outputs, inputs).grid(outputs, inputs)
        for part in ("weight_scale", "weight_zero_point"):
            if part in small and small[part].numel() != count[0] * count[1]:
                raise Damaged(part, f"holds {small[part].numel()} values, not {count[0] * count[1]}")
        if self.symmetric and "weight_zero_point" in small and bool(small["weight_zero_point"].any()):
            raise Damaged("weight_zero_point", "holds zero points, and the config says that the weight has none")
        return None

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`."""
        if self.kind == "fp8":
            check_codes("weight", tensors["weight"])
        block = self._block(outputs, inputs)
        scales = tensors["weight_scale"].reshape(block.grid(outputs, inputs))
        zeros = None if self.symmetric else tensors["weight_zero_point"].reshape(scales.shape).to(torch.int16)
        return QuantisedWeight(self.kind, tensors["weight"], scales, zeros, inputs, block, dtype)


@dataclass(frozen=True)
class PackedMxfp4:
    """`mxfp4-pack-quantized`: e2m1 codes, and an exponent for 32 of them."""

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`."""
        outputs, items = need(entries, "weight_packed", 2).shape
        return outputs, items * 2

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        return {
            "weight_packed": Part(("U8",), (outputs, inputs // 2), small=False),
            "weight_scale": Part(("U8", "F8_E8M0"), (outputs, -(-inputs // 32))),
        }

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        if bool((small["weight_scale"].view(torch.uint8) == 255).any()):
            raise Damaged("weight_scale", "holds the exponent 255, which is no number")
        return None

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`."""
        scales = tensors["weight_scale"].view(torch.uint8)
        return QuantisedWeight("mxfp4", tensors["weight_packed"], scales, None, inputs, Block(1, 32), dtype)


@dataclass(frozen=True)
class PackedNvfp4:
    """`nvfp4-pack-quantized`: e2m1 codes, an e4m3 scale for 16 of them, and one number that divides the scales."""

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`."""
        outputs, items = need(entries, "weight_packed", 2).shape
        return outputs, items * 2

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        return {
            "weight_packed": Part(("U8",), (outputs, inputs // 2), small=False),
            "weight_scale": Part(("F8_E4M3",), (outputs, -(-inputs // 16))),
            "weight_global_scale": Part(FLOATS, (1,)),
        }

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        check_scales("weight_scale", small["weight_scale"])
        check_scales("weight_global_scale", small["weight_global_scale"], positive=True)
        return _TWO_SCALES

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`."""
        scales = tensors["weight_scale"].float() / tensors["weight_global_scale"].float()
        return (unpack_e2m1(tensors["weight_packed"], inputs) * expand(scales, outputs, inputs, Block(1, 16))).to(dtype)


@dataclass(frozen=True)
class CompressedTensors:
    """A checkpoint of compressed-tensors."""

    groups: tuple[tuple[tuple[str, ...], Scheme | None], ...]
    """Targets and scheme of each group of the config; None where its weights are not quantised."""
    ignore: tuple[str, ...]
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    """Other classes than `Linear` that groups name."""
    method: str = METHOD
    target = staticmethod(dot_weight)
    dense_shape = staticmethod(dense_2d)
    _known: dict[str, Scheme | None] = field(default_factory=dict, repr=False, compare=False)

    def split(self, name: str) -> tuple[str, str] | None:
        """See `Format`."""
        return split_at_dot(name, _PARTS)

    def scheme(self, projection: str) -> Scheme | None:
        """The first group that names the projection: by its name, by a pattern, by `Linear`; if `ignore` does not.

        Raises:
            UnsupportedModelError: only groups that name another class are left; transformers would not read it then.
        """
        if projection not in self._known:
            self._known[projection] = self._find(projection)
        return self._known[projection]

    def _find(self, projection: str) -> Scheme | None:
        if any(_names(entry, projection) for entry in self.ignore):
            return None
        found = [(target, scheme) for targets, scheme in self.groups for target in targets]
        for kind in (lambda t: not t.startswith("re:") and t != "Linear", lambda t: t.startswith("re:")):
            for target, scheme in found:
                if kind(target) and _names(target, projection):
                    return scheme
        linear = [scheme for target, scheme in found if target == "Linear"]
        if not linear and self.classes:
            raise _unknown(
                f"config_groups have targets of the class {', '.join(map(shown, self.classes))}, and {projection}, "
                "whose weight is quantised, is a Linear: no group says how it is stored"
            )
        return linear[0] if linear else None


def _names(target: str, projection: str) -> bool:
    """Whether a target or an entry of `ignore` means a projection; patterns match from its beginning."""
    if target.startswith("re:"):
        return compiled(target.removeprefix("re:"), "quantization_config").match(projection) is not None
    return target == projection


def read(values: Mapping[str, Any]) -> CompressedTensors:
    """The format that a `quantization_config` describes.

    Raises:
        UnsupportedModelError: something in it is not known here.
    """
    if values.get("sparsity_config"):
        sparse = values["sparsity_config"]
        kind = sparse.get("format") if isinstance(sparse, Mapping) else sparse
        if kind not in (None, "dense"):
            raise _unknown(f"sparsity_config.format {shown(kind)}")
    if values.get("transform_config"):
        raise _unknown("transform_config (weights that are rotated)")
    status = values.get("quantization_status", "compressed")
    if status not in _STATUSES:
        raise _unknown(f"quantization_status {shown(status)}")
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _unknown(f"config_groups {shown(groups)}")
    notes = []
    found: list[tuple[tuple[str, ...], Scheme | None]] = []
    classes: list[str] = []
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
            raise _unknown(f"config_groups.{name} {shown(group)}")
        targets = tuple(str(target) for target in group["targets"])
        others = [target for target in targets if _is_class(target)]
        for target in targets:
            _names(target, "")  # a pattern that is none is found before files are read
        weights, activations = group.get("weights") is not None, group.get("input_activations") is not None
        if weights and "Embedding" in others:
            raise _unknown(f"config_groups.{name}.targets 'Embedding' (an embedding that is quantised)")
        scheme = scheme_of(name, group, group.get("format") or values.get("format")) if weights else None
        found.append((tuple(target for target in targets if target not in others), scheme))
        classes += others
        if activations:
            notes.append(ATTENTION_NOTE if others and not weights else WEIGHTS_ALONE)
        if group.get("output_activations") is not None:
            raise _unknown(f"config_groups.{name}.output_activations")
    if values.get("kv_cache_scheme") is not None:
        notes.append(KV_NOTE)
    ignore = values.get("ignore") or []
    if not isinstance(ignore, list):
        raise _unknown(f"ignore {shown(ignore)}")
    for entry in ignore:
        _names(str(entry), "")
    once = tuple(dict.fromkeys(notes)), tuple(dict.fromkeys(classes))
    return CompressedTensors(tuple(found), tuple(str(entry) for entry in ignore), *once)


def _is_class(target: str) -> bool:
    """Whether a target is the name of a class of modules other than projections, such as an attention's."""
    return target != "Linear" and not target.startswith("re:") and "." not in target and target[:1].isupper()


def scheme_of(name: str, group: Mapping[str, Any], layout: Any) -> Scheme:
    """How a group of a config stores its weights.

    Args:
        name: of the group, for messages.
        layout: its `format`.

    Raises:
        UnsupportedModelError: something in it is not known here.
    """
    weights = group.get("weights")
    if layout not in _KNOWN:
        raise _unknown(f"the format {shown(layout)} of config_groups.{name}")
    if not isinstance(weights, Mapping):
        raise _unknown(f"config_groups.{name}.weights {shown(weights)}")
    bits, kind, strategy = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("strategy")
    group_size, symmetric = weights.get("group_size"), weights.get("symmetric", True)
    if strategy is None:  # as compressed-tensors reads it
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    kind, strategy = str(kind).lower(), str(strategy).lower()
    what = f"config_groups.{name}.weights: {shown(kind)} of {shown(bits)} bits, strategy {shown(strategy)}"
    if not isinstance(symmetric, bool) or not whole(bits):
        raise _unknown(what)
    if layout == "mxfp4-pack-quantized":
        if (bits, kind, group_size, symmetric) != (4, "float", 32, True):
            raise _unknown(what)
        return PackedMxfp4()
    if layout == "nvfp4-pack-quantized":
        if (bits, kind, group_size, symmetric) != (4, "float", 16, True):
            raise _unknown(what)
        return PackedNvfp4()
    if strategy == "group" and not (whole(group_size) and group_size > 0):
        raise _unknown(f"{what}, group_size {shown(group_size)}")
    size = group_size if strategy == "group" else None
    if layout == "pack-quantized":
        if kind != "int" or bits not in (4, 8) or strategy not in ("group", "channel"):
            raise _unknown(what)
        return Packed(bits, size, symmetric)
    stored = {("float", 8): "fp8", ("int", 8): "int8"}.get((kind, bits))
    if stored is None or strategy not in ("tensor", "channel", "group", "block") or (stored == "fp8" and not symmetric):
        raise _unknown(what)
    block = None if size is None else (1, size)
    if strategy == "block":
        given = weights.get("block_structure")
        if isinstance(given, str):  # of the first versions: "128x128"
            given = [int(size) for size in given.split("x") if size.isdecimal()]
        if not (isinstance(given, list) and len(given) == 2 and all(whole(n) and n > 0 for n in given)):
            raise _unknown(f"{what}, block_structure {shown(given)}")
        block = (given[0], given[1])
    return Plain(stored, strategy, block, symmetric)


def _unknown(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"its weights are quantised in a way that is not known here (quantization_config, method {METHOD!r}: {what}); "
        "load a checkpoint in one of the formats of docs/quantisation.md, or a float32, bfloat16 or float16 one"
    )
