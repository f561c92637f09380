"""What the demo model is, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hybridgen.errors import ConfigError

_MAY_BE_ZERO = ("seconds", "weight_decay", "space_share", "aligned_share", "tests", "seed", "compile", "muon")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, and how.

    Raises:
        ConfigError: a value cannot work.
    """

    vocab_size: int = 4096
    """Tokens in the vocabulary, the 256 bytes and two special tokens included."""
    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 704
    max_positions: int = 1024
    """The context length that the checkpoint's config states."""
    seq_len: int = 1024
    """Tokens per training sequence."""
    batch_size: int = 64
    """Sequences per step."""
    steps: int = 8400
    """Optimizer steps; the learning rate reaches its end at the last of them."""
    seconds: float | None = None
    """Wall-clock limit, from the start of the run to the end of the training loop. The schedule follows time
    where that is ahead of the steps; it begins after the first step, which compiles."""
    learning_rate: float = 6e-3
    """The highest rate, after the warm-up; a line takes it to zero."""
    muon: bool = True
    """Step the layers' matrices by Muon instead of AdamW."""
    warmup_steps: int = 300
    weight_decay: float = 0.3
    """On the matrices; vectors (norms) have none."""
    clip: float = 1.0
    """The gradient's norm at most."""
    eval_every: int = 250
    """Steps between two looks at the held-out loss."""
    patience: int = 15
    """Looks without a better held-out loss after which training ends."""
    held_out_share: float = 0.05
    """Share of the library's files held out."""
    space_share: float = 0.02
    """Share of the training tokens with a leading space that are split into the space and the rest, so that
    the model knows how to go on after a prompt that ends with a space."""
    aligned_share: float = 0.5
    """Share of the training sequences that begin at an unindented line, as prompts do; the others begin
    anywhere."""
    corpus_repeats: int = 2
    """How often an epoch has the corpus itself, where further folders are given; those it has once."""
    tests: bool = True
    """Also train on the files of the library's test packages."""
    seed: int = 0
    compile: bool = False
    """Compile the decoder layer and the loss with `torch.compile`."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in _MAY_BE_ZERO and value <= 0:
                raise ConfigError(f"{f.name}={value} is not positive; give a number above 0")
        if self.vocab_size < 258:
            raise ConfigError(f"vocab_size={self.vocab_size} cannot hold 256 bytes and 2 special tokens; raise it")
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            raise ConfigError(
                f"heads={self.heads} must divide hidden_size={self.hidden_size} into even sizes, "
                f"and kv_heads={self.kv_heads} must divide heads"
            )
        if self.seq_len > self.max_positions:
            raise ConfigError(f"seq_len={self.seq_len} is above max_positions={self.max_positions}; lower it")
        for name in ("held_out_share", "space_share", "aligned_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value} is no share; give a number from 0 to 1")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds} leaves no time to train; give a number above 0")


SMALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "intermediate_size": 128,
    "max_positions": 128,
    "seq_len": 64,
    "batch_size": 16,
    "steps": 60,
    "warmup_steps": 5,
    "learning_rate": 1e-2,
    "eval_every": 30,
    "held_out_share": 0.02,
    "tests": False,
}
"""Changes to the recipe under `--small`."""
