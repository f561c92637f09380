"""One compiled decoder layer that serves all layers.

`torch.compile` of a whole model unrolls its layers, so that compile time grows with depth. Here the compile unit is a
free function of the layer: Dynamo's cache hangs on a function's code, so layers of the same structure share one
graph. Prefill, decode of one row (which Dynamo specialises) and decode of several rows are separate code objects,
because entries of one code object share a recompile limit and are searched in turn.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.convert_frame import register_bytecode_hook
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from hybridgen.compilation.aot import LayerUnits
from hybridgen.compilation.fingerprint import token_dimension
from hybridgen.device.watched import has_forward_hooks, has_global_hooks
from hybridgen.errors import CacheMissError, ConfigError, DeviceError, described
from hybridgen.models.attention import LayerBinding, Phase, StepMetadata
from hybridgen.models.latent import LatentBinding
from hybridgen.models.mixers import SlotMixer

_SHARED = "shared_kv_states"
"""Where Gemma 4 puts keys and values that later layers may share."""
COMPILERS = ["g++", "clang++", "c++", "gcc"]
"""Of C++, as Inductor looks for them."""


def run_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The compile unit: a decoder layer's own forward."""
    return type(layer).forward(layer, *args, **kwargs)


def write_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The compile unit of a prefill's last layer that only writes keys and values. Nothing reads the rest of what the
    layer computes, so compilers leave that out."""
    type(layer).forward(layer, *args, **kwargs)


def check_backend(backend: str) -> None:
    """Raise if `torch.compile` does not know the backend.

    Raises:
        ConfigError: it does not.
    """
    if backend == "inductor":  # torch's own; looking it up imports what a start on a CPU may never need
        return
    try:
        torch._dynamo.lookup_backend(backend)
    except torch._dynamo.exc.InvalidBackend as error:
        known = ", ".join(torch._dynamo.list_backends(exclude_tags=None))
        raise ConfigError(f"compile_backend={backend!r} is unknown; choose one of: {known}") from error


def check_toolchain(mode: str, backend: str, device_type: str) -> None:
    """Raise if this machine lacks what a mode's compilation needs.

    Raises:
        DeviceError: Inductor finds no Triton on CUDA, or no C++ compiler on a CPU.
    """
    if backend != "inductor":
        return
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise DeviceError(f'mode="{mode}" on CUDA needs Triton, which is not installed; install it or use "eager"')
        return
    missing = missing_compiler()
    if missing is not None:
        raise DeviceError(
            f'mode="{mode}" on a CPU needs a C++ compiler, and {missing}; install g++ or set CXX, or use mode="eager"'
        )


def missing_compiler() -> str | None:
    """Why Inductor can compile no C++ here; None where it finds a compiler.

    None is run, because that takes a good part of a small model's start; one that does not work is found when a
    compilation fails.
    """
    names = [os.environ["CXX"]] if "CXX" in os.environ else COMPILERS
    return None if any(map(shutil.which, names)) else f"there is no C++ compiler ({' or '.join(names)})"


def switched_off() -> str | None:
    """What keeps `torch.compile` from compiling anything in this process, in words; None where nothing does."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1"
    if torch._dynamo.config.disable:
        return "torch._dynamo.config.disable (TORCH_COMPILE_DISABLE=1 sets it)"
    # The stance has no public reader.
    stance = getattr(getattr(torch._dynamo.eval_frame, "_stance", None), "stance", "default")
    return f'torch.compiler.set_stance("{stance}")' if stance == "force_eager" else None


_WRITES = "write_layer"


def _own_code(name: str) -> Any:
    """A compile unit with a code object of its own, so that its compiled entries are its own too."""
    function = write_layer if name == _WRITES else run_layer
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


