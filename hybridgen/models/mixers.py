"""Layers that keep a state of one size: short convolutions, gated delta nets, Mamba.

transformers' mixers (as it calls the modules in the place of attention) ask a cache object for the state of their layer
and give it the new one. Here a mixer of the engine's own tree gets such an object for each call (`SlotCache`), over the
pool in `cache.slot_state`; what it computes stays transformers' own code.

- *Decode*: one call with a row for each token, [T, 1, hidden]. It decides nothing on the host, so that it can be
  compiled and recorded.
- *Prefill*: one call for all runs of one length that begin alike, [runs, length, hidden], because rows of a batch end
  together in transformers' functions; but one call for all runs of a gated delta net on CUDA, in 16 bits, where
  `fla-core` is installed (`models.packed`). A mixer whose code begins every run at zeros, as transformers' scan of
  Mamba 1 does, gets later runs of a prompt token by token.

The mixer's class is changed, not its `forward` attribute, so that layers of a kind still share a compiled graph. In the
new class every mixer's `layer_idx` reads 0, where that has been seen to change nothing: code that looks its layer up in
the cache (transformers before 5.24) would be compiled for each layer anew.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import DynamicCache, PreTrainedModel

from hybridgen.cache.slot_state import MixerShapes, MixerTensors, SlotShape
from hybridgen.errors import UnsupportedModelError
from hybridgen.models.attention import Phase, StepMetadata
from hybridgen.models.layer_inputs import LayerInputs
from hybridgen.models.layer_list import layer_around
from hybridgen.models.packed import PackedCache, Runs, packed_forward, rule_for, runs_of
from hybridgen.models.slot_cache import SlotCache
from hybridgen.models.swapped import give_back, made_class
from hybridgen.models.torch_functions import by_torch

_VERBS = frozenset({"update_conv_state", "update_recurrent_state"})
"""What a mixer calls on its cache, by which it is recognised."""
_BATCH = 16384
"""Tokens of a prefill call that a mixer gets at once, at most: what it computes takes memory for each."""
_CACHE_NAMES = ("cache_params", "past_key_values", "past_key_value", "cache")
_NOT_NEEDED = frozenset({"attention_mask", "position_ids", "position_embeddings", "cache_position", "seq_idx"})
"""Arguments of mixers that are None for packed tokens without padding, or that only attention reads."""


def cache_keyword(model: PreTrainedModel) -> str:
    """What the model's forward, and so its `generate`, calls the cache: `cache` from transformers 5.24 on, before that
    what the mixers' models that have nothing else call it, or else `past_key_values`."""
    forward = getattr(model, "whole", model).forward  # a text part hands on what it is given
    names = inspect.signature(forward).parameters
    return next((name for name in ("cache", "cache_params") if name in names), "past_key_values")


class SlotMixer(nn.Module):
    """What the class of every mixer is also, once it reads its state from slots."""


class MixerSite(NamedTuple):
    """One mixer as the probe saw it."""

    module: nn.Module
    layer: nn.Module
    """The decoder layer around it."""
    shapes: MixerShapes
    continues: bool
    """Whether its code begins a run of several tokens at the state from before (`continues_runs`)."""
    alike: bool
    """Whether its code computes the same whatever its layer's index is (`same_in_every_layer`)."""


class MixerBinding:
    """What one mixer needs beyond its inputs; an attribute of the module."""

    __slots__ = ("continues", "convolution", "recurrent", "step")

    def __init__(self, tensors: MixerTensors, step: StepMetadata, continues: bool) -> None:
        """`continues`: see `MixerSite`."""
        self.convolution = tensors.convolution
        self.recurrent = tensors.recurrent
        self.step = step
        self.continues = continues

    def places(self) -> tuple[Tensor, Tensor]:
        """Where the step reads and writes."""
        places = self.step.state_places
        if places is None:
            raise RuntimeError("the step does not say where states are; BoundModel.forward() sets it")
        return places

    def packed_runs(self, device: torch.device) -> Runs:
        """Where the runs of a prefill step lie; made once for all layers whose convolutions keep as much."""
        kernel = 0 if self.convolution is None else self.convolution.shape[-1]
        key = self.step.runs, kernel
        if self.step.packed is None or self.step.packed[0] != key:
            self.step.packed = key, runs_of([length for length, _ in self.step.runs], kernel, device)
        found: Runs = self.step.packed[1]
        return found

    def read(self, places: Tensor, fresh: bool) -> SlotCache:
        """A copy of the states in these places, int64 [B]; `fresh` has none before."""
        convolution, recurrent = self.convolution, self.recurrent
        kernel = 0 if convolution is None else convolution.shape[-1]
        return SlotCache(
            None if fresh or convolution is None else convolution.index_select(0, places),
            None if fresh or recurrent is None else recurrent.index_select(0, places),
            kernel,
            not fresh,
        )

    def write(self, places: Tensor, cache: SlotCache) -> None:
        """Put the states that a mixer left into these places, int64 [B]."""
        for pool, new in ((self.convolution, cache.conv_states[0]), (self.recurrent, cache.recurrent_states[0])):
            if pool is not None:
                pool.index_copy_(0, places, new.to(pool.dtype))


