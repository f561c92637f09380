"""Whether somebody looks on while something runs: a compiler, a dispatch mode, hooks of modules."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_IDLE = frozenset(
    {
        "transformers.utils.output_capturing",
        "transformers.modeling_utils",
        "compressed_tensors.compressors.model_compressors.model_compressor",
    }
)
"""transformers leaves hooks of these modules behind: once somebody asked for hidden states, and for training with
checkpointed activations (`enable_input_require_grads`). They change nothing that a step computes. Nor does
compressed-tensors' hook, which decompresses its layers before their first forward: here they are read as they are."""


def is_watched() -> bool:
    """Whether a compiler traces what runs, or a dispatch mode records it (`compilation.step_graph`): then the
    registered operators have to run, which costs the host more than the functions behind them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a module's forward, or changes it."""
    tables = module._forward_hooks, module._forward_pre_hooks
    return any(getattr(hook, "__module__", None) not in _IDLE for table in tables if table for hook in table.values())


def is_unheard(module: nn.Module) -> bool:
    """Whether nobody listens to the forward of a module, or of one inside it."""
    return not has_global_hooks() and not any(map(has_forward_hooks, module.modules()))


def has_global_hooks() -> bool:
    """Whether somebody listens to the forwards of all modules of the process."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls, or changes them."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, table) for table in tables)
