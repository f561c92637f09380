"""A step on a CPU as a graph of operators: recorded by running it once, as a CUDA graph is.

What is recorded is the operators that ran and nothing of Python, so the same holds as of a CUDA graph: it is right for
one size, for tensors where they lay, and for modules as they were. A step that looks at values on the host, or has a
size that follows from values, cannot be recorded and is refused.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hybridgen.kernels.attention import reference as attention
from hybridgen.kernels.step import advance, metadata
from hybridgen.kernels.step.linear import has_onednn, takes
from hybridgen.sampling import choice

_aten = torch.ops.aten
_REFUSED_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded}
_ATTENTION = "hybridgen::decode_attention.default"
_READS = {"tolist", "numpy", "__array__", "__dlpack__", "untyped_storage", "storage"}
"""Methods that hand values to the host without an operator."""


def _operators() -> dict[Any, Callable[..., Any]]:
    """Ops of ours that a compiler is to see through; decode attention, which reads lengths, is called as it is."""
    ours = torch.ops.hybridgen
    return {
        ours.write_kv.default: attention.write_kv,
        ours.schedule_attention.default: _nothing,
        ours.publish.default: advance.publish_on_cpu,
        ours.advance.default: advance.advance_on_cpu,
        ours.copy_metadata.default: metadata.reference,
        ours.choose_greedy.default: choice.reference_greedy,
        ours.choose_sampled.default: choice.reference_sampled,
    }


def _nothing(*_: Any) -> None:
    """What a CPU does for an op that prepares something for a GPU's kernels."""


class Reference(NamedTuple):
    """A node in the arguments of another, by its place."""

    place: int


class Operation(NamedTuple):
    """A node of the graph, as another process can be told of it."""

    name: str
    """Of an operator, `namespace::name.overload`; empty: an item of an earlier node."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class OneTensor(NamedTuple):
    """What is compiled for, of an input."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class StepGraph(NamedTuple):
    """A step's operators: inputs have the first places, operations those behind."""

    inputs: int
    operations: list[Operation]

    def described(self, inputs: Sequence[Tensor]) -> list[OneTensor]:
        """The inputs as the compiler sees them. Pages of the cache that only attention reads and writes, whose code is
        not compiled, are said to be two: how many there are depends on free memory."""
        seen = self._compiled_inputs()
        return [
            OneTensor(tuple(one.shape) if place in seen else (2, *one.shape[1:]), tuple(one.stride()), one.dtype)
            for place, one in enumerate(inputs)
        ]

    def digest(self, inputs: Sequence[Tensor]) -> str:
        """32 hexadecimal digits that are equal for steps that one compiled function serves."""
        text = repr((self.operations, self.described(inputs)))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _compiled_inputs(self) -> set[int]:
        """Places of inputs that anything reads but attention its pages."""
        pages = {
            one.args[argument].place
            for one in self.operations
            if one.name == _ATTENTION
            for argument in (1, 2)  # k_pages, v_pages
        }
        others: set[int] = set()
        for one in self.operations:
            args = (*one.args[:1], *one.args[3:]) if one.name == _ATTENTION else one.args
            _mapped((args, one.kwargs), lambda value: others.add(value.place))
        return (set(range(self.inputs)) - pages) | others

    def module(self) -> fx.GraphModule:
        """A function of the inputs that returns nothing."""
        graph = fx.Graph()
        nodes = [graph.placeholder(f"input_{i}") for i in range(self.inputs)]

        def found(value: Any) -> Any:
            return nodes[value.place] if isinstance(value, Reference) else value

        for name, args, kwargs in self.operations:
            target = _operator(name) if name else operator.getitem
            nodes.append(graph.call_function(target, _mapped(args, found), _mapped(kwargs, found)))
        graph.output(())
        return fx.GraphModule(torch.nn.Module(), graph)


def record_step(run: Callable[[], object]) -> tuple[StepGraph, list[Tensor]]:
    """Run a step, and return its operators as a function of what it reads and writes.

    Args:
        run: the step; returns nothing.

    Returns:
        The graph, and the tensors to call it with.

    Raises:
        RuntimeError: the step looks at values, or has sizes that follow from values.
    """
    recording = _Recording()
    with _NoReads(), recording:
        run()
    # Inputs are found on the way, so they get the first places now.
    order = [*recording.inputs, *recording.operations]
    places = {number: place for place, number in enumerate(order)}

    def moved(value: Any) -> Any:
        return Reference(places[value.place]) if isinstance(value, Reference) else value

    operations = [
        Operation(one.name, _mapped(one.args, moved), _mapped(one.kwargs, moved))
        for one in recording.operations.values()
    ]
    return StepGraph(len(recording.inputs), operations), list(recording.inputs.values())


