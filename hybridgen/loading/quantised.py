"""Reads a model with quantised weights: as its checkpoint stores them, or made of 16-bit ones while they are read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hybridgen.config import EngineConfig
from hybridgen.errors import CheckpointError
from hybridgen.kernels.linear.experts_form import Projection
from hybridgen.kernels.linear.layout import Block
from hybridgen.loading.assembly import ExpertsReader, Reader, assemble
from hybridgen.loading.expectation import skeleton
from hybridgen.loading.formats import Format
from hybridgen.loading.formats.compressed import KV_NOTE
from hybridgen.loading.formats.mxfp4 import Experts
from hybridgen.loading.kv_scales import is_scale
from hybridgen.loading.places import Places
from hybridgen.loading.separate_experts import experts_reader, find_experts
from hybridgen.loading.source import Source
from hybridgen.loading.stored import Lazy, Stored, TensorFiles, check_files, find_stored
from hybridgen.models.experts import probe, sizes_of
from hybridgen.models.latent import latent_projections
from hybridgen.models.mixers import projections_read
from hybridgen.models.packed_experts import PackedWeights
from hybridgen.models.quantised import QuantisedWeight
from hybridgen.models.rounding import quantise, relative_error

INT4_WARNING = (
    "quantization='int4' rounds to the nearest code: products err by a tenth or more, small models the most; for "
    "better texts load a checkpoint that was calibrated (AWQ, GPTQ or compressed-tensors W4A16)"
)


def identity_of(layout: Format | None, stored: Any, config: EngineConfig) -> str:
    """What is known of the weights' formats before they are read, for the compile cache's key.

    Args:
        stored: the `quantization_config` that the layout was read from.
    """
    made = f"{config.quantization}, head {config.quantize_head}"
    if layout is None:
        return "dense" if config.quantization is None and config.quantize_head is None else f"dense, made {made}"
    return f"{layout.method}, made {made}: {json.dumps(stored, sort_keys=True, default=str)}"


class Parts(Protocol):
    """What one of several processes has of a model."""

    def tensors(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Its parts of tensors that are read when they are indexed with `...`, by the files' names."""
        ...

    def readers(self, readers: Mapping[str, Reader]) -> dict[str, Reader]:
        """What gives its parts of quantised weights, by the model's names of projections."""
        ...

    def model_class(self, kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """The class, whose models have its parts' shapes from the beginning."""
        ...


def load_quantised(
    source: Source,
    files: list[Path],
    hf_config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    config: EngineConfig,
    layout: Format | None,
    model_class: type[PreTrainedModel] | None,
    parts: Parts | None = None,
) -> tuple[PreTrainedModel, dict[str, Any], Counter[str]]:
    """The model, transformers' account of what it loaded, and what is not as asked for, counted.

    Scales, zero points and orders of all projections are read and checked before anything of size is.

    Args:
        files: safetensors files.
        layout: how the checkpoint is stored; None: not quantised.
        parts: what this process has of the model; None: all of it.

    Raises:
        CheckpointError: a tensor is damaged; names it and its file.
        UnsupportedModelError: the files are no safetensors files.
        Exception: whatever transformers raises.
    """
    notes: Counter[str] = Counter()
    check_files(files, "quantised while they are read" if layout is None else layout.method)
    with TensorFiles(files) as tensors:
        stored: Mapping[str, Stored] = {}
        plain = tensors.entries
        if layout is not None:
            stored, plain, left_out = find_stored(tensors, layout)
            stored = {name: each.checked(tensors) for name, each in stored.items()}
            notes.update(layout.notes)
            if config.kv_dtype is not None:
                del notes[KV_NOTE]
                left_out = tuple(name for name in left_out if not is_scale(name))
            if left_out:
                notes[f"scales of {_left_out(left_out)} are left out: 16 bits are kept"] += len(left_out)
        model = skeleton(source, plain, hf_config, model_class)
        plan = _Plan(source, model, tensors, device, dtype, notes)
        experts = plan.add_experts(stored)
        for name, each in stored.items():
            if name not in experts:
                plan.add_stored(each)
        targets = {each.target for each in stored.values()}
        for name in plain.keys() - targets:  # an FP8 weight has the name that it has without being quantised
            # In another dtype it would be on the device twice for a moment.
            same = parts is None and tensors.dtype_of(name) is dtype
            plan.tensors[name] = tensors.lazy(name, device if same else None)
        head = plan.head
        if config.quantization is not None:
            plan.make(config.quantization)
        if config.quantize_head is not None:
            if head is None:
                notes["the head stays as it is: it is no nn.Linear"] += 1
            elif head in plan.apart:
                notes["the head stays as it is: the checkpoint's is quantised already"] += 1
            else:
                plan.make_head(head, config.quantize_head)
        if "int4" in (config.quantization, config.quantize_head):
            notes[INT4_WARNING] += 1
        kind, others, apart = type(model), plan.tensors, plan.apart
        if parts is not None:
            kind, others, apart = parts.model_class(kind), parts.tensors(others), parts.readers(apart)
        loaded, info = assemble(
            kind,
            hf_config,
            others,
            apart,
            dtype,
            device,
            unties_head=head in plan.apart,
            experts=plan.experts,
        )
        for name, error in plan.errors.items():
            loaded.get_submodule(name).error = error  # type: ignore[assignment]
    loaded.config.name_or_path = loaded.name_or_path = source.name
    return loaded, info, notes


def quantisable(model: PreTrainedModel) -> list[str]:
    """Names of the projections that can be quantised: all but the head, routers, and those whose weights are read.

    Which experts a token gets must not change; a router is an `nn.Linear` beside the experts. What expands latents is
    taken apart by attention (`models.latent`), and mixers multiply by some weights themselves (`models.mixers`).
    """
    head = model.get_output_embeddings()
    routers = {id(child) for module in model.modules() if hasattr(module, "experts") for child in module.children()}
    others = routers | {id(projection) for projection in (*latent_projections(model), *projections_read(model))}
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and id(module) not in others
    ]


