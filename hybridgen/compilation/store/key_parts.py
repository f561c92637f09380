"""What a key is made of: everything that decides what compilers make, by name."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from hybridgen._version import __version__
from hybridgen.compilation.store.key import Key
from hybridgen.config import EngineConfig

_NOT_ARCHITECTURE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "pad_token_id",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of a model's config that say nothing about its computation: where it is from, its tokens, how it
was trained. The class has a part of its own."""
_SOURCES = (
    "device",
    "kernels",
    "cache",
    "sampling",
    "models",
    "compilation/layers.py",
    "compilation/aot.py",
    "compilation/step_graph.py",
    "compilation/worker.py",
    "fused",
    "execution",
)
"""What is traced, and what decides how it is called."""
_ENVIRONMENT = ("TORCHINDUCTOR_", "TORCH_COMPILE_", "TORCHDYNAMO_", "TRITON_", "CXX", "PTXAS")
_DIRECTORIES = frozenset({"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME"})


def key_of(
    hf_config: PreTrainedConfig,
    model_class: type | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    config: EngineConfig,
    weights: str,
    **resolved: Any,
) -> Key:
    """The key of an engine's entry. The weights' values are not in it: a fine-tune of the same shape has the same.

    Args:
        model_class: the model's class, for the hash of its source; None where it is not known before loading.
        weights: the formats of the model's weights, as their provider's `identity` says.
        resolved: settings that the config leaves open, as the engine decided them (mode, token budget, context).
    """
    parts: dict[str, Any] = {}
    parts.update(_versions())
    parts.update(_machine(device))
    parts["hybridgen"] = __version__
    parts["hybridgen sources"] = source_hash()
    parts["model class"] = None if model_class is None else f"{model_class.__module__}.{model_class.__qualname__}"
    parts["model sources"] = _class_hash(model_class)
    parts["weights"] = weights
    parts["dtype"] = str(dtype).removeprefix("torch.")
    parts.update(_architecture(hf_config))
    parts.update({f"config.{name}": _plain(getattr(config, name)) for name in config.key_fields()})
    parts.update({f"config.{name}": _plain(value) for name, value in resolved.items()})
    parts.update(_compiler_settings())
    return Key(parts)


def device_name(device: torch.device) -> str:
    """What device documents are about: GPU and driver, or the processor."""
    if device.type != "cuda":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.major}.{properties.minor}, driver {_driver()}"


def _versions() -> dict[str, Any]:
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "triton": _version("triton"),
        "transformers": transformers.__version__,
        "CUDA": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _processor() -> str:
    """A hash of the processor's name and instructions: Inductor's C++ is compiled for exactly these."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    found = sorted({line for line in lines if line.split(":")[0].strip() in wanted})
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        # Inductor's C++ is made for the vector instructions and the number of threads.
        return {
            "device": "cpu",
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_processor()}",
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        # Inductor's artifacts hold the device's index.
        "device": f"cuda:{device.index or 0}",
        "GPU": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
    }


def _driver() -> str:
    """The version of NVIDIA's kernel driver; where its file cannot be read, the CUDA version that the driver offers."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        return next(word for word in text.split() if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        version = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")  # only in builds with CUDA
        return f"CUDA {version()}"


def _architecture(hf_config: PreTrainedConfig) -> dict[str, Any]:
    values = {name: value for name, value in hf_config.to_dict().items() if name not in _NOT_ARCHITECTURE}
    quantization = values.pop("quantization_config", None)
    return {f"model.{name}": _plain(value) for name, value in values.items()} | {"quantization": _plain(quantization)}


def _compiler_settings() -> dict[str, Any]:
    """What reaches compilers by other ways than the config."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    environment = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_ENVIRONMENT) and name not in _DIRECTORIES and not _is_torchs(name, value)
    }
    return {
        "environment": environment,
        **{
            name: _changed_settings(module)
            for name, module in (("Inductor", inductor), ("AOTAutograd", functorch), ("Dynamo", dynamo))
        },
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "reduced precision": [
            str(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
            str(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction),
        ],
    }


def _is_torchs(name: str, value: str) -> bool:
    """Whether torch has set a variable, and no user: to the assembler that it brings, at its first compilation. Later
    engines of the process and its child processes have it then, and earlier ones had not."""
    return name == "TRITON_PTXAS_PATH" and Path(value).is_relative_to(Path(torch.__file__).parent)


def _changed_settings(module: Any) -> dict[str, Any]:
    """Settings of a torch config module that are not its defaults, which the version of torch stands for."""
    # The entries are private: without them, all settings are named. Not `_is_default`, which a patch that has ended
    # leaves false.
    entries = getattr(module, "_config", {})
    return {
        name: _plain(value)
        for name, value in sorted(module.get_config_copy().items())
        if value != getattr(entries.get(name), "default", None)
    }


def source_hash(root: Path | None = None) -> str:
    """SHA-256 of hybridgen's own sources that are traced or decide about it.

    Raises:
        FileNotFoundError: one of `_SOURCES` has no file. Hashed as nothing, it would let code that changed be taken for
            the code that an entry was made with.
    """
    root = Path(__file__).resolve().parents[2] if root is None else root
    digest = hashlib.sha256()
    for name in _SOURCES:
        files = _files(str(root / name))
        if not files:
            raise FileNotFoundError(
                f"{root / name} has no source files, and the compile cache's key is made of them; correct _SOURCES in "
                f"{Path(__file__).name}"
            )
        for file in files:
            with open(file, "rb", buffering=0) as stream:
                digest.update(f"{file[len(str(root)) + 1 :]}\0".encode() + stream.read() + b"\0")
    return digest.hexdigest()


def _files(path: str) -> list[str]:
    """A file, or all sources in a directory. Not by pathlib: every start waits for it."""
    if os.path.isfile(path):
        return [path]
    found = [f"{folder}{os.sep}{name}" for folder, _, names in os.walk(path) for name in names]
    return sorted(name for name in found if name.endswith((".py", ".cu", ".cuh")))


def _class_hash(model_class: type | None) -> str | None:
    """SHA-256 of the files that define a model's classes, torch's own apart (its version stands for those)."""
    if model_class is None:
        return None
    files = set()
    for owner in model_class.__mro__:
        if owner.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        module = sys.modules.get(owner.__module__)
        try:
            files.add(inspect.getfile(module if module is not None else owner))
        except (TypeError, OSError):  # made in a notebook or at run time: what is traced of it is checked by units
            continue
    digest = hashlib.sha256()
    for path in sorted(files, key=os.path.basename):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if value is None or isinstance(value, (bool, int, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)  # no address
    return str(value)
