"""Files of an EAGLE-3 head: a decoder layer trained to draft for one model from that model's own hidden states.

Li, Wei, Zhang and Zhang, arXiv:2503.01840. Heads are published in two layouts: as their authors and SpecForge write
them (the layer is `midlayer`, the config has `draft_vocab_size`), and as the speculators library does (the layer is
`layers.0`, its config a part of the whole). Every tensor is used or refused by its name, before any weight is read.

| tensor | shape | what it is |
|---|---|---|
| fc.weight | [H, 3 * H of the model] | joins the hidden states of three layers |
| *.hidden_norm, *.input_layernorm | [H] | RMS norms of the hidden state, of the embedding |
| *.post_attention_layernorm | [H] | RMS norm of the MLP's input |
| *.self_attn.{q,k,v,o}_proj | [..., 2 * H], o: [H, ...] | attention over both, side by side |
| *.mlp.{gate,up,down}_proj | as a Llama's | |
| norm.weight, lm_head.weight | [H], [draft vocabulary, H] | |
| d2t | [draft vocabulary] | id in the model's vocabulary, less the id in the draft vocabulary |
| t2d | [vocabulary] | whether an id is in the draft vocabulary; it must agree with d2t |
| embed_tokens.weight | [vocabulary, H] | if it is not the model's |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig

from hybridgen.config import EngineConfig
from hybridgen.errors import CheckpointError, UnsupportedModelError
from hybridgen.loading.checks import few, read_header, read_json, validate_directory
from hybridgen.loading.source import Source, load_errors, resolve_source

LAYERS_READ = 3
"""Layers of the model whose hidden states a head reads."""
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_OPTIONAL = frozenset({"d2t", "t2d", "embed_tokens.weight"})


class HeadShape(NamedTuple):
    """What the config of a head says."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    """Ids of the model that it drafts for."""
    draft_vocab: int
    """Ids that it can draft."""
    eps: float
    model_hidden: int
    """Width of that model's hidden states."""
    layers: tuple[int, ...] | None
    """The layers whose inputs it reads; None: those that the paper's heads read."""
    norm_before_residual: bool
    """Whether what goes around attention is the hidden state behind its norm."""


class EagleFiles(NamedTuple):
    """A head whose files were checked."""

    name: str
    shape: HeadShape
    rotary: LlamaConfig
    """What its rotary positions are made of."""
    source: Source
    files: tuple[Path, ...]
    names: Mapping[str, str]
    """Of its tensors: as they are called above, with `layer.` for the layer, to what the files call them."""


def find_head(given: Any, config: EngineConfig) -> EagleFiles | None:
    """The head that a path or a hub id stands for, with its files checked; None where something else is there.

    Raises:
        ModelNotFoundError: there is nothing.
        UnsupportedModelError: it is a head of another kind.
        CheckpointError: its files or its config are broken, or do not fit each other.
    """
    if hasattr(given, "named_parameters"):
        return None
    source = resolve_source(given, config)
    file = source.find("config.json")
    if file is None:
        return None
    raw = read_json(file)
    if not _is_head(source, raw):
        return None
    with load_errors(source, f"the head {source.name!r} cannot be used"):
        shape, rotary = _read_config(source, raw)
        directory = source.fetch_weights(config.allow_pickle, None)
        files = tuple(validate_directory(directory, config.allow_pickle))
        names = _check_tensors(source, shape, _shapes(files))
    return EagleFiles(source.name, shape, rotary, source, files, names)