def _left_out(names: Sequence[str]) -> str:
    """What such scales are of, in words."""
    kinds = {is_scale(name) for name in names}
    return " and of ".join(
        ["activations"] * (False in kinds) + ['the KV cache (kv_dtype="fp8" uses them)'] * (True in kinds)
    )


class _Plan:
    """Which projections are read apart, and where all other tensors come from."""

    def __init__(
        self,
        source: Source,
        model: PreTrainedModel,
        files: TensorFiles,
        device: torch.device,
        dtype: torch.dtype,
        notes: Counter[str],
    ) -> None:
        self._source, self._files, self._device, self._dtype, self._notes = source, files, device, dtype, notes
        self._model = model
        self._places = Places(model)
        self._linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        self._read = {
            id(projection): why
            for projections, why in (
                (latent_projections(model), "attention to latents takes their projections apart"),
                (projections_read(model), "layers that keep a state multiply by their weights themselves"),
            )
            for projection in projections
        }
        self.apart: dict[str, Reader] = {}
        """By the model's names."""
        self.experts: dict[str, ExpertsReader] = {}
        """By the model's names of modules."""
        self.tensors: dict[str, Any] = {}
        """By the files' names."""
        self.errors: dict[str, float] = {}
        """What rounding changed in a projection that was quantised while it was read, by the model's names."""

    @property
    def head(self) -> str | None:
        """The name of the head, if it is an `nn.Linear`."""
        head = self._model.get_output_embeddings()
        return next((name for name, module in self._linears.items() if module is head), None)

    def add_stored(self, stored: Stored) -> None:
        """Run a projection as it is stored, or dequantise it where that cannot be done."""
        place = self._places.of(stored.target)
        name = None if place is None else place.removesuffix(".weight")
        linear = self._linears.get(name or "")
        reason = stored.dequantised
        if linear is None and reason is None:
            reason = "transformers joins or renames them while loading, or they are no nn.Linear (experts, embeddings)"
        elif reason is None:
            reason = self._read.get(id(linear))
        if reason is not None or name is None or linear is None:
            kind = str(self._dtype).removeprefix("torch.")
            self._notes[f"quantised weights are dequantised to {kind}: {reason}"] += 1
            self.tensors[stored.target] = Lazy(stored, self._files, self._device, self._dtype)
            return
        if (linear.out_features, linear.in_features) != (stored.outputs, stored.inputs):
            raise CheckpointError(
                f"weights of {self._source.name!r} have other shapes than its config: {stored.name} is "
                f"{[stored.outputs, stored.inputs]}, the config says {[linear.out_features, linear.in_features]}"
            )
        self.apart[name] = _stored_reader(stored, self._files)

    def add_experts(self, stored: Mapping[str, Stored]) -> set[str]:
        """Run experts as they are stored where their module computes what our op does; the names of those."""
        taken: set[str] = set()
        for name, each in stored.items():
            place = self._places.of(each.target)
            if not isinstance(each.scheme, Experts) or place is None or not place.endswith(".gate_up_proj"):
                continue
            down = stored.get(f"{name.removesuffix('gate_up_proj')}down_proj")
            owner = place.removesuffix(".gate_up_proj")
            if down is None or not isinstance(down.scheme, Experts) or probe(self._model.get_submodule(owner)) is None:
                continue
            self.experts[owner] = _experts_reader(each, down, self._files)
            taken |= {name, down.name}
        for prefix, experts in find_experts(stored).items():
            place = self._places.of(f"{prefix}.gate_up_proj")
            if place is None:
                continue
            owner = place.removesuffix(".gate_up_proj")
            module = self._model.get_submodule(owner)
            form, sizes = probe(module), sizes_of(module)
            # As transformers joins them: all gates come first. It has no rule for biases of single experts.
            if (
                form is None
                or form.interleaved
                or sizes is None
                or module._parameters.get("gate_up_proj_bias") is not None
            ):
                continue
            reader = experts_reader(experts, sizes, self._files, self._dtype)
            if isinstance(reader, str):
                self._notes[f"a layer's experts are dequantised: {reader}"] += 1
                continue
            self.experts[owner] = reader
            taken |= {each.name for expert in experts for each in expert}
        return taken

    def make(self, kind: str) -> None:
        """Quantise projections while they are read (`quantisable`)."""
        experts = sum(1 for name, tensor in self._places.expected.items() if ".experts." in name and tensor.dim() == 3)
        if experts:
            self._notes["experts' weights are not quantised: transformers' code multiplies them itself"] += experts
        names = {self._places.of(name): name for name in self.tensors}
        for name in quantisable(self._model):
            stored = names.get(f"{name}.weight")
            if stored is None:
                self._notes[f"projections are not quantised: the files have none of their names ({_last(name)})"] += 1
                continue
            self.apart[name] = self._maker(name, self.tensors.pop(stored), stored, kind)

    def make_head(self, head: str, kind: str) -> None:
        """Quantise the head while it is read; a tied one is a copy of the embedding, which stays as it is."""
        names = {self._places.of(name): name for name in self.tensors}
        stored = names.get(f"{head}.weight")
        if stored is not None:
            self.apart[head] = self._maker(head, self.tensors.pop(stored), stored, kind)
            return
        embedding = self._model.get_input_embeddings()
        shared = next((name for name, module in self._model.named_modules() if module is embedding), "")
        stored = names.get(f"{shared}.weight")
        if stored is None or not getattr(self._model.config, "tie_word_embeddings", False):
            self._notes["the head is not quantised: the files have no weight of its name"] += 1
            return
        self.apart[head] = self._maker(head, self.tensors[stored], stored, kind)

    def _maker(self, place: str, tensor: Any, name: str, kind: str) -> Reader:
        file = self._files.places.get(name)

        def read(device: torch.device, dtype: torch.dtype) -> QuantisedWeight:
            values: Tensor = tensor[...].to(device)
            try:
                weight = quantise(values, kind, dtype)
            except ValueError as error:
                raise CheckpointError(f"{file}: {name!r} cannot be quantised: {error}") from None
            self.errors[place] = relative_error(weight, values)
            return weight

        return read


def _experts_reader(gate_up: Stored, down: Stored, files: TensorFiles) -> ExpertsReader:
    def part(one: Stored, device: torch.device) -> Projection:
        assert isinstance(one.scheme, Experts)
        return one.scheme.packed(one.tensors(files, device))

    def read(device: torch.device) -> PackedWeights:
        return PackedWeights(part(gate_up, device), part(down, device), "mxfp4", Block(1, 32))

    return read


def _stored_reader(stored: Stored, files: TensorFiles) -> Reader:
    def read(device: torch.device, dtype: torch.dtype) -> QuantisedWeight:
        weight = stored.read(files, device, dtype)
        assert isinstance(weight, QuantisedWeight)
        return weight

    return read


def _last(name: str) -> str:
    return name.rpartition(".")[2]
