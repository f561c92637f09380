"""What an EAGLE-3 head computes, in PyTorch's operators; `fused.chain.draft_head` is held to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hybridgen.loading.eagle import HeadShape
from hybridgen.models.quantised import product
from hybridgen.models.rounding import quantise
from hybridgen.models.weights import DenseWeight, Weight


class EagleHead(nn.Module):
    """The weights of a head, and what they compute."""

    hidden_norm: Tensor
    input_layernorm: Tensor
    post_attention_layernorm: Tensor
    norm: Tensor
    embedding: Tensor | None
    ids: Tensor | None
    """The model's ids that it can draft; None: each is its own."""
    inverse_frequencies: Tensor
    rotary_scale: Tensor

    def __init__(
        self, shape: HeadShape, weights: dict[str, Tensor], rotary: LlamaRotaryEmbedding, *, fp8: bool = False
    ) -> None:
        """
        Args:
            weights: by the names of `loading.eagle.read_head`; they are emptied into the head.
            rotary: gives the frequencies.
            fp8: keep the matrices but the embedding as FP8 codes with a scale for each output.
        """
        super().__init__()
        self.shape = shape
        self.dtype = weights["fc.weight"].dtype
        self.weights: dict[str, Weight] = {}
        """`fc`, `qkv`, `out`, `gate_up`, `down` and `lm_head`."""

        def keep(name: str, *parts: str) -> None:
            value = torch.cat([weights.pop(part) for part in parts]) if len(parts) > 1 else weights.pop(parts[0])
            if value.dim() == 2 and fp8 and name != "embedding":
                coded = quantise(value, "fp8", value.dtype)
                self.register_buffer(name, coded.data)
                self.register_buffer(f"{name}_scales", coded.scales)
                self.weights[name] = coded
                return
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
            if value.dim() == 2:
                self.weights[name] = DenseWeight(value)

        keep("fc", "fc.weight")
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            keep(name, f"layer.{name}.weight")
        keep("qkv", *(f"layer.self_attn.{each}_proj.weight" for each in "qkv"))
        keep("out", "layer.self_attn.o_proj.weight")
        keep("gate_up", "layer.mlp.gate_proj.weight", "layer.mlp.up_proj.weight")
        keep("down", "layer.mlp.down_proj.weight")
        keep("norm", "norm.weight")
        keep("lm_head", "lm_head.weight")
        if "embed_tokens.weight" in weights:
            keep("embedding", "embed_tokens.weight")
        else:
            self.register_parameter("embedding", None)
        self.register_buffer("ids", weights.pop("ids", None))
        device = self.norm.device
        self.register_buffer("inverse_frequencies", rotary.inv_freq.to(device))
        scale = torch.full_like(rotary.inv_freq, float(rotary.attention_scaling))
        self.register_buffer("rotary_scale", scale.to(device))

    def joined(self, states: Tensor) -> Tensor:
        """The model's hidden states [..., 3 * H of the model] as one [..., H]."""
        return product(states, self.weights["fc"])

    def around(self, hidden: Tensor) -> Tensor:
        """What goes around attention, [T, H]."""
        return self._normed(hidden, self.hidden_norm) if self.shape.norm_before_residual else hidden

    def projected(self, embedded: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, heads, D], keys and values [T, kv_heads, D] of pairs, rotated.

        Args:
            embedded, hidden: [T, H].
            positions: int64 [T].
        """
        shape = self.shape
        pair = torch.cat((self._normed(embedded, self.input_layernorm), self._normed(hidden, self.hidden_norm)), dim=-1)
        heads = product(pair, self.weights["qkv"]).view(len(pair), -1, shape.head_dim)
        rotated, values = heads.split([shape.heads + shape.kv_heads, shape.kv_heads], dim=1)
        cos, sin = self.turns(positions[:, None])
        first, second = rotated.float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(pair.dtype)
        queries, keys = turned.split([shape.heads, shape.kv_heads], dim=1)
        return queries.contiguous(), keys.contiguous(), values.contiguous()

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., D / 2] of positions, any integers [...], times the rotary scale."""
        angles = positions[..., None] * self.inverse_frequencies
        return angles.cos() * self.rotary_scale, angles.sin() * self.rotary_scale

    def finished(self, attended: Tensor, around: Tensor) -> Tensor:
        """The rest of the layer, from what attention gave [T, heads, D]: [T, H], the state of the next draft."""
        hidden = self._added(around, attended.flatten(1), "out")
        normed = self._normed(hidden, self.post_attention_layernorm)
        gate, up = product(normed, self.weights["gate_up"]).chunk(2, dim=-1)
        return self._added(hidden, silu(gate) * up, "down")

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, draft vocabulary]."""
        return product(self._normed(hidden, self.norm), self.weights["lm_head"])

    def spread(self, logits: Tensor) -> Tensor:
        """[T, vocabulary of the model], -inf for ids that it cannot draft."""
        if self.ids is None:
            return logits
        whole = logits.new_full((len(logits), self.shape.vocab), -torch.inf)
        return whole.index_copy_(1, self.ids, logits)

    def named(self, columns: Tensor) -> Tensor:
        """The model's ids of columns of the logits; what is below 0 stays so."""
        if self.ids is None:
            return columns
        return torch.where(columns < 0, columns, self.ids[columns.clamp(min=0)])

    def _added(self, hidden: Tensor, x: Tensor, name: str) -> Tensor:
        weight = self.weights[name]
        if isinstance(weight, DenseWeight):
            return torch.addmm(hidden, x, weight.values.T)
        return hidden + product(x, weight)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, (self.shape.hidden,), weight, self.shape.eps)