def read_head(head: EagleFiles, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Its tensors by the names of `EagleFiles.names`: weights in `dtype`; `ids`, int64 [draft vocabulary], in place of
    d2t and t2d, if it cannot draft each id.

    Raises:
        CheckpointError: they cannot be read, or d2t and t2d make no sense.
    """
    with load_errors(head.source, f"the weights of {head.name!r} cannot be read"):
        stored = _stored(head.files, set(head.names.values()))
        own = {name: stored[there] for name, there in head.names.items()}
        ids = _draft_ids(head, own.pop("d2t", None), own.pop("t2d", None))
        read = {name: tensor.to(device, dtype) for name, tensor in own.items()}
    return read if ids is None else read | {"ids": ids.to(device)}


def _is_head(source: Source, raw: Mapping[str, Any]) -> bool:
    kind = raw.get("speculators_model_type")
    architectures = [name for name in raw.get("architectures") or () if isinstance(name, str)]
    if kind == "eagle3" or any("eagle3" in name.lower() for name in architectures):
        return True
    if isinstance(kind, str) or any("eagle" in name.lower() for name in architectures):
        raise UnsupportedModelError(
            f"{source.name!r} is a drafter of the kind {kind or architectures[0]}; heads of EAGLE-3 and whole "
            "models draft here"
        )
    return isinstance(raw.get("draft_vocab_size"), int) and raw.get("num_hidden_layers") == 1


def _read_config(source: Source, raw: Mapping[str, Any]) -> tuple[HeadShape, LlamaConfig]:
    inner = raw.get("transformer_layer_config")
    layer: Mapping[str, Any] = inner if isinstance(inner, dict) else raw

    def refuse(name: str, value: Any, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"the head {source.name!r} has {name}={value!r}; {what}")

    def number(name: str, where: Mapping[str, Any] = layer, default: int | None = None) -> int:
        value = where.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"the config of the head {source.name!r} has {name}={value!r}; a number above 0 is due"
            )
        return value

    for name in ("norm_before_fc", "fc_norm", "norm_output", "mlp_bias", "sliding_window", "use_mtp_layernorm"):
        for where in (raw, layer, _eagle(raw)):
            if where.get(name):
                raise refuse(name, where[name], "hybridgen runs heads without it")
    if layer.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", layer["hidden_act"], "heads with silu run")
    if number("num_hidden_layers", default=1) != 1:
        raise refuse("num_hidden_layers", layer["num_hidden_layers"], "heads of one layer run")
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    vocab = number("vocab_size")
    shape = HeadShape(
        hidden=hidden,
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=max(1, hidden // heads)),
        intermediate=number("intermediate_size"),
        vocab=vocab,
        draft_vocab=number("draft_vocab_size", raw, vocab),
        eps=float(layer.get("rms_norm_eps", 1e-6)),
        model_hidden=number("target_hidden_size", raw, hidden),
        layers=_layer_ids(source, raw),
        norm_before_residual=bool(raw.get("norm_before_residual", False)),
    )
    if shape.heads % shape.kv_heads:
        raise refuse("num_key_value_heads", shape.kv_heads, f"its {heads} heads cannot share so many")
    rope = {name: layer[name] for name in ("rope_theta", "rope_scaling", "rope_parameters") if layer.get(name)}
    rotary = LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=shape.head_dim,
        max_position_embeddings=number("max_position_embeddings", default=2048),
        **rope,
    )
    kind = (rotary.rope_parameters or {}).get("rope_type", "default")
    if kind in _LENGTH_DEPENDENT:
        raise refuse("rope_type", kind, "heads run whose rotary positions do not depend on a request's length")
    return shape, rotary


def _eagle(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = raw.get("eagle_config")
    return inner if isinstance(inner, dict) else {}


def _layer_ids(source: Source, raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The layers whose inputs are read.

    Two readings are in use: `eagle_config` names layers whose outputs are meant (SpecForge, SGLang), speculators writes
    the layers whose inputs are (as vLLM takes them).
    """
    field = "eagle_aux_hidden_state_layer_ids"
    own = _eagle(raw).get(field)
    ids, shift = (own, 1) if own else (raw.get(field), 0)
    if not ids:
        return None
    if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise CheckpointError(f"the config of the head {source.name!r} has {field}={ids!r}; a list of numbers is due")
    if len(ids) != LAYERS_READ:
        raise UnsupportedModelError(f"the head {source.name!r} reads {len(ids)} layers ({ids}); those of 3 run")
    return tuple(i + shift for i in ids)


def _expected(shape: HeadShape) -> dict[str, tuple[int, ...]]:
    hidden, inside = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "fc.weight": (hidden, LAYERS_READ * shape.model_hidden),
        "layer.hidden_norm.weight": (hidden,),
        "layer.input_layernorm.weight": (hidden,),
        "layer.post_attention_layernorm.weight": (hidden,),
        "layer.self_attn.q_proj.weight": (queries, 2 * hidden),
        "layer.self_attn.k_proj.weight": (keys, 2 * hidden),
        "layer.self_attn.v_proj.weight": (keys, 2 * hidden),
        "layer.self_attn.o_proj.weight": (hidden, queries),
        "layer.mlp.gate_proj.weight": (inside, hidden),
        "layer.mlp.up_proj.weight": (inside, hidden),
        "layer.mlp.down_proj.weight": (hidden, inside),
        "norm.weight": (hidden,),
        "lm_head.weight": (shape.draft_vocab, hidden),
        "d2t": (shape.draft_vocab,),
        "t2d": (shape.vocab,),
        "embed_tokens.weight": (shape.vocab, hidden),
    }


