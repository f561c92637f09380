"""The demo model in every format that is read: checkpoints whose codes are the nearest to its own weights.

Nothing here is calibrated, so formats with the same codes and blocks give the same loss, whoever defined them; each is
written as its own tools lay it out, and read by its own loader. `docs/quantisation.md` says what the tensors mean.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridgen.demo import model_path
from hybridgen.kernels.linear.layout import E2M1, IN_ORDER, Block, expand, pack_int4

Maker = Callable[[Tensor], dict[str, Tensor]]
"""From the values [outputs, inputs] of a projection, float32, to its tensors by what follows its name."""
GROUP = 64
"""Inputs that share a scale; the demo model's 704 inputs are no multiple of 128."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA (Dettmers et al., 2023), appendix E."""
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Bits 4i to 4i + 3 of a word are output 8c + AWQ_ORDER[i]."""


def _largest(values: Tensor, block: Block) -> Tensor:
    """The largest magnitude of each block; the last one of a row or a column may be shorter."""
    rows, columns = block.grid(*values.shape)
    padded = values.new_zeros(rows * block.outputs, columns * block.inputs)
    padded[: values.shape[0], : values.shape[1]] = values.abs()
    return padded.view(rows, block.outputs, columns, block.inputs).amax((1, 3))


def _whole(values: Tensor, block: Block | None) -> Block:
    return block or Block(*values.shape)


def _ints(values: Tensor, block: Block, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes around 0, and their scales."""
    most = 2 ** (bits - 1) - 1
    scales = (_largest(values, block) / most).to(dtype)
    codes = (values / expand(scales.float(), *values.shape, block)).round().clamp(-most - 1, most)
    return codes.int(), scales


def _ints_with_zeros(values: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of 4 bits from 0 on, scales, and the codes of 0."""
    block = Block(1, group)
    grouped = values.view(values.shape[0], -1, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scales = ((high - low) / 15).to(dtype)
    zeros = (-low / scales.float()).round().clamp(1, 15)  # GPTQ's v1 has no 0
    codes = values / expand(scales.float(), *values.shape, block) + expand(zeros, *values.shape, block)
    return codes.round().clamp(0, 15).int(), scales, zeros.int()


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes from 0 on as int32 words along the last dimension, the first code in the lowest bits."""
    return pack_int4(codes, IN_ORDER) if bits == 4 else codes.to(torch.uint8).contiguous().view(torch.int32)


def ct_packed(bits: int, group: int | None) -> Maker:
    """compressed-tensors pack-quantized, symmetric."""

    def make(values: Tensor) -> dict[str, Tensor]:
        codes, scales = _ints(values, Block(1, group or values.shape[1]), bits, torch.bfloat16)
        packed = _words(codes + 2 ** (bits - 1), bits)
        return {"weight_packed": packed, "weight_scale": scales, "weight_shape": torch.tensor(values.shape)}

    return make


def ct_zeros(values: Tensor) -> dict[str, Tensor]:
    """The same with four bits and zero points, which are packed along the outputs."""
    codes, scales, zeros = _ints_with_zeros(values, GROUP, torch.bfloat16)
    tensors = {"weight_packed": _words(codes, 4), "weight_scale": scales, "weight_shape": torch.tensor(values.shape)}
    return tensors | {"weight_zero_point": _words(zeros.T, 4).T}


def ct_int8(values: Tensor) -> dict[str, Tensor]:
    """compressed-tensors int-quantized (W8A8)."""
    codes, scales = _ints(values, Block(1, values.shape[1]), 8, torch.bfloat16)
    return {"weight": codes.to(torch.int8), "weight_scale": scales}


def fp8(name: str, block: Block | None, exponents: bool = False, rows: bool = False) -> Maker:
    """e4m3 codes beside their scales.

    Args:
        name: of the scales.
        block: None: one scale for all, or for each output with `rows`.
        exponents: scales are powers of two (ue8m0), the next above.
    """

    def make(values: Tensor) -> dict[str, Tensor]:
        size = Block(1, values.shape[1]) if rows else _whole(values, block)
        scales = stored = _largest(values, size) / 448
        if exponents:
            powers = scales.log2().ceil()
            scales, stored = powers.exp2(), (powers + 127).to(torch.uint8)
        codes = (values / expand(scales, *values.shape, size)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, name: stored if rows or block else stored.reshape(())}

    return make


def _e2m1(values: Tensor) -> Tensor:
    """The nearest codes of four bits, two in a byte, the first in the low bits."""
    table = torch.tensor(E2M1)
    codes = torch.bucketize(values.abs(), (table[1:] + table[:-1]) / 2).to(torch.uint8) | (values < 0).byte() << 3
    return codes[:, ::2] | codes[:, 1::2] << 4


def mxfp4(values: Tensor) -> dict[str, Tensor]:
    """compressed-tensors mxfp4-pack-quantized; exponents as the OCP's specification chooses them."""
    block = Block(1, 32)
    powers = _largest(values, block).log2().floor() - 2
    packed = _e2m1(values / expand(powers.exp2(), *values.shape, block))
    return {"weight_packed": packed, "weight_scale": (powers + 127).to(torch.uint8)}


def nvfp4(values: Tensor) -> dict[str, Tensor]:
    """compressed-tensors nvfp4-pack-quantized."""
    block = Block(1, 16)
    whole = 448 * 6 / values.abs().amax().reshape(1)
    scales = (_largest(values, block) / 6 * whole).to(torch.float8_e4m3fn)
    packed = _e2m1(values / expand(scales.float() / whole, *values.shape, block))
    return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole}


