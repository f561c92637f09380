"""Copies of a step's metadata: the op `hybridgen::copy_metadata`, and `MetadataCopy`, such a copy prepared once.

Before a step some small tensors are brought up to date: tokens, positions, slots, block tables. A torch copy each
costs the host a launch each; here all go in one. Pair i copies `sources[i]` to `destinations[i]`:

| | |
|---|---|
| shape | equal in a pair; 0 to 2 dimensions; at most 2**30 elements; pairs without elements are skipped |
| strides | any, on either side: `t[1:]`, `t[::2]`, `table[:rows, :cols]`, an expanded source |
| dtype | equal in a pair, any of 1, 2, 4 or 8 bytes that is not complex |
| device | one for all tensors |

The copies of a call run in no order: a destination must not share elements with another tensor of the call.

On the CPU the copies are torch's. On CUDA (`metadata_copy`) a Triton kernel does 32 pairs a launch. Addresses, sizes
and strides are its arguments: nothing is allocated, no size makes it compile again, and a captured graph replays
between the addresses of its capture. The first call compiles: call once, or make the `MetadataCopy`, before a
capture. Where compiling fails, torch copies from then on: one RuntimeWarning, and `fallbacks()` counts the calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridgen.errors import CacheMissError, described

if TYPE_CHECKING:
    from hybridgen.kernels.step.metadata_copy import Launches

_MAX_ELEMENTS = 2**30
"""The kernel counts elements of a pair in 32 bits, up to a block beyond the last."""
_MAX_PREPARED = 256

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define(
    "copy_metadata(Tensor[] sources, Tensor(a!)[] destinations) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class _Triton:
    """Whether Triton can be used, in this process."""

    failed = False
    fallbacks = 0
    """Calls on CUDA that torch copied."""


_prepared: dict[Hashable, Launches] = {}
"""Of the op, by addresses, dtypes, shapes and strides. They hold no memory, so a capture needs none of them."""


def copy_metadata(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
    """Copy each source to its destination, in one launch; the module's text says what it takes.

    In `torch.compile` do not pass a clone of a destination as a source: Inductor may pass the destination itself
    (https://github.com/pytorch/pytorch/issues/198031).

    Raises:
        ValueError: lists of different lengths, or a pair that the op does not take.
    """
    if len(sources) or len(destinations):  # without a tensor there is no device to dispatch on
        torch.ops.hybridgen.copy_metadata.default(sources, destinations)


class MetadataCopy:
    """Copies between fixed tensors, checked and prepared once; a call is one launch, also in a CUDA graph.

    It keeps the tensors alive. They must stay where they are: no `resize_`, `set_` or assignment to `.data`.
    Not for use inside `torch.compile`: there the op is.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Pairs of a source and its destination.

        Raises:
            ValueError: a pair that the op does not take.
        """
        listed = list(pairs)
        self.sources = [source for source, _ in listed]
        self.destinations = [destination for _, destination in listed]
        check(self.sources, self.destinations)
        self._on_cuda = bool(listed) and listed[0][1].is_cuda
        self._launches = _prepare(self.sources, self.destinations) if self._on_cuda else None

    def __call__(self) -> None:
        """Copy, on the current stream."""
        if self._launches is not None:
            self._launches()
        elif self._on_cuda:
            _fall_back(self.sources, self.destinations)
        else:
            reference(self.sources, self.destinations)


def fallbacks() -> int:
    """Calls that torch copied on CUDA because Triton could not compile the kernel."""
    return _Triton.fallbacks


def reference(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
    """The copies in plain torch, one by one."""
    for source, destination in zip(sources, destinations, strict=True):
        destination.copy_(source)


def check(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
    """Raise ValueError, with the values named, for what the op does not take."""
    if len(sources) != len(destinations):
        raise ValueError(f"{len(sources)} sources and {len(destinations)} destinations; give as many of each")
    for i, (source, destination) in enumerate(zip(sources, destinations, strict=True)):
        if source.shape != destination.shape:
            shapes = f"{tuple(source.shape)} and {tuple(destination.shape)}"
            raise ValueError(f"pair {i}: shapes {shapes} of source and destination; give equal ones")
        if source.dtype != destination.dtype:
            raise ValueError(f"pair {i}: dtypes {source.dtype} and {destination.dtype}; give equal ones")
        if source.dtype.is_complex or source.dtype.itemsize > 8:
            raise ValueError(f"pair {i}: dtype {source.dtype}; give a real one of at most 8 bytes")
        if source.dim() > 2:
            raise ValueError(f"pair {i}: shape {tuple(source.shape)}; give at most two dimensions")
        if source.numel() > _MAX_ELEMENTS:
            raise ValueError(f"pair {i}: {source.numel()} elements; give at most {_MAX_ELEMENTS}")
        if not source.device == destination.device == destinations[0].device:
            devices = f"{source.device} and {destination.device}, the first destination on {destinations[0].device}"
            raise ValueError(f"pair {i}: source and destination on {devices}; give one device")


def _prepare(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> Launches | None:
    """The launches of checked pairs; None where Triton fails or has failed."""
    if _Triton.failed:
        return None
    try:
        from hybridgen.kernels.step.metadata_copy import prepare

        return prepare(sources, destinations)
    except CacheMissError:  # it is not to compile now, and may be later
        raise
    except Exception as error:  # whatever a compiler raises: it would fail, slowly, in every step
        _Triton.failed = True
        warnings.warn(
            f"copy_metadata: Triton failed ({described(error)}); torch copies from now on, slower",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def _fall_back(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
    _Triton.fallbacks += 1
    reference(sources, destinations)


def _copy_cpu(sources: list[Tensor], destinations: list[Tensor]) -> None:
    check(sources, destinations)
    reference(sources, destinations)


def _copy_cuda(sources: list[Tensor], destinations: list[Tensor]) -> None:
    # Checking and preparing pairs takes some times longer than to look at them, and most calls repeat a call.
    key = len(sources), *[
        (t.data_ptr(), t.dtype, t.shape, t.stride(), t.get_device()) for t in (*sources, *destinations)
    ]  # fmt: skip
    launches = _prepared.get(key)
    if launches is None:
        check(sources, destinations)
        launches = _prepare(sources, destinations)
        if launches is None:
            _fall_back(sources, destinations)
            return
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = launches
    launches()


def _copy_fake(sources: list[Tensor], destinations: list[Tensor]) -> None:
    return None


_library.impl("copy_metadata", _copy_cpu, "CPU")
_library.impl("copy_metadata", _copy_cuda, "CUDA")
torch.library.register_fake("hybridgen::copy_metadata", _copy_fake, lib=_library)