class _NoReads(TorchFunctionMode):
    """Refuses what reads values behind the dispatcher's back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS:
            raise RuntimeError(f"the step looks at values on the host (Tensor.{func.__name__})")
        return func(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, Tensor] = {}
        self.operations: dict[int, Operation] = {}
        self._places: dict[int, int] = {}
        self._alive: list[Tensor] = []
        """What has a place is kept, so that its identity is not given to another tensor."""
        self._see_through = _operators()
        self._onednn = torch.ops.mkldnn._linear_pointwise.default if has_onednn() else None
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        through = self._see_through.get(func)
        if through is not None:
            with self:
                return through(*args, **kwargs)
        _check(func, args)
        if func is _aten.linear.default and (_is_one_row(*args[:2]) or takes(*args[:2])):
            return self._linear(*args)
        if func is self._onednn:  # `models.projections`
            return self._linear(*args[:3])
        return self._run(func, args, kwargs)

    def _linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of one row as a sum: Inductor's loop over it, fused with what is around, reads weights faster
        than `torch.mm` does (up to 2 times on a server's processor). Of a weight that lies by columns
        (`models.projections`) it is the BLAS's, and the product of a few rows is oneDNN's."""
        shape = rows.shape
        flat = self._run(_aten.view.default, (rows, [-1, shape[-1]]), {})
        if flat.shape[0] == 1 and weight.stride(1) != 1:
            found = self._run(_aten.mm.default, (flat, self._run(_aten.t.default, (weight,), {})), {})
            if bias is not None:
                found = self._run(_aten.add.Tensor, (found, bias), {})
        elif flat.shape[0] == 1:
            found = self._run(_aten.sum.dim_IntList, (self._run(_aten.mul.Tensor, (weight, flat), {}), [1]), {})
            if bias is not None:
                found = self._run(_aten.add.Tensor, (found, bias), {})
        else:
            found = self._run(torch.ops.hybridgen.few_rows.default, (flat, weight, bias), {})
        result: Tensor = self._run(_aten.view.default, (found, [*shape[:-1], weight.shape[0]]), {})
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        references = tree_map_only(Tensor, self._reference, (args, kwargs))
        with torch._C.DisableTorchFunction():
            result = func(*args, **kwargs)
        place = self._add(Operation(f"{func._schema.name}.{func._overloadname}", *references))
        if isinstance(result, Tensor):
            self._keep(result, place)
        elif isinstance(result, (tuple, list)):
            for index, one in enumerate(result):
                if isinstance(one, Tensor):
                    self._keep(one, self._add(Operation("", (Reference(place), index), {})))
        elif result is not None:
            raise RuntimeError(f"the step looks at values on the host ({func})")
        return result

    def _add(self, operation: Operation) -> int:
        place = self._new_place()
        self.operations[place] = operation
        return place

    def _new_place(self) -> int:
        self._count += 1
        return self._count

    def _keep(self, tensor: Tensor, place: int) -> None:
        self._places[id(tensor)] = place
        self._alive.append(tensor)

    def _reference(self, tensor: Tensor) -> Reference:
        place = self._places.get(id(tensor))
        if place is None:  # from before the step
            place = self._new_place()
            self.inputs[place] = tensor
            self._keep(tensor, place)
        return Reference(place)


def _check(func: Any, args: tuple[Any, ...]) -> None:
    if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
        masks = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        if not masks or (func is not _aten.index.Tensor and args[2].numel() == 1):
            return
    elif not _REFUSED_TAGS & set(func.tags):
        return
    raise RuntimeError(f"the step's sizes or choices follow from values on the device ({func})")


def _is_one_row(rows: Tensor, weight: Tensor) -> bool:
    """Whether it is a product of one row in float32."""
    floats = rows.dtype is torch.float32 and weight.dtype is torch.float32
    return floats and rows.is_contiguous() and rows.numel() == rows.shape[-1]


def _operator(name: str) -> Any:
    namespace, rest = name.split("::")
    packet, overload = rest.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def _mapped(values: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(values, Reference):
        return change(values)
    if isinstance(values, (tuple, list)):
        return type(values)(_mapped(one, change) for one in values)
    if isinstance(values, dict):
        return {name: _mapped(one, change) for name, one in values.items()}
    return values