def gptq(bits: int, version: int = 1, zeros: bool = False) -> Maker:
    """GPTQ's files, without its calibration."""

    def make(values: Tensor) -> dict[str, Tensor]:
        if zeros:
            codes, scales, points = _ints_with_zeros(values, GROUP, torch.float16)
        else:
            codes, scales = _ints(values, Block(1, GROUP), bits, torch.float16)
            codes, points = codes + 2 ** (bits - 1), torch.full(scales.shape, 2 ** (bits - 1))
        stored = points.T - int(version == 1)
        tensors = {"qweight": _words(codes, bits).T, "qzeros": _words(stored, bits), "scales": scales.T}
        return tensors | {"g_idx": (torch.arange(values.shape[1]) // GROUP).int()}

    return make


def awq(values: Tensor) -> dict[str, Tensor]:
    """AWQ's files (gemm), without its calibration."""
    codes, scales, zeros = _ints_with_zeros(values, GROUP, torch.float16)
    order = torch.arange(values.shape[0]).view(-1, 8)[:, list(AWQ_ORDER)].flatten()
    return {"qweight": _words(codes.T[:, order], 4), "qzeros": _words(zeros.T[:, order], 4), "scales": scales.T}


def bnb_int8(values: Tensor) -> dict[str, Tensor]:
    """bitsandbytes LLM.int8."""
    largest = values.abs().amax(1)
    codes = (values * 127 / largest[:, None]).round().to(torch.int8)
    return {"weight": codes, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}


def bnb_4bit(kind: str, nested: bool = False) -> Maker:
    """bitsandbytes nf4 and fp4. The table for nested scales is even here, bitsandbytes' own is finer near 0."""
    table = torch.tensor(NF4 if kind == "nf4" else (*_FP4, *(-value for value in _FP4)))

    def make(values: Tensor) -> dict[str, Tensor]:
        blocks = values.reshape(-1, 64)
        scales = blocks.abs().amax(1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [*values.shape]}
        tensors = {"weight.quant_map": table, "weight.absmax": scales}
        if nested:
            offset = float(scales.mean())
            parts = (scales - offset).split(256)
            second = torch.stack([part.abs().amax() for part in parts])
            places = torch.cat(
                [(part / most * 127.5 + 127.5).round() for part, most in zip(parts, second, strict=True)]
            )
            even = torch.linspace(-1, 1, 256)
            tensors |= {"weight.absmax": places.to(torch.uint8), "weight.nested_absmax": second}
            tensors |= {"weight.nested_quant_map": even}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            scales = even[places.long()] * second.repeat_interleave(256)[: len(places)] + offset
        codes = ((blocks / scales[:, None]).flatten()[:, None] - table).abs().argmin(1).to(torch.uint8)
        written = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors |= {"weight": (codes[::2] << 4 | codes[1::2])[:, None]}
        return tensors | {f"weight.quant_state.bitsandbytes__{kind}": written}

    return make


def torchao_int8(group: int | None) -> Maker:
    """torchao's Int8Tensor, as transformers saves it."""

    def make(values: Tensor) -> dict[str, Tensor]:
        codes, scales = _ints(values, Block(1, group or values.shape[1]), 8, torch.float32)
        return {"_weight_qdata": codes.to(torch.int8), "_weight_scale": scales}

    return make


def torchao_fp8(values: Tensor) -> dict[str, Tensor]:
    """torchao's Float8Tensor, as transformers saves it."""
    found = fp8("scale", None, rows=True)(values)
    return {"_weight_qdata": found["weight"], "_weight_scale": found["scale"]}


def _ct(layout: str, bits: int, kind: str, strategy: str, **weights: Any) -> dict[str, Any]:
    described = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, **weights}
    group = {"targets": ["Linear"], "weights": described, "input_activations": None}
    config = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"}
    return config | {"ignore": ["lm_head"], "config_groups": {"group_0": group}}


def _gptq(bits: int, version: int = 1, zeros: bool = False) -> dict[str, Any]:
    name = "gptq" if version == 1 else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": not zeros, "desc_act": False}
    return config | {"checkpoint_format": name}


def _torchao(kind: str) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": {}}}}


_PACKED, _FLOAT = "pack-quantized", "float-quantized"
_FINE = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
_BLOCK = Block(128, 128)
_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

FORMATS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "compressed-tensors W4A16, groups of 64": (
        ct_packed(4, GROUP), _ct(_PACKED, 4, "int", "group", group_size=GROUP)),
    "compressed-tensors W4A16, groups of 64, zero points": (
        ct_zeros, _ct(_PACKED, 4, "int", "group", group_size=GROUP, symmetric=False)),
    "compressed-tensors W4A16, channels": (ct_packed(4, None), _ct(_PACKED, 4, "int", "channel")),
    "compressed-tensors W8A16, groups of 64": (
        ct_packed(8, GROUP), _ct(_PACKED, 8, "int", "group", group_size=GROUP)),
    "compressed-tensors W8A8, channels": (ct_int8, _ct("int-quantized", 8, "int", "channel")),
    "compressed-tensors FP8, channels": (
        fp8("weight_scale", None, rows=True), _ct(_FLOAT, 8, "float", "channel")),
    "compressed-tensors FP8, tensors": (fp8("weight_scale", None), _ct(_FLOAT, 8, "float", "tensor")),
    "compressed-tensors FP8, blocks of 128 x 128": (
        fp8("weight_scale", _BLOCK), _ct(_FLOAT, 8, "float", "block", block_structure=[*_BLOCK])),
    "compressed-tensors MXFP4": (mxfp4, _ct("mxfp4-pack-quantized", 4, "float", "group", group_size=32)),
    "compressed-tensors NVFP4": (nvfp4, _ct("nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16)),
    "fine-grained FP8, 128 x 128": (
        fp8("weight_scale_inv", _BLOCK), {**_FINE, "weight_block_size": [*_BLOCK]}),
    "fine-grained FP8, 128 x 128, ue8m0 scales": (
        fp8("weight_scale_inv", _BLOCK, exponents=True), {**_FINE, "weight_block_size": [*_BLOCK]}),
    "fine-grained FP8, tensors": (fp8("weight_scale_inv", None), {**_FINE, "weight_block_size": None}),
    "AWQ, groups of 64": (
        awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "GPTQ v1, 4 bits, groups of 64": (gptq(4), _gptq(4)),
    "GPTQ v2, 4 bits, groups of 64, zero points": (gptq(4, 2, zeros=True), _gptq(4, 2, zeros=True)),
    "GPTQ v1, 8 bits, groups of 64": (gptq(8), _gptq(8)),
    "torchao int8, channels": (torchao_int8(None), _torchao("Int8WeightOnlyConfig")),
    "torchao int8, groups of 64": (torchao_int8(GROUP), _torchao("Int8WeightOnlyConfig")),
    "torchao float8, channels": (torchao_fp8, _torchao("Float8WeightOnlyConfig")),
    "bitsandbytes int8": (bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}),
    "bitsandbytes nf4": (bnb_4bit("nf4"), _NF4),
    "bitsandbytes nf4, nested scales": (bnb_4bit("nf4", nested=True), {**_NF4, "bnb_4bit_use_double_quant": True}),
    "bitsandbytes fp4": (bnb_4bit("fp4"), {**_NF4, "bnb_4bit_quant_type": "fp4"}),
}  # fmt: skip
"""What makes a projection's tensors, and the `quantization_config`, by the name that the table has."""


def write(name: str, path: Path) -> float:
    """Write the demo model in a format; returns the bits of a quantised weight, with scales, zero points and tables."""
    maker, config = FORMATS[name]
    tensors: dict[str, Tensor] = {}
    size = count = 0
    for full, tensor in load_file(model_path() / "model.safetensors").items():
        owner = full.removesuffix(".weight")
        if not owner.endswith("_proj"):
            tensors[full] = tensor
            continue
        parts = {f"{owner}.{part}": each.contiguous().clone() for part, each in maker(tensor.float()).items()}
        tensors |= parts
        size += sum(part.nbytes for part in parts.values())
        count += tensor.numel()
    _save(path, tensors, quantization_config=config)
    return 8 * size / count


def write_kv_scales(path: Path, scales: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Write the demo model as it is, with scales of cached keys and values by the names of attention modules."""
    tensors = load_file(model_path() / "model.safetensors")
    for owner, (key, value) in scales.items():
        tensors |= {f"{owner}.k_scale": key, f"{owner}.v_scale": value}
    _save(path, tensors)


def _save(path: Path, tensors: dict[str, Tensor], **more: Any) -> None:
    path.mkdir(parents=True)
    for file in model_path().glob("*.json"):
        shutil.copyfile(file, path / file.name)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **more}))
