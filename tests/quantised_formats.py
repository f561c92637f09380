"""Writes tiny quantised checkpoints, from the definitions of the formats alone: no code of the package packs here.

Codes are random, so that every one of them occurs; each writer also gives the values that they stand for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_batch": 4,
    "page_size": 16,
    "token_budget": 96,
    "kv_memory": "16MiB",
    "max_context": 96,
}
"""Of small engines on a CPU."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA (Dettmers et al., 2023), appendix E."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word is output 8c + AWQ_ORDER[i]."""


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] without a sign, as int32 words [rows, ceil(n * bits / 32)], the first code in the lowest bits."""
    rows, count = codes.shape
    each = 32 // bits
    out = torch.zeros(rows, -(-count // each), dtype=torch.int64)
    for column in range(count):
        out[:, column // each] |= codes[:, column].long() << (bits * (column % each))
    return torch.where(out >= 2**31, out - 2**32, out).int()


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The scale of each value: that of the block that it is in."""
    rows, columns = (torch.arange(size) // each for size, each in zip(shape, block, strict=True))
    return scales[rows][:, columns]


@dataclass(frozen=True)
class Written:
    """A weight in a format."""

    tensors: dict[str, Tensor]
    """By what is behind the projection's name, with the dot."""
    values: Tensor
    """float32 [N, K]."""


Writer = Callable[[int, int, torch.Generator], Written]


def _scales(
    shape: tuple[int, int], g: torch.Generator, dtype: torch.dtype = torch.bfloat16, size: float = 0.03
) -> Tensor:
    return ((torch.rand(shape, generator=g) + 0.5) * size).to(dtype)


def ct_packed(bits: int, group: int | None, symmetric: bool = True) -> Writer:
    """compressed-tensors pack-quantized."""

    def write(outputs: int, inputs: int, g: torch.Generator) -> Written:
        size = group or inputs
        codes = torch.randint(0, 2**bits, (outputs, inputs), generator=g)
        scales = _scales((outputs, -(-inputs // size)), g, size=0.03 if bits == 4 else 0.002)
        zeros = torch.randint(-3, 4, tuple(scales.shape), generator=g) * (not symmetric)
        middle = 2 ** (bits - 1)
        shifted = codes - middle - spread(zeros, (1, size), (outputs, inputs))
        tensors = {
            ".weight_packed": words(codes, bits),
            ".weight_scale": scales,
            ".weight_shape": torch.tensor([outputs, inputs]),
        }
        if not symmetric:
            tensors[".weight_zero_point"] = words((zeros + middle).T, bits).T.contiguous()
        return Written(tensors, shifted * spread(scales.float(), (1, size), (outputs, inputs)))

    return write


def _fp8_codes(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    codes = torch.randint(0, 255, shape, generator=g, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x3C  # no numbers
    # Most values of e4m3 are tiny; of these, only exponents near those of weights are taken, and a few of the others.
    usual = torch.rand(shape, generator=g) < 0.95
    codes = torch.where(usual & ((codes >> 3 & 15) > 9), codes & 0xBF, codes)
    return codes.view(torch.float8_e4m3fn)


def ct_plain(kind: str, strategy: str, block: tuple[int, int] | None = None, symmetric: bool = True) -> Writer:
    """compressed-tensors float-quantized and int-quantized."""

    def write(outputs: int, inputs: int, g: torch.Generator) -> Written:
        size = {"tensor": (outputs, inputs), "channel": (1, inputs)}.get(strategy, block)
        assert size is not None
        grid = -(-outputs // size[0]), -(-inputs // size[1])
        scales = _scales(grid, g, size=0.1 if kind == "fp8" else 0.002)
        if kind == "fp8":
            codes = _fp8_codes((outputs, inputs), g)
        else:
            codes = torch.randint(-128, 128, (outputs, inputs), generator=g, dtype=torch.int8)
        tensors = {".weight": codes, ".weight_scale": scales.reshape(1) if strategy == "tensor" else scales}
        numbers = codes.float()
        if not symmetric:
            zeros = torch.randint(-20, 20, grid, generator=g, dtype=torch.int8)
            tensors[".weight_zero_point"] = zeros
            numbers = numbers - spread(zeros, size, (outputs, inputs)).float()
        return Written(tensors, numbers * spread(scales.float(), size, (outputs, inputs)))

    return write


def ct_mxfp4(outputs: int, inputs: int, g: torch.Generator) -> Written:
    """compressed-tensors mxfp4-pack-quantized."""
    packed, scales, values = _mxfp4((outputs,), inputs, g)
    return Written({".weight_packed": packed, ".weight_scale": scales}, values)


def ct_nvfp4(outputs: int, inputs: int, g: torch.Generator) -> Written:
    """compressed-tensors nvfp4-pack-quantized."""
    codes = torch.randint(0, 16, (outputs, inputs), generator=g, dtype=torch.uint8)
    scales = (torch.rand((outputs, inputs // 16), generator=g) * 300 + 50).to(torch.float8_e4m3fn)
    whole = torch.tensor([4096.0])
    values = E2M1[codes.long()] * (scales.float() / whole).repeat_interleave(16, 1)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    tensors = {".weight_packed": packed, ".weight_scale": scales, ".weight_global_scale": whole}
    return Written(tensors | {".input_global_scale": torch.tensor([100.0])}, values)


def bnb_int8(outputs: int, inputs: int, g: torch.Generator) -> Written:
    """bitsandbytes LLM.int8."""
    codes = torch.randint(-127, 128, (outputs, inputs), generator=g, dtype=torch.int8)
    largest = torch.rand(outputs, generator=g) + 0.2
    tensors = {".weight": codes, ".SCB": largest, ".weight_format": torch.zeros((), dtype=torch.uint8)}
    return Written(tensors, codes.float() * (largest / 127)[:, None])


def bnb_4bit(nested: bool) -> Writer:
    """bitsandbytes nf4, with scales that are quantised too (`nested`) or not; blocks of 64 run on from row to row."""

    def write(outputs: int, inputs: int, g: torch.Generator) -> Written:
        count = outputs * inputs
        blocks = -(-count // 64)
        codes = torch.randint(0, 16, (count,), generator=g, dtype=torch.uint8)
        table = torch.tensor(NF4)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [outputs, inputs]}
        tensors = {".weight": (codes[::2] << 4 | codes[1::2])[:, None], ".weight.quant_map": table}
        scales = torch.rand(blocks, generator=g) * 0.3 + 0.3
        if nested:
            places = torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8)
            second, each = torch.rand(256, generator=g) - 0.5, torch.rand(-(-blocks // 256), generator=g) * 0.2
            scales = second[places.long()] * each.repeat_interleave(256)[:blocks] + 0.4
            tensors |= {".weight.absmax": places, ".weight.nested_absmax": each, ".weight.nested_quant_map": second}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.4}
        else:
            tensors[".weight.absmax"] = scales
        written = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[".weight.quant_state.bitsandbytes__nf4"] = written
        values = table[codes.long()] * scales.repeat_interleave(64)[:count]
        return Written(tensors, values.view(outputs, inputs))

    return write


def _mxfp4(lead: tuple[int, ...], inputs: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(0, 16, (*lead, inputs), generator=g, dtype=torch.uint8)
    scales = torch.randint(120, 124, (*lead, inputs // 32), generator=g, dtype=torch.uint8)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return packed, scales, E2M1[codes.long()] * 2.0 ** (scales.float() - 127).repeat_interleave(32, -1)


def fine_grained(block: tuple[int, int] | None, exponents: bool = False) -> Writer:
    """fp8 with `weight_scale_inv`."""

    def write(outputs: int, inputs: int, g: torch.Generator) -> Written:
        size = block or (outputs, inputs)
        grid = -(-outputs // size[0]), -(-inputs // size[1])
        codes = _fp8_codes((outputs, inputs), g)
        if exponents:
            stored = torch.randint(121, 125, grid, generator=g, dtype=torch.uint8)
            scales = 2.0 ** (stored.float() - 127)
        else:
            stored = scales = _scales(grid, g, torch.float32, 0.1)
        values = codes.float() * spread(scales, size, (outputs, inputs))
        return Written({".weight": codes, ".weight_scale_inv": stored.reshape(()) if block is None else stored}, values)

    return write


def gptq(bits: int, group: int, version: int = 1, symmetric: bool = True, reordered: bool = False) -> Writer:
    """GPTQ; -1 is one group."""

    def write(outputs: int, inputs: int, g: torch.Generator) -> Written:
        size = inputs if group == -1 else group
        groups = -(-inputs // size)
        codes = torch.randint(0, 2**bits, (outputs, inputs), generator=g)
        scales = _scales((groups, outputs), g, torch.float16, 0.03 if bits == 4 else 0.002)
        middle = 2 ** (bits - 1)
        zeros = torch.full((groups, outputs), middle)
        if not symmetric:
            zeros = torch.randint(middle - 3, middle + 4, (groups, outputs), generator=g)
        order = torch.arange(inputs) // size
        if reordered:
            order = order[torch.randperm(inputs, generator=g)]
        values = (codes - zeros.T[:, order]) * scales.float().T[:, order]
        tensors = {
            ".qweight": words(codes, bits).T.contiguous(),
            ".qzeros": words(zeros - int(version == 1), bits),
            ".scales": scales,
            ".g_idx": order.int(),
        }
        return Written(tensors, values)

    return write


def awq(group: int) -> Writer:
    """AWQ gemm."""

    def write(outputs: int, inputs: int, g: torch.Generator) -> Written:
        groups = -(-inputs // group)
        codes = torch.randint(0, 16, (inputs, outputs), generator=g)
        zeros = torch.randint(5, 12, (groups, outputs), generator=g)
        scales = _scales((groups, outputs), g, torch.float16)
        order = torch.arange(outputs).view(-1, 8)[:, list(AWQ_ORDER)].flatten()
        each = torch.arange(inputs) // group
        tensors = {".qweight": words(codes[:, order], 4), ".qzeros": words(zeros[:, order], 4), ".scales": scales}
        return Written(tensors, ((codes - zeros[each]) * scales.float()[each]).T.contiguous())

    return write


def torchao(kind: str, group: int | None = None, zeros: bool = False) -> Writer:
    """torchao's Int8Tensor and Float8Tensor, as transformers saves them."""

    def write(outputs: int, inputs: int, g: torch.Generator) -> Written:
        size = group or inputs
        fp8 = kind == "fp8"
        codes = _fp8_codes((outputs, inputs), g) if fp8 else torch.randint(-128, 128, (outputs, inputs), generator=g)
        scales = _scales((outputs, inputs // size), g, torch.float32, 0.03 if fp8 else 0.002)
        shifts = torch.randint(-9, 10, tuple(scales.shape), generator=g) * zeros
        block = (1, size)
        values = (codes.float() - spread(shifts, block, (outputs, inputs))) * spread(scales, block, (outputs, inputs))
        tensors = {"._weight_qdata": codes if fp8 else codes.to(torch.int8), "._weight_scale": scales}
        return Written(tensors if fp8 else {**tensors, "._weight_zero_point": shifts.to(torch.int8)}, values)

    return write


def torchao_config(kind: str) -> dict[str, Any]:
    """What transformers 5.23 writes with torchao 0.18, without the type's own fields."""
    default = {"_type": kind, "_version": 2, "_data": {"set_inductor_config": True}}
    return {"quant_method": "torchao", "quant_type": {"default": default}, "modules_to_not_convert": None}


def ct_config(format_: str, weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


def _packed(bits: int, group: int | None, symmetric: bool = True) -> tuple[Writer, dict[str, Any]]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    config = ct_config("pack-quantized", {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy})
    return ct_packed(bits, group, symmetric), config


def _plain(kind: str, strategy: str, block: tuple[int, int] | None = None, symmetric: bool = True) -> Any:
    weights = {"num_bits": 8, "type": "float" if kind == "fp8" else "int", "symmetric": symmetric, "strategy": strategy}
    if strategy == "block" and block:
        weights["block_structure"] = list(block)
    if strategy == "group" and block:
        weights["group_size"] = block[1]
    config = ct_config("float-quantized" if kind == "fp8" else "int-quantized", weights)
    return ct_plain(kind, strategy, block, symmetric), config


def _gptq(bits: int, group: int, **options: Any) -> tuple[Writer, dict[str, Any]]:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": options.get("symmetric", True),
        "desc_act": options.get("reordered", False),
        "checkpoint_format": "gptq" if options.get("version", 1) == 1 else "gptq_v2",
    }
    return gptq(bits, group, **options), config


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}

FORMATS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "ct w4 group": _packed(4, 32),
    "ct w4 short last group": _packed(4, 64),
    "ct w4 zeros": _packed(4, 32, symmetric=False),
    "ct w4 channel": _packed(4, None),
    "ct w8 group": _packed(8, 32),
    "ct w8 zeros": _packed(8, 32, symmetric=False),
    "ct fp8 channel": _plain("fp8", "channel"),
    "ct fp8 tensor": _plain("fp8", "tensor"),
    "ct fp8 block": _plain("fp8", "block", (32, 32)),
    "ct fp8 odd block": _plain("fp8", "block", (48, 48)),
    "ct int8 channel": _plain("int8", "channel"),
    "ct int8 zeros": _plain("int8", "channel", symmetric=False),
    "ct mxfp4": (ct_mxfp4, ct_config("mxfp4-pack-quantized", _MXFP4)),
    "ct nvfp4": (ct_nvfp4, ct_config("nvfp4-pack-quantized", {**_MXFP4, "strategy": "tensor_group", "group_size": 16})),
    "bnb int8": (bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}),
    "bnb nf4": (bnb_4bit(False), _BNB),
    "bnb nested nf4": (bnb_4bit(True), _BNB),
    "torchao int8": (torchao("int8"), torchao_config("Int8WeightOnlyConfig")),
    "torchao int8 groups": (torchao("int8", 32), torchao_config("Int8WeightOnlyConfig")),
    "torchao int8 zeros": (torchao("int8", zeros=True), torchao_config("Int8WeightOnlyConfig")),
    "torchao fp8": (torchao("fp8"), torchao_config("Float8WeightOnlyConfig")),
    "fp8 block": (fine_grained((32, 32)), {**_FP8, "weight_block_size": [32, 32]}),
    "fp8 exponents": (fine_grained((32, 32), exponents=True), {**_FP8, "weight_block_size": [32, 32]}),
    "fp8 tensor": (fine_grained(None), {**_FP8, "weight_block_size": None}),
    "gptq v1": _gptq(4, 32),
    "gptq v2": _gptq(4, 32, version=2),
    "gptq v1 zeros": _gptq(4, 32, symmetric=False),
    "gptq v2 zeros": _gptq(4, 32, version=2, symmetric=False),
    "gptq one group": _gptq(4, -1),
    "gptq 8 bits": _gptq(8, 32),
    "gptq 8 bits zeros": _gptq(8, 32, symmetric=False),
    "gptq desc_act": _gptq(4, 32, reordered=True),
    "awq": (awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
}
"""Writer and `quantization_config` of each format."""


def write(
    path: Path,
    model: PreTrainedModel,
    writers: Callable[[str], Writer | None],
    config: Mapping[str, Any],
    shard: str | None = None,
) -> Path:
    """Write a model with quantised weights, and give the model the values that they stand for.

    Args:
        writers: for each projection's name in the files, what writes it; None leaves it as it is.
        shard: the size of a file, for several.
    """
    model.save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    g = torch.Generator().manual_seed(3)
    plain: dict[str, Tensor] = {}
    files: dict[str, dict[str, Tensor]] = {}
    for file in sorted(path.glob("*.safetensors")):
        files[file.name] = out = {}
        for name, tensor in load_file(file).items():
            owner = name.removesuffix(".weight")
            writer = writers(owner) if name.endswith(".weight") and tensor.dim() == 2 else None
            if writer is None:
                out[name] = plain[name] = tensor
                continue
            written = writer(*tensor.shape, g)
            plain[name] = written.values
            out.update({owner + part: value.contiguous() for part, value in written.tensors.items()})
    for name, tensors in files.items():
        save_file(tensors, path / name, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    if index.exists():
        places = {tensor: name for name, tensors in files.items() for tensor in tensors}
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "quantization_config": dict(config)}))
    fill(model, plain)
    return path


def fill(model: PreTrainedModel, plain: Mapping[str, Tensor]) -> None:
    """Give a model the values of a checkpoint, through transformers' own loading."""
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=dict(plain), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())


def projections(owner: str) -> bool:
    """Whether a name is one of a projection that formats quantise: not the embedding, the head, or a router."""
    return owner.endswith("_proj") or ".experts." in owner


def write_family(path: Path, family: str, name: str, shard: str | None = None, **changes: Any) -> PreTrainedModel:
    """A checkpoint of a family in a format of `FORMATS`; returns the model with its values, in float32."""
    model = families.build(family, **changes)
    writer, config = FORMATS[name]
    write(path, model, lambda owner: writer if projections(owner) else None, config, shard)
    return model


def write_parts(
    path: Path,
    model: PreTrainedModel,
    parts: Mapping[str, tuple[str, str]],
    ignore: tuple[str, ...] = ("lm_head",),
    shard: str | None = None,
) -> PreTrainedModel:
    """A checkpoint of compressed-tensors whose projections are in several formats; returns the model with its values.

    Args:
        parts: by the name of a group a format of `FORMATS` and a target.
            Names go before patterns, and these before `Linear`.
        ignore: names and patterns of what stays as it is.
    """

    def means(target: str, owner: str) -> bool:
        return bool(re.match(target[3:], owner)) if target.startswith("re:") else target in ("Linear", owner)

    def writer(owner: str) -> Writer | None:
        if not projections(owner) or any(means(entry, owner) for entry in ignore):
            return None
        fitting = [(name, target) for name, target in parts.values() if means(target, owner)]
        fitting.sort(key=lambda part: (part[1] == "Linear", part[1].startswith("re:")))
        return FORMATS[fitting[0][0]][0] if fitting else None

    groups = {}
    for group, (name, target) in parts.items():
        config = FORMATS[name][1]
        groups[group] = {**config["config_groups"]["group_0"], "targets": [target], "format": config["format"]}
    config = ct_config("mixed-precision", {}, ignore=[*ignore], config_groups=groups)
    write(path, model, writer, config, shard)
    return model


def write_gpt_oss(path: Path, **changes: Any) -> Path:
    """A tiny gpt-oss with random packed experts; `changes` are fields of its config."""
    families.build("gpt_oss", **changes).save_pretrained(path)
    g, out = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            out[name] = tensor
            continue
        count, inputs, outputs = tensor.shape
        packed, scales, _ = _mxfp4((count, outputs), inputs, g)
        out[f"{name}_blocks"], out[f"{name}_scales"] = packed.view(count, outputs, inputs // 32, 16), scales
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "mxfp4"}}))
    return path
