"""What a Llama-like decoder computes, read off a Hugging Face model and checked against it.

The fused decode steps need to know the model as data: which weights, which norms, which multipliers. `describe()`
collects that by the attribute names that Hugging Face's Llama-like families share, and `check()` decides whether the
result is the model: every layer's own forward is compared with `reference.layer` on the same input. No list of
families is kept; a family whose layers compute something else is found out by the comparison and runs the generic way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridgen.device.program import Unfit as Unfit
from hybridgen.device.watched import has_hooks
from hybridgen.models.rope import LENGTH_DEPENDENT
from hybridgen.models.share import QuantisedShareLinear, Share, ShareLinear
from hybridgen.models.sites import AttentionSite
from hybridgen.models.weights import (
    DenseWeight,
    NotJoinedError,
    SeparateWeights,
    Weight,
    WeightError,
    WeightProvider,
)


@dataclass(frozen=True, slots=True)
class Norm:
    """`x / sqrt(mean(x^2) + eps) * scale`."""

    scale: Tensor
    """float32 [width]; what the module multiplies by, a Gemma norm's 1 + weight too."""
    eps: float
    source: Tensor | None = None
    """The module's parameter, which `scale` was made from."""
    shift: float = 0.0
    """What was added to it."""


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight.T + bias`."""

    weight: Weight
    bias: Tensor | None = None
    """[out]."""
    parts: tuple[Linear, ...] = ()
    """Projections of the same input that are not joined, in the order of their outputs. `weight` is all of theirs, and
    they have the biases: all of them, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One layer: `x += residual * after_attention(attention(before_attention(x)))`, then the same with the MLP."""

    before_attention: Norm | None
    qkv: Linear
    """Rows of all query heads, then of all key heads, then of all value heads."""
    query_norm: Norm | None
    """Over each head, or over all of them where its width says so (OLMo 2)."""
    key_norm: Norm | None
    rotates: bool
    """Whether queries and keys are rotated by position."""
    attention_scale: float
    window: int
    """Positions seen, the own one included; 0 for all."""
    out: Linear
    after_attention: Norm | None
    before_mlp: Norm | None
    gate_up: Linear
    """Rows of the gate, then of the up projection."""
    down: Linear
    after_mlp: Norm | None
    residual: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A Llama-like model."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    activation: str
    """`silu` or `gelu_tanh`, of the gate."""
    embedding: Tensor
    """[vocab, hidden], the model's own storage."""
    embedding_scale: float
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    head: Linear
    logits_scale: float
    rotary: tuple[Tensor, Tensor] | None
    """cos and sin, float32 [max_context, head_dim / 2]: the two halves of a head are rotated against each other."""
    max_context: int
    """Positions that the model may be run at."""
    dtype: torch.dtype
    share: Share | None = None
    """The other ranks, where this is a rank's share: heads, the intermediate size and the vocabulary are its own then,
    and what `out` and `down` give, before their biases, is added up over the ranks."""

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms."""
        found = [self.norm]
        for layer in self.layers:
            of_layer = (layer.before_attention, layer.query_norm, layer.key_norm, layer.after_attention)
            found += [norm for norm in (*of_layer, layer.before_mlp, layer.after_mlp) if norm is not None]
        return tuple(found)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All projections, the head last."""
        layers = (linear for x in self.layers for linear in (x.qkv, x.out, x.gate_up, x.down))
        return (*layers, self.head)

    @property
    def separate(self) -> bool:
        """Whether projections that read the same input lie apart in some layer, as a live module's do."""
        return any(layer.qkv.parts or layer.gate_up.parts for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that one step reads: every projection and the head, once each."""
        return sum(linear.weight.bytes_read for linear in self.linears)


def dense(linear: Linear) -> Tensor:
    """The weight [out, in] of a projection, for a kernel that takes dense ones.

    Raises:
        Unfit: it is stored in another format, or made of parts.
    """
    if linear.parts:
        raise Unfit("projections that read the same input are not joined")
    if not isinstance(linear.weight, DenseWeight):
        raise Unfit(f"a weight is {linear.weight.format}; dense ones are fused")
    return linear.weight.values


def dense_parts(linear: Linear) -> list[Tensor]:
    """The weights [out of each, in] of a projection's parts, for a kernel that takes each where it is; of one that has
    none its whole weight.

    Raises:
        Unfit: they are stored in another format.
    """
    return [dense(part) for part in linear.parts or (linear,)]


def cut(linear: Linear, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor | None]]:
    """Weights [size, in] and biases [size] of so many outputs each, where they are, whether they are joined or not.

    Args:
        sizes: outputs of each part, all of the projection's together.

    Raises:
        Unfit: they are stored in another format.
    """
    if linear.parts:
        return [(dense(part), part.bias) for part in linear.parts]
    biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(list(sizes))
    return list(zip(dense(linear).split(list(sizes)), biases, strict=True))


_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


def describe(
    model: PreTrainedModel,
    sites: Sequence[AttentionSite],
    weights: WeightProvider,
    max_context: int,
    share: Share | None = None,
) -> Decoder:
    """Read a model's structure.

    Args:
        sites: its attention modules, as `models.bind` found them.
        weights: gives its projections' weights, by the names of its modules.
        max_context: positions that it may be run at.
        share: the other ranks, where the model is a rank's share.

    Raises:
        Unfit: a part is missing or of another kind; `check()` must still confirm the rest.
    """
    if not sites:
        raise Unfit("it has no layers")
    for name, module in model.named_modules():
        if "forward" in vars(module) or has_hooks(module):
            raise Unfit(f"{name or 'the model'} has hooks or a replaced forward")
        if share is None and isinstance(module, ShareLinear):
            raise Unfit(f"{name} has a part of its weight, and the other ranks are not known")
        if isinstance(module, QuantisedShareLinear):
            raise Unfit(f"{name} has a part of a quantised weight")
    base = model.base_model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or head is None:
        raise Unfit("its embedding is not a plain nn.Embedding, or it has no head")
    projections = _Projections(weights, {module: name for name, module in model.named_modules()})
    last = projections.of(head)
    if last.bias is not None:
        raise Unfit("its head has a bias")
    config: Any = model.config
    # A rank's part of a head says how many ids all of it has.
    if getattr(head, "vocab_size", last.weight.shape[0]) < embedding.num_embeddings:
        raise Unfit("its head cannot give all ids that it takes")
    if getattr(config, "final_logit_softcapping", None):
        raise Unfit("its logits are soft-capped")
    shapes = {site.shape for site in sites}
    if len(shapes) > 1 or any(shape.key_dim != shape.value_dim for shape in shapes):
        raise Unfit("its layers differ in their heads, or keys and values in their size")
    (shape,) = shapes
    layers = tuple(_layer(site, projections) for site in sites)
    first = layers[0]
    hidden, intermediate = first.out.weight.shape[0], first.down.weight.shape[1]
    head_dim = shape.key_dim
    heads = first.out.weight.shape[1] // head_dim
    for layer in layers:
        _check_shapes(layer, hidden, heads, shape.num_kv_heads, head_dim, intermediate)
    activations = {_activation(site.layer) for site in sites}
    if len(activations) > 1:
        raise Unfit("its layers differ in their activation")
    rotates = any(layer.rotates for layer in layers)
    linears = (last, *(linear for x in layers for linear in (x.qkv, x.out, x.gate_up, x.down)))
    dtypes = {embedding.weight.dtype, *(linear.weight.format.dtype for linear in linears)}
    if len(dtypes) > 1:
        raise Unfit(f"its weights have several dtypes ({', '.join(sorted(map(str, dtypes)))})")
    with torch.inference_mode():
        return Decoder(
            hidden=hidden,
            heads=heads,
            kv_heads=shape.num_kv_heads,
            head_dim=head_dim,
            intermediate=intermediate,
            vocab=last.weight.shape[0],
            activation=activations.pop(),
            embedding=embedding.weight,
            embedding_scale=_embedding_scale(embedding, config),
            layers=layers,
            norm=norm_of(_module(base, "norm"), hidden),
            head=last,
            logits_scale=1 / float(getattr(config, "logits_scaling", 1.0) or 1.0),
            rotary=_rotary(base, head_dim, max_context) if rotates else None,
            max_context=max_context,
            dtype=last.weight.format.dtype,
            share=share,
        )


class _Projections(NamedTuple):
    """Projections of a model, from where its weights come from."""

    weights: WeightProvider
    names: dict[nn.Module, str]

    def of(self, *modules: nn.Module) -> Linear:
        """One projection, or several in this order: with one weight if they share it, else made of parts."""
        names = [self.names[module] for module in modules]
        try:
            return Linear(self.weights.get(names), self.weights.bias(names))
        except NotJoinedError as error:
            return self._separate([self.of(module) for module in modules], error)
        except WeightError as error:
            raise Unfit(str(error)) from error

    def _separate(self, parts: list[Linear], error: NotJoinedError) -> Linear:
        weights = tuple(part.weight for part in parts if isinstance(part.weight, DenseWeight))
        if len(weights) < len(parts):
            raise Unfit(str(error)) from error
        if len({(weight.values.dtype, weight.shape[1]) for weight in weights}) > 1:
            raise Unfit(f"{error}, and differ in their dtypes or inputs") from error
        if len({part.bias is None for part in parts}) > 1:
            raise Unfit(f"{error}, and only some have a bias") from error
        return Linear(SeparateWeights(weights), parts=tuple(parts))

    def joined(self, parent: nn.Module, names: tuple[str, ...], whole: str) -> Linear:
        """A projection of several members, in this order: joined by us, by the model itself, or not at all."""
        names = (whole,) if hasattr(parent, whole) else names
        return self.of(*(_module(parent, name) for name in names))


def _layer(site: AttentionSite, projections: _Projections) -> DecoderLayer:
    layer, attention = site.layer, site.module
    if site.options.softcap or site.options.sinks:
        raise Unfit("its attention has a soft cap or sinks")
    if site.sees.chunk:
        raise Unfit("it attends within chunks")
    mlp = _module(layer, "mlp")
    gemma = hasattr(layer, "pre_feedforward_layernorm")
    before = getattr(layer, "input_layernorm", None)
    after = _module(layer, "post_attention_layernorm")
    closing = getattr(layer, "post_feedforward_layernorm", None)
    # Llama calls the norm before its MLP "post attention"; Gemma and OLMo 2 have one on attention's output, too.
    norms_output = gemma or closing is not None
    out = projections.of(_module(attention, "o_proj"))
    width = out.weight.shape[0]
    return DecoderLayer(
        before_attention=None if before is None else norm_of(before, width),
        qkv=projections.joined(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        query_norm=head_norm(attention, "q_norm"),
        key_norm=head_norm(attention, "k_norm"),
        rotates=bool(getattr(attention, "use_rope", True)),
        attention_scale=site.options.scale,
        window=site.sees.window,
        out=out,
        after_attention=norm_of(after, width) if norms_output else None,
        before_mlp=norm_of(_module(layer, "pre_feedforward_layernorm"), width)
        if gemma
        else None
        if norms_output
        else norm_of(after, width),
        gate_up=projections.joined(mlp, ("gate_proj", "up_proj"), "gate_up_proj"),
        down=projections.of(_module(mlp, "down_proj")),
        after_mlp=None if closing is None else norm_of(closing, width),
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def _check_shapes(layer: DecoderLayer, hidden: int, heads: int, kv_heads: int, head_dim: int, width: int) -> None:
    expected = {
        "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
        "out": (hidden, heads * head_dim),
        "gate_up": (2 * width, hidden),
        "down": (hidden, width),
    }
    for name, shape in expected.items():
        weight = getattr(layer, name).weight
        if weight.shape != shape:
            raise Unfit(f"a {name} weight has the shape {weight.shape} where {shape} was expected")
        if not all(tensor.is_contiguous() for tensor in weight.tensors().values()):
            raise Unfit(f"a {name} weight is not contiguous")
    keys = kv_heads * head_dim
    for name, sizes in (("qkv", [heads * head_dim, keys, keys]), ("gate_up", [width, width])):
        found = [part.weight.shape[0] for part in getattr(layer, name).parts]
        if found and found != sizes:
            raise Unfit(f"the parts of a {name} weight have {found} outputs where {sizes} were expected")


def _module(parent: nn.Module, name: str) -> nn.Module:
    module = getattr(parent, name, None)
    if not isinstance(module, nn.Module):
        raise Unfit(f"a {type(parent).__name__} has no {name}")
    return module


def norm_of(module: nn.Module, width: int) -> Norm:
    """What an RMSNorm multiplies by: its output for a vector whose root mean square is 1."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, (int, float)):
        raise Unfit(f"a {type(module).__name__} has no epsilon")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (width,) or getattr(module, "bias", None) is not None:
        raise Unfit(f"a {type(module).__name__} is not an RMSNorm of {width} values")
    probe = torch.ones(1, 2, width, dtype=weight.dtype, device=weight.device)
    probe[..., ::2] = -1
    with torch.no_grad():
        out = module(probe)[0, 0].float() * probe[0, 0].float()
    plain, shifted = weight.detach().float(), weight.detach().float() + 1
    # Of the two readings, the exact one: the module's own output is rounded to its dtype.
    distance = [(out - scale).abs().max() for scale in (plain, shifted)]
    shift = 0.0 if distance[0] <= distance[1] else 1.0
    scale = (shifted if shift else plain).clone().contiguous()
    return Norm(scale, float(eps), weight.detach(), shift)


def head_norm(attention: nn.Module, name: str) -> Norm | None:
    """A norm over heads, by its name; None where there is none.

    Raises:
        Unfit: it is no RMSNorm.
    """
    module = getattr(attention, name, None)
    if module is None or isinstance(module, nn.Identity):
        return None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise Unfit(f"{name} has no weight")
    return norm_of(module, weight.shape[0])


def _activation(layer: nn.Module) -> str:
    mlp = _module(layer, "mlp")
    function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    name = _ACTIVATIONS.get(type(function).__name__)
    if name is None:
        raise Unfit(f"its activation is {type(function).__name__}; SiLU and tanh-GELU are fused")
    return name


def _embedding_scale(embedding: nn.Embedding, config: Any) -> float:
    scale = getattr(embedding, "embed_scale", None)
    if isinstance(scale, Tensor):  # Gemma rounds it to the weights' dtype
        return float(scale.to(embedding.weight.dtype))
    return float(getattr(config, "embedding_multiplier", 1.0) if scale is None else scale)


def _rotary(base: nn.Module, head_dim: int, max_context: int) -> tuple[Tensor, Tensor]:
    """The rotary table in float32."""
    rotary = _module(base, "rotary_emb")
    kind = getattr(rotary, "rope_type", None)
    if isinstance(kind, dict):
        raise Unfit("its rotary positions differ by layer type")
    if kind in LENGTH_DEPENDENT or hasattr(rotary, "step"):
        raise Unfit(f"its rotary positions depend on the length ({kind})")
    device = cast(Tensor, rotary.inv_freq).device
    positions = torch.arange(max_context, device=device)[None]
    cos, sin = _looked_up(rotary, torch.zeros(1, dtype=torch.float32, device=device), positions)
    half = head_dim // 2
    if cos.shape[-1] != head_dim:
        raise Unfit(f"it rotates {cos.shape[-1]} of {head_dim} dimensions of a head")
    if not torch.equal(cos[..., :half], cos[..., half:]):
        raise Unfit("it rotates neighbouring dimensions, not the halves of a head")
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


def _looked_up(rotary: nn.Module, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of positions [1, T]. Models of images may look up three positions of each token alone (M-RoPE before
    transformers 5.24), and give three tables; of text all three are one."""
    try:
        cos, sin = rotary(like, positions)
    except IndexError:
        cos, sin = rotary(like, positions.expand(3, 1, -1))
    return (cos[0], sin[0]) if cos.dim() == 4 else (cos, sin)
