"""Whether somebody looks at the operators that run, and not only at what they leave."""

from __future__ import annotations

import torch


def is_watched() -> bool:
    """Whether a compiler traces what runs, or a dispatch mode records it (`compilation.step_graph`): then the
    registered operators have to run, which costs the host more than the functions behind them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
