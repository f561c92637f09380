"""Compile, keep and load the kernel: NVRTC and the driver through NVIDIA's `cuda-bindings`; no nvcc is needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.resources
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hybridgen.errors import DeviceError, described


class Unfit(Exception):
    """A model or device that a kernel does not serve; the message is the reason."""


Keeper = Callable[[str, Callable[[], bytes]], bytes]
"""Gives the machine code that is kept under a key, or makes and keeps it."""


@dataclass(frozen=True)
class Program:
    """A kernel's files: `folders` are packages, and a file is in the first that has it."""

    folders: tuple[str, ...]
    source: str
    headers: tuple[str, ...]
    kernel: str


@functools.cache
def _bindings() -> tuple[Any, Any]:
    """The driver's and NVRTC's Python interfaces.

    Raises:
        Unfit: they, or the libraries behind them, are not installed.
    """
    try:
        from cuda.bindings import driver, nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # ImportError, or what loading the library raised
        raise Unfit(
            f"NVIDIA's cuda-bindings with NVRTC cannot be loaded ({described(error)}): pip install 'hybridgen[cuda]'"
        ) from error
    return driver, nvrtc


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """What a call of the bindings returned beside its status.

    Raises:
        DeviceError: the status is not success.
    """
    status, *values = result
    if int(status) != 0:
        raise DeviceError(f"{what} failed with {status.name} ({int(status)})")
    return values[0] if len(values) == 1 else values


def driver_call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver; returns what it gives beside its status.

    Raises:
        Unfit: the bindings are not installed.
        DeviceError: the status is not success.
    """
    driver, _ = _bindings()
    return _checked(getattr(driver, name)(*arguments), name)


def driver_module() -> Any:
    """The driver's Python interface, for its enumerations.

    Raises:
        Unfit: the bindings are not installed.
    """
    return _bindings()[0]


@functools.cache
def sources(program: Program) -> dict[str, bytes]:
    """The kernel's files by name."""
    folders = [importlib.resources.files(folder) for folder in program.folders]
    found = {}
    for name in (program.source, *program.headers):
        folder = next(folder for folder in folders if (folder / name).is_file())
        found[name] = (folder / name).read_bytes()
    return found


def options(defines: Mapping[str, Any], architecture: str) -> list[str]:
    """NVRTC's command line."""
    return [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        "--device-as-default-execution-space",  # generic lambdas: NVRTC before 13.1 takes them for host functions
        *(f"-D{name}={value}" for name, value in sorted(defines.items())),
    ]


def key(defines: Mapping[str, Any], architecture: str, program: Program) -> str:
    """What distinguishes two compiled kernels: sources, constants, architecture and compiler."""
    _, nvrtc = _bindings()
    version = _checked(nvrtc.nvrtcVersion(), "nvrtcVersion")
    text = b"\0".join(
        [*sources(program).values(), *(o.encode() for o in options(defines, architecture)), str(version).encode()]
    )
    return hashlib.sha256(text).hexdigest()[:32]


def compile_cubin(defines: Mapping[str, Any], architecture: str, program: Program) -> bytes:
    """Machine code of the kernel for these constants; takes 2 to 9 s.

    Raises:
        Unfit: the compiler refuses, for example because a static rule of the kernel does not hold.
    """
    _, nvrtc = _bindings()
    files = sources(program)
    headers, names = [files[name] for name in program.headers], [name.encode() for name in program.headers]
    compiling = _checked(
        nvrtc.nvrtcCreateProgram(files[program.source], program.source.encode(), len(headers), headers, names),
        "nvrtcCreateProgram",
    )
    try:
        arguments = [option.encode() for option in options(defines, architecture)]
        (status,) = nvrtc.nvrtcCompileProgram(compiling, len(arguments), arguments)
        if int(status) != 0:
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(compiling), "nvrtcGetProgramLogSize"))
            nvrtc.nvrtcGetProgramLog(compiling, log)
            lines = [line for line in log.decode(errors="replace").splitlines() if "error" in line]
            raise Unfit(f"the kernel does not compile for this shape: {lines[0] if lines else status.name}")
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(compiling), "nvrtcGetCUBINSize"))
        _checked(nvrtc.nvrtcGetCUBIN(compiling, code), "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(compiling)
    return bytes(code)


def machine_code(
    defines: Mapping[str, Any], capability: tuple[int, int], program: Program, kept: Keeper | None = None
) -> bytes:
    """The program for a device of this compute capability, compiled where it is not kept.

    Raises:
        Unfit: see `compile_cubin`.
    """
    architecture = f"sm_{capability[0]}{capability[1]}{'a' if capability[0] >= 9 else ''}"

    def make() -> bytes:
        return compile_cubin(defines, architecture, program)

    return make() if kept is None else kept(key(defines, architecture, program), make)


class Kernel:
    """A loaded kernel; the device's context must be current."""

    def __init__(self, cubin: bytes, shared_bytes: int, program: Program) -> None:
        driver, _ = _bindings()
        self._driver = driver
        self._module = _checked(driver.cuModuleLoadData(cubin), "cuModuleLoadData")
        self._function = _checked(
            driver.cuModuleGetFunction(self._module, program.kernel.encode()), "cuModuleGetFunction"
        )
        dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, dynamic, shared_bytes), "cuFuncSetAttribute")
        self._shared_bytes = shared_bytes
        self._early: dict[tuple[int, int, int], Any] = {}

    def attribute(self, name: str) -> int:
        """A `CU_FUNC_ATTRIBUTE_...` of it, such as `NUM_REGS` or `LOCAL_SIZE_BYTES`."""
        which = getattr(self._driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        return int(_checked(self._driver.cuFuncGetAttribute(which, self._function), "cuFuncGetAttribute"))

    def launch(self, blocks: int, threads: int, parameters: Any, stream: int) -> None:
        """Launch cooperatively: all blocks at once on the device, or not at all.

        Args:
            parameters: the kernel's one argument, as it lies in memory.

        Raises:
            DeviceError: the driver refuses.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        result = self._driver.cuLaunchCooperativeKernel(
            self._function, blocks, 1, 1, threads, 1, 1, self._shared_bytes, stream, ctypes.addressof(pointers)
        )
        _checked(result, "cuLaunchCooperativeKernel")

    def launch_any(self, blocks: int, threads: int, parameters: Any, stream: int) -> None:
        """As `launch`, with blocks whenever there is room for them.

        Raises:
            DeviceError: the driver refuses.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        result = self._driver.cuLaunchKernel(
            self._function, blocks, 1, 1, threads, 1, 1, self._shared_bytes, stream, ctypes.addressof(pointers), 0
        )
        _checked(result, "cuLaunchKernel")

    def launch_early(self, blocks: int, threads: int, parameters: Any, stream: int) -> None:
        """As `launch_any`, and it may start while the kernel before it ends, for which it has to wait itself.

        Raises:
            DeviceError: the driver refuses.
        """
        driver = self._driver
        config = self._early.get((blocks, threads, stream))
        if config is None:
            early = driver.CUlaunchAttribute()
            early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            config = driver.CUlaunchConfig()
            config.gridDimX, config.blockDimX = blocks, threads
            config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
            config.sharedMemBytes, config.hStream = self._shared_bytes, driver.CUstream(stream)
            config.attrs, config.numAttrs = [early], 1
            self._early[blocks, threads, stream] = config
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0), "cuLaunchKernelEx")

    def close(self) -> None:
        """Unload it. Not while it runs or a graph holds it."""
        self._driver.cuModuleUnload(self._module)
