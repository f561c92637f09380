"""A live module's twin: a module tree of its own over the same parameters.

An engine changes the tree that it runs (attention, rotary modules, calls of layers), so for a module that stays its
owner's it makes a tree of its own. Each module is copied without its `__init__`: same class, same attributes, the same
parameter and buffer tensors. Only what refers to a module or to a config is made to refer to the twin's.

What the owner does to the module afterwards is followed at the beginning of each call (`Twin.follow`).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hybridgen.device.watched import has_forward_hooks
from hybridgen.errors import EngineError
from hybridgen.models.tree_copy import BACKWARD_TABLES, HOOK_TABLES, TreeCopy

M = TypeVar("M", bound=nn.Module)


_NOT_FOLLOWED = frozenset(
    {
        *HOOK_TABLES,
        *BACKWARD_TABLES,
        "_parameters",
        "_buffers",
        "_modules",
        "_compiled_call_impl",
        "_gradient_checkpointing_func",
        "_hf_peft_config_loaded",
        "_is_full_backward_hook",
        "_is_hf_initialized",
        "_output_capturing_hooks_installed",
        "_require_grads_hook",
        "_require_grads_hooks",
        "config",
        "generate",
        "generate_batch",
        "generation_config",
        "gradient_checkpointing",
        "rope_deltas",  # what images added to positions in a multimodal model's own last call; ours are given
        "training",
        "warnings_issued",
    }
)
"""Attributes that the twin has its own of, or that generating does not read."""
_NOT_FOLLOWED_IN_CONFIGS = frozenset(
    {
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "pad_token_id",
        "return_dict",
        "use_cache",
    }
)
"""Fields of a config that saving or training sets, and that no layer computes with."""
_CONTAINERS = (dict, list, set, tuple)
_FEW = 64
"""Entries of a container up to which its plain values are compared."""
_SOME = 8
"""Tensors at whose places a quick look looks."""


class Changes(NamedTuple):
    """What the owner of a live module changed since the last look, values of parameters apart."""

    moved: tuple[str, ...] = ()
    """Names of tensors that lie elsewhere now, or are other ones."""
    settings: tuple[str, ...] = ()
    """Names of attributes that have other values now."""
    hooked: tuple[nn.Module, ...] = ()
    """Modules that have forward hooks now."""

    def beside(self, other: Changes) -> Changes:
        """These, and those of another module."""
        return Changes(self.moved + other.moved, self.settings + other.settings, self.hooked + other.hooked)


class Twin(Generic[M]):
    """A module tree over the parameters of another one, which is never changed.

    It calls no hooks before the first `follow()`: what is built meanwhile (probes, compiled layers, recordings) is
    built without them, and serves when they are gone.
    """

    model: M
    """The twin, in evaluation mode."""

    def __init__(self, original: M) -> None:
        self._original = original
        self._copy = TreeCopy()
        self.model = self._copy.module(original)
        self._configs = [_Config(*pair) for pair in self._copy.configs]
        self._modules: list[_Module] = []
        self._moved: list[str] = []
        self._settings: list[str] = []
        self._seen: _Seen | None = None
        self._refills: dict[int, Callable[[], None]] = {}
        self._followers: list[Callable[[], None]] = []

    @property
    def modules(self) -> list[tuple[nn.Module, Any]]:
        """(the owner's, the twin's) of each module that the twin was made with."""
        return self._copy.modules

    def replaced(self, module: nn.Module, refill: Callable[[], None], follow: Callable[[], None] | None = None) -> None:
        """Say that something else has the place of one of the twin's modules, and holds its tensors.

        Args:
            refill: called when the module has other tensors.
            follow: called at each look, where the tensors were copied, so that new values are not seen by themselves.
        """
        self._refills[id(module)] = refill
        if follow is not None:
            self._followers.append(follow)

    def at_each_look(self, follow: Callable[[], None]) -> None:
        """Say that something has the place of a module and looks after itself: what is called at each look, first."""
        self._followers.append(follow)

    def settle(self) -> None:
        """Follow the original as it is now from now on.

        Modules that the engine has put into the twin by then (rotary ones) are its own and follow nothing.
        """
        names = {id(module): name for name, module in self._original.named_modules(remove_duplicate=False)}
        used = {id(module) for module in self.model.modules()}
        self._modules = [
            _Module(names.get(id(original), type(original).__name__), original, twin)
            for original, twin in self._copy.modules
            if id(twin) in used or id(original) not in names or id(twin) in self._refills
        ]

    def keeps_memory(self) -> bool:
        """Whether all memory is still there that was the tensors' at the last look, and nothing was copied from them.

        Then what was recorded may run before the next look. It computes with what the model was, though.
        """
        return not self._followers and self._seen is not None and self._seen.keeps_memory()

    def follow(self) -> Changes:
        """Make the twin as the original is now, as far as that can be done.

        New values in the parameters need nothing: they are the same tensors. Other tensors of the same kind, other
        attributes and other hooks are taken over.

        Raises:
            EngineError: the tree itself changed, or a tensor has another shape, dtype or device.
        """
        for follow in self._followers:
            follow()
        if self._seen is not None and self._seen.holds():
            return Changes()
        self._seen = None
        for config in self._configs:
            self._settings += config.follow()
        for module in self._modules:
            self._settings += module.follow_attributes(self._copy)
            moved = module.follow_tensors()
            self._moved += moved
            refill = self._refills.get(id(module.twin))
            if refill is None:
                module.follow_hooks()
                continue
            if has_forward_hooks(module.original):
                raise EngineError(
                    f"{module.name} is a quantised layer with forward hooks, which are not called here; remove them, "
                    "or run the model with transformers' own generate()"
                )
            if moved:
                refill()
        hooked = tuple(module.original for module in self._modules if module.hooked)
        changes = Changes(tuple(self._moved), tuple(self._settings), hooked)
        # Not before: what was seen before an error is still to be told.
        self._moved, self._settings = [], []
        if not hooked:
            self._seen = _Seen(
                [module.original for module in self._modules], [config.original for config in self._configs]
            )
        return changes


def twin(model: M) -> M:
    """A tree over a module's parameters, with its hooks, that does not follow what becomes of it."""
    found = Twin(model)
    found.settle()
    found.follow()
    return found.model


