"""What each attention call of a model sees, found by running a copy of it without weights.

transformers hands the function that is registered for masks the predicate itself (`mask_function(batch, head, q, kv)`).
So one is registered under the probe's name, beside an attention function: the model prepares its masks with its own
code, and the probe notes which predicate reaches which attention module, and with which options. No name of a model
and no field of a config is trusted for it.

The copy's parameters lie on the meta device, so that a probe takes no memory and no time of the model's size, and the
user's module is neither run nor changed. Values that do not depend on weights (token ids, positions, masks) stay
real; where they meet weights, they become meta tensors too (`_Weightless`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import causal_mask_function

from hybridgen.errors import UnsupportedModelError
from hybridgen.models.counting import counts_tokens
from hybridgen.models.interface import configs_of
from hybridgen.models.latent import check_latents
from hybridgen.models.mixers import check_mixers
from hybridgen.models.rope import check_ropes
from hybridgen.models.text_part import TextPart, as_text_part
from hybridgen.models.torch_functions import torch_alone
from hybridgen.models.visibility import Predicate, UnknownMaskError, Visibility, read_visibility

PROBE_NAME = "hybridgen_probe"
TOKENS = 29
"""In a probe's forward pass; a number that no size of a model is likely to have."""

_LARGEST_ZEROS = 2**29
"""Elements of the largest tensor of a model that is probed with zeros, which matrix products copy one at a time."""

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("hooks"))
_IGNORED = frozenset(
    {
        "dropout",  # 0 in evaluation mode
        "sliding_window",  # the mask says what is seen; of transformers' functions, only flash attention reads this
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "logits_to_keep",
    }
)  # fmt: skip
"""Arguments of an attention call that change nothing in what it computes here."""


class ProbedCall(NamedTuple):
    """One attention call, in the order of the forward pass."""

    name: str
    """The attention module's name in the model."""
    sees: Visibility
    latent: bool = False
    """Whether it caches latents."""


class AttentionOptions(NamedTuple):
    """What an attention module hands to its function besides tensors."""

    scale: float
    softcap: float
    """0 for none."""
    sinks: bool


def read_options(name: str, query: Tensor, key: Tensor, kwargs: Mapping[str, Any]) -> AttentionOptions:
    """The options of an attention call.

    Raises:
        UnsupportedModelError: one of them is unknown here, or heads do not divide.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise UnsupportedModelError(
            f"{name} has {heads} attention heads over {kv_heads} key/value heads; num_attention_heads must be a "
            "multiple of num_key_value_heads"
        )
    known = {"scaling", "softcap", "s_aux", "is_causal"}
    others = sorted(n for n, value in kwargs.items() if n not in _IGNORED | known and not _is_nothing(value))
    if others:
        raise UnsupportedModelError(
            f"{name} hands its attention function {', '.join(others)}, which hybridgen's attention does not know"
        )
    if kwargs.get("is_causal") is False:
        raise UnsupportedModelError(f"{name} asks for attention that is not causal (is_causal=False)")
    values = {n: kwargs.get(n) for n in ("scaling", "softcap")}
    for option, value in values.items():
        if isinstance(value, Tensor):
            raise UnsupportedModelError(f"{name} gives {option} as a tensor; hybridgen's attention takes a number")
    scale, softcap = values["scaling"], values["softcap"]
    if softcap is not None and not softcap:
        raise UnsupportedModelError(f"{name} caps its scores at {softcap}, and divides by that; null is no cap")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    # tanh is odd: a cap below zero is the one above.
    return AttentionOptions(scale, abs(float(softcap or 0.0)), kwargs.get("s_aux") is not None)


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (tuple, dict, list)) and not value)


def probe_config(
    hf_config: PreTrainedConfig, context: int, model_class: type[PreTrainedModel] | None = None
) -> tuple[ProbedCall, ...]:
    """`probe_model` for a model of this config, built on the meta device: before any weight is read.

    Raises:
        UnsupportedModelError: see `probe_model`.
    """
    try:
        with torch.device("meta"):
            if model_class is None:
                model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), trust_remote_code=False)
            else:
                model = model_class._from_config(copy.deepcopy(hf_config))
    except Exception as error:  # a constructor is any code; what it cannot build, nothing can run
        advice = "install what it asks for" if isinstance(error, ImportError) else "correct the config"
        raise UnsupportedModelError(
            f"a model of this config cannot be built: {type(error).__name__}: {' '.join(str(error).split())}; {advice}"
        ) from error
    model = as_text_part(model.eval())
    check_interface(model)
    check_ropes(model)
    return probe_model(model, context)


def check_interface(model: PreTrainedModel) -> None:
    """Raise if a model does not look its attention function up.

    Raises:
        UnsupportedModelError: it does not.
    """
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{kind_of(model)} does not attend through Hugging Face's attention interface, so hybridgen cannot put its "
            "paged cache under it"
        )


def kind_of(model: PreTrainedModel) -> str:
    """The name of a model's class, as its owner knows it."""
    return type(model.whole if isinstance(model, TextPart) else model).__name__


