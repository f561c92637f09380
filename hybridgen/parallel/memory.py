"""Memory of each rank's GPU that all ranks of a host read and write: CUDA IPC, mapped once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from hybridgen.device.program import driver_call
from hybridgen.errors import DeviceError

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class PeerMemory:
    """Zeroed memory of all ranks, as one of them has it."""

    def __init__(
        self,
        rank: int,
        device: torch.device,
        size: int,
        exchange: Callable[[bytes], list[bytes]],
        first: Callable[[], None] | None = None,
    ) -> None:
        """Allocate, and map what the others have.

        Args:
            size: bytes of each rank; the same on all of them.
            exchange: gives what each rank handed in, by rank; called once, whatever happens, and empty bytes say that
                this rank has nothing.
            first: what this rank must be able to do besides; called before anything is allocated.

        Raises:
            DeviceError: it cannot be had, here or on another rank.
        """
        self._device = device
        self._own = 0
        self._mapped: list[int] = []
        handle = b""
        try:
            with torch.cuda.device(device):
                torch.cuda.current_stream(device).synchronize()  # the driver's context is there and current
                if first is not None:
                    first()
                self._own = int(driver_call("cuMemAlloc", size))
                driver_call("cuMemsetD8", self._own, 0, size)
                found: Any = driver_call("cuIpcGetMemHandle", self._own)
                handle = ctypes.string_at(found.getPtr(), _HANDLE_BYTES)
            torch.cuda.synchronize(device)  # it is zero before anybody writes there
        except BaseException:
            handle = b""
            raise
        finally:
            handles = exchange(handle)
        missing = [other for other, found in enumerate(handles) if not found]
        if missing:
            self.close()
            raise DeviceError(f"rank {missing[0]} has no memory that others could map")
        self.addresses = [self._own if other == rank else self._map(found) for other, found in enumerate(handles)]
        """Of each rank's memory, for this rank's device."""

    def _map(self, found: bytes) -> int:
        from cuda.bindings import driver

        handle = driver.CUipcMemHandle()
        ctypes.memmove(handle.getPtr(), found, _HANDLE_BYTES)
        with torch.cuda.device(self._device):
            address = int(driver_call("cuIpcOpenMemHandle", handle, _LAZY_PEER_ACCESS))
        self._mapped.append(address)
        return address

    def close(self) -> None:
        """Free it. Nothing may run that reaches it, and no graph may hold it.

        Raises:
            DeviceError: the driver refuses.
        """
        with torch.cuda.device(self._device):
            for address in self._mapped:
                driver_call("cuIpcCloseMemHandle", address)
            if self._own:
                driver_call("cuMemFree", self._own)
        self._mapped, self._own = [], 0