class CompiledLayers:
    """Routes each call of a decoder layer to its compiled form, once `install()` ran and until `remove()`."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        step: StepMetadata,
        *,
        backend: str,
        max_batch: int,
        token_budget: int,
        fall_back: Callable[[str], None],
        units: LayerUnits | None = None,
        offline: bool = False,
    ) -> None:
        """
        Args:
            fall_back: called with the reason each time that a layer runs another way than it should.
            units: compiled functions that are kept between processes; None keeps none.
            offline: compile nothing.
        """
        self._layers = layers
        self._step = step
        self._fall_back = fall_back
        self._units = units
        self._offline = offline
        self._most_tokens = {Phase.PREFILL: token_budget, Phase.DECODE: max_batch}
        functions = {
            name: _own_code(name)
            for name in ("prefill_layer", _WRITES, "decode_layer", "decode_one_layer", "decode_several_layer")
        }
        self._codes = {function.__code__ for function in functions.values()}
        # Not dynamic=True: only the number of tokens is (see `mark_tokens_dynamic`).
        self._compiled = {
            name: torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
            for name, function in functions.items()
        }
        self._replaced: dict[nn.Module, Any] = {}
        self._plain: set[nn.Module] = set()
        # Their prefill goes run by run, and how many runs there are is the host's.
        self._keep_states = {layer for layer in layers if any(isinstance(x, SlotMixer) for x in layer.modules())}
        self._hook: Any = None
        self._warming = False
        self.strict = True
        """Whether one graph must serve every number of tokens; else a backend may split their range."""
        self.compiles = 0
        """Graphs compiled while warming up."""
        self.late_compiles = 0
        """Graphs compiled after it: each one is a stall that a user saw."""

    def install(self) -> None:
        """From now on `layer(...)` runs compiled, but for layers with hooks, also inside, or a forward of their own.

        Nothing happens where that is so already.
        """
        if self._hook is not None:
            return
        self._hook = register_bytecode_hook(self._count)
        self.route()

    def route(self) -> None:
        """Decide again which layers run compiled: hooks may have come or gone."""
        if self._hook is None:
            return
        plain = {layer for layer in self._layers if has_global_hooks() or any(map(_is_watched, layer.modules()))}
        if any(binding.reads_only for layer in self._layers for binding in _bindings(layer)):
            # Their layers hand on a mapping that grows from layer to layer: each would be a graph of its own.
            if not self._plain:
                self._fall_back("layers share keys and values (num_kv_shared_layers); they run eagerly")
            self._plain = set(self._layers)
            return
        for layer in self._layers:
            # Layers of a kind share a function, which would leave out what only some of them have.
            if layer in plain:
                self._put_back(layer)
                if layer not in self._plain:
                    self._fall_back(f"a {type(layer).__name__} has hooks or a replaced forward; it runs eagerly")
            elif layer not in self._replaced:
                # What nn.Module.compile() sets: Module.__call__ goes there first.
                self._replaced[layer] = layer._compiled_call_impl
                layer._compiled_call_impl = functools.partial(self._call, layer)
        self._plain = plain

    def forget_units(self) -> None:
        """Use no kept unit any more, because attributes of modules changed: not all of them are among the guards that a
        unit could keep. What `torch.compile` makes instead has all guards."""
        self._units = None

    @property
    def routes_last(self) -> bool:
        """Whether the last layer runs compiled."""
        return len(self._layers) > 0 and self._layers[-1] in self._replaced

    @property
    def routes_any(self) -> bool:
        """Whether a layer runs compiled."""
        return bool(self._replaced)

    def _put_back(self, layer: nn.Module) -> None:
        if layer not in self._replaced:
            return
        previous = self._replaced.pop(layer)
        if previous is None:
            vars(layer).pop("_compiled_call_impl", None)
        else:
            layer._compiled_call_impl = previous

    def remove(self) -> None:
        """`layer(...)` runs as it did before."""
        for layer in self._layers:
            self._put_back(layer)
        self._plain = set()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def warming(self) -> bool:
        """Whether `warming_up()` is entered."""
        return self._warming

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Compile here, with the number of tokens marked dynamic."""
        self._warming = True
        try:
            # One graph for each kind of layer; the default limit of 8 is below what some models have. Without the cache
            # of what ops return for fake tensors tracing takes a third less time: with a symbolic number of tokens
            # nearly every call misses it, and then makes its result twice.
            limit = max(64, len(self._layers))
            with torch._dynamo.config.patch(recompile_limit=limit, fake_tensor_cache_enabled=False):
                yield
        finally:
            self._warming = False

    def _count(self, code: types.CodeType, new_code: types.CodeType) -> None:
        """Dynamo compiled a function; count it if it is one of ours. The code stays as Dynamo made it."""
        if not any(code is ours for ours in self._codes):
            return
        self._note_compiled()

    def _note_compiled(self) -> None:
        if self._warming:
            self.compiles += 1
            return
        if not self.late_compiles:
            warnings.warn(
                "a step compiled a graph after warm-up; see EngineStats.late_compiles", RuntimeWarning, stacklevel=2
            )
        self.late_compiles += 1

    def _call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # inside a step that is compiled whole
            return run_layer(layer, *args, **kwargs)
        tokens, ends = self._step.slots.shape[0], self._step.ends
        # A prompt of one token, where that is not a decode step, would be a graph of its own.
        if self._step.phase is Phase.PREFILL and (layer in self._keep_states or tokens == 1):
            return run_layer(layer, *args, **kwargs)
        if kwargs.get(_SHARED):
            # Gemma 4's layers put keys and values there for later layers. Here nothing reads them, and each further one
            # would be another kind of call to Dynamo: so each layer gets an empty place.
            kwargs[_SHARED] = type(kwargs[_SHARED])()
        if ends is not None and layer is self._layers[-1]:
            with self._step.writing_only():
                self._run_marked(_WRITES, layer, args, kwargs, tokens)
            args, kwargs = taken((args, kwargs), ends.places, tokens)
            with self._step.at(ends):
                return self._call(layer, *args, **kwargs)
        if self._step.phase is Phase.PREFILL:
            name = "prefill_layer"
        elif self._step.several:
            name = "decode_several_layer"
        else:
            name = "decode_one_layer" if tokens == 1 else "decode_layer"
        return self._run_marked(name, layer, args, kwargs, tokens)

    def _run_marked(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int
    ) -> Any:
        """Run it; while warming up for any number of tokens."""
        if not self._warming or tokens == 1:
            return self._run(name, layer, args, kwargs, tokens)
        most = self._most_tokens[self._step.phase]
        mark_tokens_dynamic((args, kwargs, self._step), tokens, most, strict=self.strict)
        with cached_for(most):
            return self._run(name, layer, args, kwargs, tokens)

    def _run(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int) -> Any:
        if self._units is not None:
            unit = self._units.find(name, layer, args, kwargs, tokens) or self._made(name, layer, args, kwargs, tokens)
            if unit is not None:
                return unit(layer, *args, **kwargs)
        if self._offline:
            return self._refuse(layer, args, kwargs)
        try:
            return self._compiled[name](layer, *args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self._fall_back(f"a {type(layer).__name__} was compiled too often (recompile limit); it runs eagerly")
            return run_layer(layer, *args, **kwargs)

    def _made(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int) -> Any:
        """Compile a unit that can be kept; None where that cannot be done, so that `torch.compile` has to.

        Only while warming up: what a step compiles later is for its size alone.
        """
        if self._offline or self._units is None or not self._warming:
            return None
        try:
            with _pages_dynamic(layer):
                unit = self._units.make(name, _own_code(name), layer, args, kwargs, tokens)
        except ConstraintViolationError:
            raise
        except Exception as error:  # torch.compile may still compile it; if not, that raises
            self._units = None
            # Inductor's files are all that is kept now, and they are found only if the memory's size is not in them.
            for other in self._layers:
                _mark_pages(_pages(other))
            self._fall_back(
                f"compiled layers cannot be kept, so that every start traces them again: {described(error)}"
            )
            return None
        self._note_compiled()
        return unit

    def _refuse(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`offline_compile`: at start-up a miss is an error; later, the layer runs without being compiled."""
        reason = f"offline_compile=True, and the compile cache has no unit for this call of a {type(layer).__name__}"
        if self._warming:
            raise CacheMissError(f"{reason}; run hybridgen cache warm with the same config, or allow compiling")
        self._fall_back(f"{reason}; it runs eagerly")
        return run_layer(layer, *args, **kwargs)

    @property
    def units(self) -> LayerUnits | None:
        """What is kept for other processes; None where nothing can be."""
        return self._units

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Layers run uncompiled meanwhile, for a comparison."""
        for layer, previous in self._replaced.items():
            layer._compiled_call_impl = previous
        try:
            yield
        finally:
            for layer in self._replaced:
                layer._compiled_call_impl = functools.partial(self._call, layer)


def _is_watched(module: nn.Module) -> bool:
    """Whether a module's call is more than its class's forward."""
    return "forward" in vars(module) or has_forward_hooks(module)


@contextmanager
def cached_for(*most: int) -> Iterator[None]:
    """Inductor's cache has what is compiled here under the largest numbers of tokens and rows.

    The range is a guard of what that cache keeps, and no part of its key: an engine for 32 tokens would hand its graph
    to one for 96, whose range it cuts (seen with torch 2.13; a constraint violation, then more graphs than one).
    """
    tag = torch.compiler.config.cache_key_tag
    with torch.compiler.config.patch(cache_key_tag=f"{tag} up to {most}"):  # type: ignore[attr-defined]
        yield


@contextmanager
def _pages_dynamic(layer: nn.Module) -> Iterator[None]:
    """The number of pages, which depends on free memory, is no constant of what is compiled here."""
    pages = _pages(layer)
    before = [dict(vars(tensor)) for tensor in pages]
    _mark_pages(pages)
    try:
        yield
    finally:
        # Not for other compilers: cudagraph trees take the same tensors as static, and torch's guards see marks.
        for tensor, attributes in zip(pages, before, strict=True):
            vars(tensor).clear()
            vars(tensor).update(attributes)


def _pages(layer: nn.Module) -> list[torch.Tensor]:
    found = (vars(module).get("_hybridgen") for module in layer.modules())
    latents = [binding.latents for binding in found if isinstance(binding, LatentBinding)]
    return latents + [tensor for binding in _bindings(layer) for tensor in (binding.keys, binding.values)]


def _bindings(layer: nn.Module) -> list[LayerBinding]:
    found = (vars(module).get("_hybridgen") for module in layer.modules())
    return [binding for binding in found if isinstance(binding, LayerBinding)]


def _mark_pages(pages: Sequence[torch.Tensor]) -> None:
    for tensor in pages:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def mark_tokens_dynamic(values: Any, tokens: int, most: int, *, strict: bool = True) -> None:
    """Mark the token dimension of every tensor in nested containers as any number from 2 to `most`.

    `token_dimension` says which it is. Strictly, a graph for a part of the range is an error.
    """
    if isinstance(values, torch.Tensor):
        dim = token_dimension(values)
        if most > 2 and dim is not None and values.shape[dim] == tokens:
            if strict:
                torch._dynamo.mark_dynamic(values, dim, min=2, max=most)
            else:
                torch._dynamo.maybe_mark_dynamic(values, dim)
    elif isinstance(values, StepMetadata):
        inputs = [values.slots, values.positions, values.rope_lengths, values.state_places]
        mark_tokens_dynamic(inputs, tokens, most, strict=strict)
    elif isinstance(values, dict):
        mark_tokens_dynamic(list(values.values()), tokens, most, strict=strict)
    elif isinstance(values, (tuple, list)):
        for value in values:
            mark_tokens_dynamic(value, tokens, most, strict=strict)


def taken(values: Any, places: torch.Tensor, tokens: int) -> Any:
    """Nested containers with the tokens at these places in the place of all `tokens`; see `token_dimension`."""
    if isinstance(values, torch.Tensor):
        dim = token_dimension(values)
        return values if dim is None or values.shape[dim] != tokens else values.index_select(dim, places)
    if isinstance(values, dict):
        return {name: taken(value, places, tokens) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(taken(value, places, tokens) for value in values)
    return values
