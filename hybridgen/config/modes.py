"""How steps run, and who records them."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """How the steps of the model run."""

    EAGER = "eager"
    """PyTorch operators, one at a time."""
    JIT = "jit"
    """The decoder layer compiled with `torch.compile`; dynamic sizes; no graphs."""
    GRAPH = "graph"
    """PyTorch's own kernels, recorded in CUDA graphs of decode batches and prompt lengths."""
    HYBRID = "hybrid"
    """The compiled layer, recorded in CUDA graphs."""
    AUTO = "auto"
    """`hybrid` on CUDA. On a CPU what has been compiled, while the rest is compiled behind; see docs/modes.md."""

    @property
    def compiles(self) -> bool:
        """Whether the decoder layer is compiled."""
        return self in (Mode.JIT, Mode.HYBRID)

    @property
    def records(self) -> bool:
        """Whether steps are recorded."""
        return self in (Mode.GRAPH, Mode.HYBRID)

    def on(self, device_type: str) -> Mode:
        """The mode that runs on such a device: what `auto` stands for, else itself. For `auto` on a CPU, where nothing
        can be compiled behind (`compilation.store.session.mode_of`)."""
        if self is not Mode.AUTO:
            return self
        return Mode.HYBRID if device_type == "cuda" else Mode.EAGER


class GraphOwner(StrEnum):
    """Who records and replays steps on CUDA."""

    MANUAL = "manual"
    """Captured by hand into one pool: buckets with padding."""
    TREES = "trees"
    """Inductor's cudagraph trees: the whole step compiled with `mode="reduce-overhead"`."""
    BOTH = "both"
    """By hand for the buckets; trees for decode sizes between them, recorded while idle."""