_USUAL = (frozenset(vars(nn.Module())) | _NOT_FOLLOWED) - {"_forward_hooks", "_forward_pre_hooks"}
"""Attributes that are not compared: what is not followed, and tables that every module has, which are looked into.
Tables of hooks are compared: somebody may take them out for a while and put them back."""


class _Seen:
    """What an owner's modules without hooks were like at the last look, in lists that are compared at once.

    Every call pays for a look. Its time is that of reading objects which lie anywhere in memory, half a millisecond for
    a model of 32 layers, so it reads as few as it can. Tables of hooks are looked into only where torch has made a
    handle of a hook since. That a storage has gone is not looked for either: Python tells.
    """

    def __init__(self, modules: list[nn.Module], configs: list[Any]) -> None:
        self._states: list[dict[str, Any]] = [vars(each) for each in (*modules, *configs)]
        self._hookable = self._states[: len(modules)]
        self._handles = RemovableHandle.next_id
        self._names = [(state, name) for state in self._states for name in state if name not in _USUAL]
        tables = [
            table for module in modules for table in (module._modules, module._parameters, module._buffers) if table
        ]
        self._tables: list[dict[str, Any]] = tables
        values = self._values = [state[name] for state, name in self._names]
        """They are held, so that no new object gets the identity of an old one."""
        self._containers = [value for value in values if type(value) in _CONTAINERS and _plain(value)]
        self._members = [member for table in tables for member in table.values()]
        self._tensors = [member for member in self._members if isinstance(member, Tensor)]
        self._sizes = self._now()
        self._gone: list[object] = []
        """References to storages that are gone, and tensors that have none."""
        self._storages = list(map(self._watch, self._tensors))
        self._some = self._tensors[:: max(1, len(self._tensors) // _SOME)]
        self._their_places = list(map(Tensor.data_ptr, self._some))

    def _watch(self, tensor: Tensor) -> object:
        """A storage has one object in Python for as long as it lives."""
        try:
            return weakref.ref(tensor.untyped_storage(), self._gone.append)
        except (NotImplementedError, RuntimeError, TypeError):  # a subclass that holds other tensors
            self._gone.append(tensor)
            return None

    def keeps_memory(self) -> bool:
        """Whether no storage has gone. One can be emptied in place, too, as sharded training does with all of a model:
        some of them are looked at."""
        return not self._gone and list(map(Tensor.data_ptr, self._some)) == self._their_places

    def _now(self) -> tuple[Any, ...]:
        return (
            list(map(len, self._states)),
            list(map(len, self._tables)),
            list(map(_plain, self._containers)),
            list(map(Tensor.data_ptr, self._tensors)),
            [tensor.shape for tensor in self._tensors],
        )

    def holds(self) -> bool:
        """Whether all of it is the same, and nobody listens."""
        if self._handles != RemovableHandle.next_id:
            if any(state[name] for state in self._hookable for name in HOOK_TABLES):
                return False
            self._handles = RemovableHandle.next_id
        return (
            self._now() == self._sizes
            and all(map(is_, [state.get(name) for state, name in self._names], self._values))
            and all(map(is_, [member for table in self._tables for member in table.values()], self._members))
        )


class _Module:
    """A module of the owner and its twin, with what the original was like at the last look."""

    def __init__(self, name: str, original: nn.Module, twin: nn.Module) -> None:
        self.name, self.original, self.twin = name, original, twin
        self.hooked = False
        self._children = list(original._modules.values())
        self._keys = [list(original._parameters), list(original._buffers)]
        self._tensors = [tensor for _, tensor in self._named_tensors()]
        self._kinds = [_kind(tensor) for tensor in self._tensors]
        self._addresses = [0 if tensor is None else tensor.data_ptr() for tensor in self._tensors]
        self._note_attributes()

    def follow_hooks(self) -> None:
        """Call the original's hooks, if it has any: by its own tables, so that one that removes itself is gone."""
        hooked = has_forward_hooks(self.original)
        if hooked or self.hooked:
            for table in HOOK_TABLES:
                vars(self.twin)[table] = vars(self.original)[table] if hooked else OrderedDict()
        self.hooked = hooked

    def _note_attributes(self) -> None:
        state = vars(self.original)
        # The values are held, so that no new object gets the identity of an old one.
        self._attributes = dict(state)
        self._values = list(state.values())
        self._plain = {
            name: _plain(value)
            for name, value in state.items()
            if type(value) in _CONTAINERS and name not in _NOT_FOLLOWED and _plain(value)
        }

    def follow_attributes(self, copy: TreeCopy) -> list[str]:
        """Take over attributes that changed; returns their names."""
        state = vars(self.original)
        if not _same(self.original._modules.values(), self._children):
            raise EngineError(
                f"the modules inside of {self.name or 'the model'} are other ones than when the engine took it; close "
                "this engine and load a new one"
            )
        changed = [
            name
            for name, plain in self._plain.items()
            if state.get(name) is self._attributes[name] and _plain(state[name]) != plain
        ]
        if not changed and len(state) == len(self._values) and _same(state.values(), self._values):
            return []
        before = self._attributes
        for name in before.keys() | state.keys():
            if name in _NOT_FOLLOWED or (name in before and name in state and before[name] is state[name]):
                continue
            if name not in state:
                vars(self.twin).pop(name, None)
            else:
                vars(self.twin)[name] = copy.value(state[name])
            if name not in before or name not in state or not _alike(before[name], state[name]):
                changed.append(name)
        self._note_attributes()
        return [_dotted(self.name, name) for name in changed]

    def _named_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        yield from self.original._parameters.items()
        yield from self.original._buffers.items()

    def follow_tensors(self) -> list[str]:
        """Take over tensors that are other ones or lie elsewhere; returns their names."""
        original, twin = self.original, self.twin
        if [list(original._parameters), list(original._buffers)] != self._keys:
            raise EngineError(
                f"{self.name or 'the model'} has other parameters than when the engine took it; close this engine and "
                "load a new one"
            )
        moved = []
        for index, (name, tensor) in enumerate(self._named_tensors()):
            address = 0 if tensor is None else tensor.data_ptr()
            same = tensor is self._tensors[index] and address == self._addresses[index]
            if same and (tensor is None or tensor.shape == self._kinds[index][0]):
                continue
            if _kind(tensor) != self._kinds[index] or (tensor is not None and address == 0 and tensor.numel()):
                what = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                raise EngineError(
                    f"{_dotted(self.name, name)} is {what} now, another kind of tensor than when the engine took it; "
                    "put it back, or close this engine and load a new one"
                )
            table: dict[str, Any] = twin._parameters if name in twin._parameters else twin._buffers
            table[name] = tensor
            self._tensors[index], self._addresses[index] = tensor, address
            moved.append(_dotted(self.name, name))
        return moved


class _Config:
    """A config of the owner and the twin's copy of it."""

    def __init__(self, original: Any, twin: Any) -> None:
        self.original, self.twin = original, twin
        self._seen = dict(vars(original))

    def follow(self) -> list[str]:
        """Take over fields that changed; returns their names."""
        state, changed = vars(self.original), []
        for name, value in state.items():
            if name.startswith(("_", "output_")) or name in _NOT_FOLLOWED_IN_CONFIGS:
                continue
            if name in self._seen and (value is self._seen[name] or value == self._seen[name]):
                continue
            vars(self.twin)[name] = value
            changed.append(f"config.{name}")
        if changed or len(state) != len(self._seen):
            self._seen = dict(state)
        return changed


def _same(values: Any, others: list[Any]) -> bool:
    return len(values) == len(others) and all(map(is_, values, others))


def _kind(tensor: Tensor | None) -> tuple[Any, ...]:
    """What recorded and compiled steps know of a tensor besides its address."""
    return () if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.stride())


def _alike(one: Any, other: Any) -> bool:
    """Whether two plain values are the same; others never are."""
    plain = (bool, int, float, str, type(None))
    return type(one) is type(other) and isinstance(one, plain) and one == other


def _plain(container: Any) -> list[Any]:
    """Numbers and texts in a container: settings that are changed in place."""
    if len(container) > _FEW:
        return []
    values = container.values() if type(container) is dict else container
    return [value for value in values if isinstance(value, (bool, int, float, str))]


def _dotted(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
