"""Triton's interpreter without what it does again and again for nothing: a third of its time, or half.

It puts its own functions into `triton.language` at every call of a device function, though they are there since the
kernel's launch; it computes integer arithmetic a second time, in 64 bits, for assertions that it has off; it makes a
table of dtypes at every look into it; it describes the shape of every tensor anew; and it compares the sizes of two
tensors one by one before it finds that they are alike. Values are those of the interpreter as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

USED = ("_patch_lang", "_get_np_dtype", "interpreter_builder", "interpreter_semantic")


def install() -> None:
    """For this process, before kernels run. Where Triton's interpreter is built otherwise, it stays as it is."""
    from triton import language
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in USED):
        return
    interpreter._patch_lang = _once(interpreter._patch_lang, (language, language.core))
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype, language)
    semantic = type(interpreter.interpreter_semantic)
    checked = semantic.binary_op_sanitize_overflow_impl

    def check_overflow(self: Any, *arguments: Any) -> None:
        if self.builder.options.debug:  # else `device_assert` drops what comes out
            checked(self, *arguments)

    semantic.binary_op_sanitize_overflow_impl = check_overflow
    _describe_once(language.core.block_type, lambda element, shape: (element.name, *map(_plain, shape)))
    _describe_once(language.core.tensor, lambda handle, type: (type.name, type.is_block()))
    semantic.broadcast_impl_value = _unless_alike(semantic.broadcast_impl_value)


def _plain(size: Any) -> Any:
    return getattr(size, "value", size)


def _describe_once(kind: type[Any], key_of: Callable[..., Any]) -> None:
    """Have objects of a class that differ in their arguments alone share what its `__init__` makes of these.

    Args:
        key_of: what it depends on, from the two arguments.
    """
    made: dict[Any, dict[str, Any]] = {}
    first_time, names = kind.__init__, tuple(inspect.signature(kind.__init__).parameters)[1:]
    if len(names) != 2:  # of another Triton
        return

    def describe(self: Any, one: Any, other: Any) -> None:
        key = key_of(one, other)
        known = made.get(key)
        if known is None:
            first_time(self, one, other)
            made[key] = {name: value for name, value in vars(self).items() if value is not one}
        else:
            vars(self).update(known)
            vars(self)[names[0]] = one

    kind.__init__ = describe


def _unless_alike(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Nothing is done to two tensors of one shape."""

    def broadcast_others(self: Any, one: Any, other: Any) -> Any:
        shapes = [getattr(getattr(each.type, "shape", None), "values", None) for each in (one, other)]
        return (one, other) if shapes[0] is not None and shapes[0] == shapes[1] else broadcast(self, one, other)

    return broadcast_others


def _once(patch: Callable[[Any], Any], languages: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Do nothing for a function whose languages have the interpreter's functions already."""
    patched: set[str] = set()
    nothing = type("Nothing", (), {"restore": lambda self: None})()

    @functools.cache
    def used_by(function: Any) -> frozenset[str]:
        modules = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)}
        return frozenset(module.__name__ for module in languages if module.__name__ in modules)

    def patch_once(function: Any) -> Any:
        used = used_by(function)
        if used and used <= patched:
            return nothing
        scope = patch(function)
        patched.update(used)
        restore = scope.restore

        def restored() -> None:
            # What a device function had put there is not all there any more: the languages share classes.
            patched.clear()
            restore()

        scope.restore = restored
        return scope

    return patch_once


def _remembered(find: Callable[[Any], Any], language: Any) -> Callable[[Any], Any]:
    """The dtype in numpy of a dtype, by the name of its elements'."""
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        if isinstance(scalar, language.pointer_type):
            return find(dtype)
        if scalar.name not in known:
            known[scalar.name] = find(dtype)
        return known[scalar.name]

    return remembered