def probe_model(model: PreTrainedModel, context: int) -> tuple[ProbedCall, ...]:
    """What the attention calls of a model see, in their order.

    The model itself is not run; hooks and replaced `forward`s of its modules are left out of the copy that is.

    Args:
        context: the longest sequence that will be run.

    Raises:
        UnsupportedModelError: a module keeps a state in a way that is not known here, an attention module is used
            twice, or sees more or other positions than the kernels
            can run, or is called in a way that is not known here.
    """
    kind = kind_of(model)
    check_mixers(model)
    latents = set(check_latents(model))
    recorder = _run(model)
    check_distinct(kind, [call.name for call in recorder.calls])
    read: dict[tuple[int, int, str], Visibility] = {}
    result = []
    for call in recorder.calls:
        same = id(call.mask), call.heads, call.not_causal
        if same not in read:
            try:
                read[same] = _visibility(call, context)
            except UnknownMaskError as error:
                raise UnsupportedModelError(f"{kind} cannot run here, because of {call.name}: {error}") from error
        result.append(ProbedCall(call.name, read[same], model.get_submodule(call.name) in latents))
    return tuple(result)


def _run(model: PreTrainedModel) -> _Recorder:
    """Run a copy without weights; a copy of zeros where the code needs values, such as sizes that it computes.

    Raises:
        UnsupportedModelError: neither runs, or the model numbers its tokens itself.
    """
    kind = kind_of(model)
    for meta in (True, False):
        recorder = _Recorder()
        weightless = _copy_without_weights(model, recorder, meta)
        mode = _Weightless()
        for module in weightless.modules():
            if counts_tokens(module):
                module.forward = partial(_counting, mode, module.forward)  # type: ignore[method-assign]
        ids, positions = torch.zeros(1, TOKENS, dtype=torch.long), torch.arange(TOKENS)[None]
        try:
            with torch.no_grad(), torch_alone(weightless), mode:
                weightless(input_ids=ids, position_ids=positions, use_cache=False)
        except UnsupportedModelError:
            raise
        except Exception as error:  # a model's forward is any code
            if not meta or _largest(model) > _LARGEST_ZEROS:
                raise UnsupportedModelError(
                    f"{kind} cannot be probed for what its attention sees: its forward raises {type(error).__name__}: "
                    f"{error}"
                ) from error
            continue
        break
    if mode.counted:
        raise UnsupportedModelError(
            f"{kind} numbers the tokens of a call itself (torch.arange over them) instead of taking their positions; "
            "hybridgen packs tokens of several requests into one call"
        )
    return recorder