def _check_tensors(source: Source, shape: HeadShape, found: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What the files call each tensor, after checking that all are there and no others."""
    expected = _expected(shape)
    names: dict[str, str] = {}
    for there in found:
        name = there.removeprefix("model.")
        for prefix in ("midlayer.", "layers.0."):
            if name.startswith(prefix):
                name = f"layer.{name.removeprefix(prefix)}"
        if name in names:
            raise CheckpointError(f"the head {source.name!r} has both {names[name]} and {there}; one is due")
        names[name] = there
    others = sorted(names[name] for name in names.keys() - expected.keys())
    if others:
        raise UnsupportedModelError(f"the head {source.name!r} has tensors that hybridgen does not use: {few(others)}")
    needed = expected.keys() - _OPTIONAL
    if shape.draft_vocab != shape.vocab:
        needed |= {"d2t"}
    missing = sorted(needed - names.keys())
    if missing:
        lacks = few([name.replace("layer.", "midlayer.") for name in missing])
        raise CheckpointError(
            f"the head {source.name!r} lacks {lacks}; its config and its weights do not belong together, or a "
            "file is incomplete"
        )
    wrong = [
        f"{there} is {list(found[there])}, the config says {list(expected[name])}"
        for name, there in names.items()
        if found[there] != expected[name]
    ]
    if wrong:
        raise CheckpointError(f"tensors of the head {source.name!r} have other shapes than its config: {few(wrong)}")
    return names


def _shapes(files: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            found |= {name: entry.shape for name, entry in read_header(file).items()}
        else:
            found |= {name: tuple(tensor.shape) for name, tensor in _unpickled(file).items()}
    return found


def _stored(files: tuple[Path, ...], wanted: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in wanted & set(opened.keys())}
        else:
            found |= {name: tensor for name, tensor in _unpickled(file).items() if name in wanted}
    return found


def _unpickled(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _draft_ids(head: EagleFiles, offsets: Tensor | None, drafted: Tensor | None) -> Tensor | None:
    """The model's id of each that the head can draft; None: it is the same."""
    shape = head.shape
    if offsets is None:
        return None
    ids = torch.arange(shape.draft_vocab) + offsets.long()
    if int(ids.min()) < 0 or int(ids.max()) >= shape.vocab or len(ids.unique()) < len(ids):
        raise CheckpointError(
            f"d2t of the head {head.name!r} does not give {shape.draft_vocab} different ids from 0 to "
            f"{shape.vocab - 1}; fetch it again"
        )
    if drafted is not None:
        mask = torch.zeros(shape.vocab, dtype=torch.bool).index_fill_(0, ids, True)
        differ = int((mask != drafted.bool()).sum())
        if differ:
            raise CheckpointError(f"d2t and t2d of the head {head.name!r} differ in {differ} ids; fetch it again")
    return None if shape.draft_vocab == shape.vocab and torch.equal(ids, torch.arange(shape.vocab)) else ids