def find_mixers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose own code updates a convolution or recurrent state."""
    for module in model.modules():
        if _VERBS & _names_in(_class_of(module)):
            yield module


def projections_read(model: nn.Module) -> Iterator[nn.Module]:
    """The projections whose weights mixers multiply by themselves: Mamba 1 adds the bias of its time step later."""
    for mixer in find_mixers(model):
        projection = getattr(mixer, "dt_proj", None)
        if projection is not None:
            yield projection


def _class_of(module: nn.Module) -> Any:
    return type(module)


@functools.cache
def _names_in(kind: Any) -> frozenset[str]:
    """The names that the code of a class's methods has."""
    members = [value for base in kind.__mro__ if base is not nn.Module for value in vars(base).values()]
    functions = [inspect.unwrap(value) for value in members if callable(value)]
    codes = [function.__code__ for function in functions if inspect.isfunction(function)]
    return frozenset(name for code in codes for name in code.co_names)


def check_mixers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The model's mixers, each of which can be given its state by slot.

    Raises:
        UnsupportedModelError: one of them takes its cache, or something else, in a way that is not known here.
    """
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    mixers = tuple(find_mixers(model))
    indices = [_index(mixer) for mixer in mixers]
    for mixer, index in zip(mixers, indices, strict=True):
        if not isinstance(index, int) or indices.count(index) > 1:
            raise UnsupportedModelError(
                f"{names[mixer]} keeps a state of layer {index}, as another module does, or of none; hybridgen runs "
                "models with one state a layer"
            )
        _cache_name(_class_of(mixer))
    return mixers


def _index(mixer: nn.Module) -> Any:
    """Of its layer, whatever its class says."""
    return vars(mixer).get("layer_idx", getattr(mixer, "layer_idx", None))


@functools.cache
def _cache_name(kind: Any) -> str:
    """The name of a mixer's argument for its cache."""
    parameters = inspect.signature(kind.forward).parameters
    found = [name for name in _CACHE_NAMES if name in parameters]
    needed = [
        name
        for name, parameter in list(parameters.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    unknown = [name for name in needed if name not in (*found, "hidden_states", *_NOT_NEEDED)]
    if len(found) != 1 or unknown or "hidden_states" not in parameters:
        raise UnsupportedModelError(
            f"{kind.__name__} takes {', '.join(list(parameters)[1:])}; hybridgen knows mixers that take hidden_states "
            "and one cache"
        )
    return found[0]


def check_claimed(mixers: Sequence[nn.Module], cache: DynamicCache) -> None:
    """Raise if a layer keeps a state in transformers' cache that none of the mixers is there for.

    Raises:
        UnsupportedModelError: one does.
    """
    claimed = {_index(mixer) for mixer in mixers}
    other = [index for index, layer in enumerate(cache.layers) if hasattr(layer, "conv_states")]
    if claimed != set(other):
        raise UnsupportedModelError(
            f"layers {sorted(set(other) ^ claimed)} keep a state in transformers' cache and have no module whose code "
            "updates it, or the other way round; hybridgen cannot give them theirs"
        )


def mixer_sites(
    mixers: Sequence[nn.Module], layers: Sequence[nn.Module], cache: DynamicCache, inputs: LayerInputs
) -> tuple[MixerSite, ...]:
    """Mixers with the shapes of what they left in the cache, and whether their classes' code goes on from that.

    Args:
        inputs: what two tokens brought each of them.

    Raises:
        UnsupportedModelError: a mixer is not given hidden states, keeps others than are known here, or ignores them.
    """
    found: list[MixerSite] = []
    seen: dict[type[nn.Module], tuple[bool, bool]] = {}
    for mixer, hidden in zip(mixers, inputs.take(), strict=True):
        shapes, kind = read_shapes(mixer, cache), type(mixer)
        if kind not in seen:
            if hidden is None:
                raise UnsupportedModelError(
                    f"{kind.__name__} of layer {_index(mixer)} is not called with its hidden states; hybridgen runs "
                    "mixers that are"
                )
            with torch.inference_mode():
                seen[kind] = continues_runs(mixer, hidden, shapes), same_in_every_layer(mixer, hidden, shapes)
        found.append(MixerSite(mixer, layer_around(mixer, layers), shapes, *seen[kind]))
    return tuple(found)


def read_shapes(mixer: nn.Module, cache: DynamicCache) -> MixerShapes:
    """What a mixer left in a cache of transformers' own, for a batch of one.

    Raises:
        UnsupportedModelError: nothing, or more than one state of a kind.
    """
    layer: Any = cache.layers[_index(mixer)]
    found = [getattr(layer, name, None) for name in ("conv_states", "recurrent_states")]
    kinds = [[] if states is None else list(states.values()) for states in found]
    if any(len(states) != 1 for states in kinds) or all(states == [None] for states in kinds):
        raise UnsupportedModelError(
            f"{type(mixer).__name__} of layer {_index(mixer)} keeps several states, or none, in transformers' cache; "
            "hybridgen runs mixers with one convolution and one recurrence"
        )
    shapes = (None if state is None else SlotShape(tuple(state.shape[1:]), state.dtype) for (state,) in kinds)
    return MixerShapes(*shapes)


def continues_runs(mixer: nn.Module, hidden: Tensor, shapes: MixerShapes) -> bool:
    """Whether a mixer's code begins a run of several tokens at the state from before, or at zeros.

    It is given states of NaN, which show in the result wherever they are read.

    Args:
        hidden: [2, hidden size], an input of it.

    Raises:
        UnsupportedModelError: it does not go by its state for a single token either.
    """
    kind = _class_of(mixer)
    own, name = by_torch(kind.forward), _cache_name(kind)

    def reads(tokens: Tensor, index: int) -> bool:
        convolution, recurrent = (
            None
            if shape is None
            else tokens.new_full((1, *shape.shape), float("nan") if place == index else 0.0, dtype=shape.dtype)
            for place, shape in enumerate(shapes)
        )
        kernel = 0 if shapes.convolution is None else shapes.convolution.shape[-1]
        output = own(mixer, tokens[None], **{name: SlotCache(convolution, recurrent, kernel, previous=True)})
        return any(bool(each.isnan().any()) for each in tree_leaves(output))

    kept = [index for index, shape in enumerate(shapes) if shape is not None]
    if all(reads(hidden, index) for index in kept):
        return True
    if all(reads(hidden[:1], index) for index in kept):
        return False
    raise UnsupportedModelError(
        f"{kind.__name__} of layer {_index(mixer)} computes the same whatever state it is given; hybridgen runs "
        "mixers that go on from the one that they left in their cache"
    )


def same_in_every_layer(mixer: nn.Module, hidden: Tensor, shapes: MixerShapes) -> bool:
    """Whether a mixer's code takes the index of its layer for nothing but to find its state.

    Args:
        hidden: [2, hidden size], an input of it.
    """
    kind, own = _class_of(mixer), vars(mixer).get("layer_idx")
    if not isinstance(own, int):
        return False
    name = _cache_name(kind)
    kernel = 0 if shapes.convolution is None else shapes.convolution.shape[-1]
    found: list[list[Tensor]] = []
    try:
        for index in (own, own + 1):
            vars(mixer)["layer_idx"] = index
            states = [
                None if shape is None else hidden.new_full((1, *shape.shape), 0.5, dtype=shape.dtype)
                for shape in shapes
            ]
            cache = SlotCache(states[0], states[1], kernel, previous=True)
            output = by_torch(kind.forward)(mixer, hidden[None, :1], **{name: cache})
            found.append(
                [each for each in tree_leaves((output, cache.conv_states, cache.recurrent_states)) if each is not None]
            )
    finally:
        vars(mixer)["layer_idx"] = own
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def use_slots(mixer: nn.Module, alike: bool) -> None:
    """From now on the mixer reads its state where its `_hybridgen` attribute says, if it does not yet.

    Args:
        alike: see `MixerSite`.
    """
    if not isinstance(mixer, SlotMixer):
        mixer.__class__ = _with_slots(_class_of(mixer), alike)


def use_own_cache(mixer: nn.Module) -> None:
    """Undo `use_slots()`."""
    give_back(mixer, SlotMixer)


def _set_index(mixer: Any, index: Any) -> None:
    vars(mixer)["layer_idx"] = index


@functools.cache
def _with_slots(kind: Any, alike: bool) -> Any:
    name = _cache_name(kind)
    own: Callable[..., Any] = by_torch(kind.forward)
    packed = packed_forward(kind)

    @functools.wraps(kind.forward)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        binding: MixerBinding = self._hybridgen
        if binding.step.phase is Phase.DECODE:
            return _decode(own, name, self, hidden_states, binding)
        recurrent = binding.recurrent
        if packed is not None and recurrent is not None and binding.convolution is not None:
            rule = rule_for(kind, hidden_states, recurrent)
            if rule is not None and hidden_states.shape[1] > 1:  # a token alone runs as in decode
                return _prefill_packed(functools.partial(packed, rule=rule), name, self, hidden_states, binding)
        return _prefill(own, name, self, hidden_states, binding)

    members: dict[str, Any] = {"forward": forward}
    if alike:  # a guard on an index would make a graph for each layer
        members["layer_idx"] = property(lambda self: 0, _set_index)
    return made_class(kind, SlotMixer, members, globals())


def _decode(own: Callable[..., Any], name: str, mixer: nn.Module, hidden: Tensor, binding: MixerBinding) -> Any:
    """[1, T, hidden]: every token is a row, with the state of its slot.

    Returns what the mixer does: a tensor [1, T, ...], or several, such as the queries, keys and values of an attention.
    """
    reads, writes = binding.places()
    cache = binding.read(reads, fresh=False)
    output = own(mixer, hidden.transpose(0, 1), **{name: cache})
    binding.write(writes, cache)
    return tree_map(lambda each: each.transpose(0, 1), output)


def _prefill(own: Callable[..., Any], name: str, mixer: nn.Module, hidden: Tensor, binding: MixerBinding) -> Any:
    """[1, T, hidden]: runs of tokens, each with the state of its slot. Returns the same as `_decode`."""
    reads, writes = binding.places()
    runs = binding.step.runs
    starts = list(itertools.accumulate((length for length, _ in runs), initial=0))
    outputs: list[Any] = [None] * len(runs)
    for (length, fresh), rows in _alike(runs):
        read, write = (torch.cat([each[row : row + 1] for row in rows]) for each in (reads, writes))
        cache = binding.read(read, fresh)
        batch = torch.cat([hidden[:, starts[row] : starts[row] + length] for row in rows])
        parts = (batch,) if fresh or binding.continues else batch.split(1, dim=1)
        found = [own(mixer, part, **{name: cache}) for part in parts]
        binding.write(write, cache)
        whole = found[0] if len(found) == 1 else tree_map(lambda *each: torch.cat(each, dim=1), *found)
        for place, row in enumerate(rows):
            outputs[row] = tree_map(lambda each, place=place: each[place : place + 1], whole)
    return tree_map(lambda *each: torch.cat(each, dim=1), *outputs)


def _prefill_packed(
    packed: Callable[..., Any], name: str, mixer: nn.Module, hidden: Tensor, binding: MixerBinding
) -> Any:
    """The same as `_prefill`, in one call for all runs."""
    reads, writes = binding.places()
    count = len(binding.step.runs)
    runs = binding.packed_runs(hidden.device)
    convolution, recurrent = binding.convolution, binding.recurrent
    assert convolution is not None  # see `_with_slots`
    assert recurrent is not None
    # A slot without tokens before has zeros.
    cache = PackedCache(convolution.index_select(0, reads[:count]), recurrent.index_select(0, reads[:count]), runs)
    output = packed(mixer, hidden, **{name: cache}, runs=runs)
    binding.write(writes[:count], cache)
    return output


def _alike(runs: Sequence[tuple[int, bool]]) -> Iterator[tuple[tuple[int, bool], list[int]]]:
    """Indices of runs that are equal, no more at once than have `_BATCH` tokens."""
    found: dict[tuple[int, bool], list[int]] = {}
    for index, run in enumerate(runs):
        found.setdefault(run, []).append(index)
    for run, rows in found.items():
        most = max(1, _BATCH // max(run[0], 1))
        for start in range(0, len(rows), most):
            yield run, rows[start : start + most]