def _counting(mode: _Weightless, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module whose numbers will be given to it (`models.counting`); the probe's are those that it counts."""
    counted = mode.counted
    result = own(*args, **kwargs)
    mode.counted = counted
    return result


def _largest(model: nn.Module) -> int:
    return max((parameter.numel() for parameter in model.parameters()), default=0)


def check_distinct(kind: str, names: list[str]) -> None:
    """Raise if one attention module is called twice in a forward pass.

    Raises:
        UnsupportedModelError: it is; keys and values of the two depths would share a place in the cache.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UnsupportedModelError(
            f"{kind} uses {twice[0]} {names.count(twice[0])} times in one forward pass, at different depths; each "
            "needs keys and values of its own. Copy the layer (copy.deepcopy) for each place"
        )


class _Mask(NamedTuple):
    predicate: Predicate
    vmapped: bool
    tensor: Tensor
    """What the model got for it; kept, so that its id stays its own."""


class _Call(NamedTuple):
    name: str
    heads: int
    mask: _Mask | None
    not_causal: str
    """What else says that it is not causal; empty if nothing does."""


def _visibility(call: _Call, context: int) -> Visibility:
    if call.not_causal:
        raise UnknownMaskError(f"its attention is not causal ({call.not_causal})")
    if call.mask is None:
        raise UnknownMaskError("it attends without a mask, or with one that transformers' mask functions did not make")
    _lengthen(call.mask.predicate, context)
    return read_visibility(call.mask.predicate, context, call.heads, call.mask.vmapped)


def _lengthen(predicate: Any, context: int) -> None:
    """Let what a predicate keeps of the probe's tokens stand for a text of any length.

    A multimodal model's predicate looks each position up in a tensor that says which image it belongs to. One value for
    all of the probe's tokens, which are text, is every text's.
    """
    for cell in getattr(predicate, "__closure__", None) or ():
        kept = cell.cell_contents
        if isinstance(kept, Tensor) and kept.shape == (1, TOKENS) and not kept.is_meta and len(kept.unique()) == 1:
            cell.cell_contents = kept[:, :1].expand(1, context)
        for inner in kept if isinstance(kept, tuple) else (kept,):
            if inspect.isfunction(inner):
                _lengthen(inner, context)


@dataclass
class _Recorder:
    """What the registered functions note; hangs on the copy's attention modules and configs."""

    names: dict[nn.Module, str] = field(default_factory=dict)
    """By the copy's modules."""
    masks: dict[int, _Mask] = field(default_factory=dict)
    """By the id of their tensor."""
    calls: list[_Call] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recorder:
        return self

    def mask(self, predicate: Predicate, vmapped: bool, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.ones(shape, dtype=torch.bool)
        self.masks[id(tensor)] = _Mask(predicate, vmapped, tensor)
        return tensor

    def call(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> None:
        name = self.names[module]
        read_options(name, query, key, kwargs)
        not_causal = "is_causal=False" if getattr(module, "is_causal", True) is False else ""
        self.calls.append(_Call(name, query.shape[1], self._origin(mask), not_causal))

    def _origin(self, mask: Any) -> _Mask | None:
        found = self.masks.get(id(mask))
        if found is None and isinstance(mask, Tensor) and mask._base is not None and mask._base.shape == mask.shape:
            found = self.masks.get(id(mask._base))  # a slice that is the whole
        return found


def _probe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *_: Any,
    mask_function: Predicate = causal_mask_function,
    use_vmap: bool = False,
    config: PreTrainedConfig | None = None,
    **__: Any,
) -> Tensor:
    """Registered as a mask function of transformers: notes the predicate, and gives a tensor that stands for it."""
    recorder: _Recorder = vars(config)["_hybridgen_recorder"]
    return recorder.mask(mask_function, use_vmap, (batch_size, 1, q_length, kv_length))


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Registered as an attention function of transformers: notes the call, and gives an output of the right shape."""
    recorder: _Recorder = vars(module)["_hybridgen_recorder"]
    recorder.call(module, query, key, attention_mask, kwargs)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(PROBE_NAME, _probe_attention)
AttentionMaskInterface.register(PROBE_NAME, _probe_mask)


def _copy_without_weights(model: PreTrainedModel, recorder: _Recorder, meta: bool) -> PreTrainedModel:
    """A copy of the module tree with the probe as its attention function.

    Args:
        meta: its tensors are on the meta device, but for tables of embeddings; else all are zeros on the CPU.
    """
    memo: dict[int, Any] = {}
    originals = dict(model.named_modules(remove_duplicate=False))
    for module in originals.values():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _stand_in(tensor, meta and not isinstance(module, nn.Embedding))
        for name in _HOOKS:
            memo[id(vars(module)[name])] = type(vars(module)[name])()
        forward = vars(module).get("forward")
        if forward is not None:
            memo[id(forward)] = None
    duplicate = copy.deepcopy(model, memo)
    copies = dict(duplicate.named_modules(remove_duplicate=False))
    for name, module in originals.items():
        if "forward" in vars(module):  # from Python 3.14 on functions are copied as they are, whatever `memo` says
            copies[name].__dict__.pop("forward", None)
    recorder.names = {module: name for name, module in reversed(list(duplicate.named_modules(remove_duplicate=False)))}
    for module in duplicate.modules():
        vars(module)["_hybridgen_recorder"] = recorder
        for config in configs_of(module):
            vars(config)["_hybridgen_recorder"] = recorder
            config._attn_implementation = PROBE_NAME
            if hasattr(config, "_experts_implementation"):
                # The others have kernels that refuse some dtypes on the meta device.
                config._experts_implementation = "eager"
    return duplicate.eval()


def _stand_in(tensor: Tensor, meta: bool) -> Tensor:
    """A tensor of this shape and dtype that takes no memory: on the meta device, or zeros.

    Embedded tokens are real zeros, because masks are made for their device and must be evaluated.
    """
    if meta:
        result = torch.empty_like(tensor, device="meta", requires_grad=False)
    else:
        result = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(result, requires_grad=False) if isinstance(tensor, nn.Parameter) else result


class _Weightless(TorchDispatchMode):
    """Lets real tensors meet meta tensors: the result is on the meta device.

    Where a model asks for a value that depends on weights (which tokens an expert gets), it is told: none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted = False
        """Whether the model numbered the tokens of the call itself."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        tree_map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        if not any(tensor.is_meta for tensor in tensors):
            result = func(*args, **kwargs)
            self.counted |= func.overloadpacket is _aten.arange and result.numel() == TOKENS
            return result
        instead = _WITHOUT_VALUES.get(func)
        if instead is not None:
            return instead(*args)

        def meta(value: Any) -> Any:
            if isinstance(value, torch.device):  # in inference mode `to` comes as it was called, with its device
                return torch.device("meta")
            is_real = isinstance(value, Tensor) and not value.is_meta
            return torch.empty_like(value, device="meta") if is_real else value

        return func(*tree_map(meta, args), **tree_map(meta, kwargs))


_aten: Any = torch.ops.aten
_WITHOUT_VALUES: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: lambda tensor: torch.zeros((), dtype=tensor.dtype).item(),
    _aten.nonzero.default: lambda tensor: tensor.new_empty((0, tensor.dim()), dtype=torch.long),
    _aten.equal.default: lambda *_: False,
}
