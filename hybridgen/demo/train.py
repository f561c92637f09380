"""Train the demo model: a byte-level BPE tokenizer and a small Llama on the standard library's source.

    python -m hybridgen.demo.train --output DIR
    python -m hybridgen.demo.train --output DIR --small      # seconds on a CPU; shows that the recipe runs

A fixed part of the library's files, chosen by the hash of their names, is held out of the training; the
checkpoint kept is the one with the least loss on them. DIR gets a Hugging Face checkpoint in bfloat16 and
`training.json`, which records versions, sizes, losses and sample texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import platform
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybridgen.errors import ConfigError

log = logging.getLogger(__name__)

END = "<|endoftext|>"
PAD = "<|pad|>"
MAX_BYTES = 11_500_000
"""The checkpoint's files together may take this many bytes, since they ship inside the package."""
PROMPTS = ("def fibonacci(n):", "class ", "import ", "def read_lines(path):\n    ")
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
SKIPPED = (
    "site-packages/*",
    "dist-packages/*",
    "config-*/*",
    "_sysconfigdata*",  # generated at the build, with the paths of the machine that built it
    "encodings/*",  # mostly generated tables, near copies of each other
    "pydoc_data/*",  # generated from the documentation
    "lib2to3/*",  # copies of other modules; held-out files would not be unseen
)

# Pieces that no token crosses: line ends; a line's indentation, whole; words with the underscores before
# them; numbers of up to three digits; other characters. Line end and indentation are apart so that a prompt
# may end after either and still be split as in training.
PIECES = (
    r"[\r\n]+|(?<![^\r\n])[ \t]+(?=\S|$)| ?_*\p{L}[\p{L}\p{M}]*| ?\p{N}{1,3}| ?_+| ?[^\s\p{L}\p{N}_]+"
    r"|[ \t]+(?=[\r\n]|$)|\s+(?!\S)|\s+"
)


_MAY_BE_ZERO = ("minutes", "weight_decay", "space_share", "aligned_share", "tests", "seed", "compile")


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
    batch_size: int = 32
    """Sequences per step."""
    steps: int = 6000
    """Optimizer steps; the learning rate reaches its end at the last of them."""
    minutes: float | None = None
    """Wall-clock limit of the training loop. The schedule follows time where that is ahead of the steps."""
    learning_rate: float = 3e-3
    """The highest rate, after the warm-up; a cosine takes it to a fiftieth."""
    warmup_steps: int = 200
    weight_decay: float = 1.0
    """On the matrices; vectors (norms) have none."""
    clip: float = 1.0
    """The gradient's norm at most."""
    eval_every: int = 200
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
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes={self.minutes} leaves no time to train; give a number above 0")


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


@dataclass(frozen=True, slots=True)
class Document:
    """One source file; `name` is its path inside the corpus, with forward slashes."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Source files, in the order of their names' hashes."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss on the held-out files."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    """Tokens that were predicted."""
    bytes: int
    """UTF-8 bytes of the files."""


@dataclass(frozen=True, slots=True)
class Trained:
    """How a training loop ended. Losses are in nats per token."""

    steps: int
    seconds: float
    tokens: int
    """Training tokens seen, repeats counted."""
    first_loss: float
    """Training loss of the first step."""
    last_loss: float
    """Mean training loss of the last fifty steps."""
    best_step: int
    """Step of the weights that were kept."""


def standard_library() -> Path:
    """Where this Python keeps the source of its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _is_test(name: str) -> bool:
    return not TEST_FOLDERS.isdisjoint(PurePosixPath(name).parts[:-1])


def read_documents(root: Path) -> Iterator[Document]:
    """The Python files under `root` that are UTF-8 and not in `SKIPPED`, by name; equal files once."""
    seen = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(fnmatchcase(name, pattern) for pattern in SKIPPED):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = _hash(text)
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield Document(name, text)


def read_corpus(root: Path, recipe: Recipe) -> Corpus:
    """Split the source under `root`; the library files (not tests) whose names hash lowest are held out.

    Raises:
        ConfigError: fewer than two library files, or none left to train on.
    """
    documents = sorted(read_documents(root), key=lambda d: _hash(d.name))
    library = [d for d in documents if not _is_test(d.name)]
    if len(library) < 2:
        raise ConfigError(f"the corpus {root} has {len(library)} usable .py files; give a folder with at least 2")
    held_out = tuple(library[: math.ceil(len(library) * recipe.held_out_share)])
    unseen = {d.name for d in held_out}
    kept = tuple(d for d in (documents if recipe.tests else library) if d.name not in unseen)
    if not kept:
        raise ConfigError(f"held_out_share={recipe.held_out_share} leaves no file to train on; lower it")
    return Corpus(kept, held_out)


def train_tokenizer(documents: Sequence[Document], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; any text encodes and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> torch.Tensor:
    """All documents as one row of token ids, `<|endoftext|>` before each and after the last."""
    end = tokenizer.convert_tokens_to_ids(END)
    ids = [end]
    for encoding in tokenizer.backend_tokenizer.encode_batch([d.text for d in documents]):
        ids += encoding.ids
        ids.append(end)
    return torch.tensor(ids, dtype=torch.long)


def split_spaces(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """`ids` with a random share of the tokens that begin with a space split into the space and the rest.

    The text stays the same. A token whose rest is no token itself stays whole.
    """
    vocabulary = tokenizer.get_vocab()
    space = vocabulary["Ġ"]  # byte-level BPE's spelling of a space
    rest = torch.full((len(tokenizer),), -1)
    for token, index in vocabulary.items():
        if token.startswith("Ġ") and not token.startswith("ĠĠ"):
            rest[index] = vocabulary.get(token[1:], -1)
    chance = torch.rand(len(ids), generator=torch.Generator().manual_seed(seed))
    split = (rest[ids] >= 0) & (chance < share)
    out = torch.full((len(ids), 2), -1)
    out[:, 0] = torch.where(split, space, ids)
    out[:, 1] = torch.where(split, rest[ids], -1)
    return out[out >= 0]


def line_starts(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> torch.Tensor:
    """Positions in `ids` where an unindented line begins, ascending."""
    ends, begins = torch.zeros(2, len(tokenizer), dtype=torch.bool)
    for token, index in tokenizer.get_vocab().items():
        # In byte-level BPE's spelling Ċ is a line feed, č a carriage return, Ġ a space, ĉ a tab.
        ends[index] = token == END or token[-1] == "Ċ"
        begins[index] = token != END and token[0] not in "ĊčĠĉ"
    return (ends[ids[:-1]] & begins[ids[1:]]).nonzero().squeeze(1) + 1


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised float32 model with room for the tokenizer's ids."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden_size // recipe.heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _parameter_groups(model: LlamaForCausalLM, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """The rate of a step: linear warm-up by steps, then a cosine by `progress` (0 to 1) to a fiftieth."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.learning_rate * warm * (0.02 + 0.98 * cosine)


def batches(stream: torch.Tensor, aligned: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Endless batches of `seq_len + 1` ids; each epoch cuts the stream at a new offset, in a new order.

    `aligned_share` of the cuts are moved back to the nearest of the positions in `aligned`.

    Raises:
        ConfigError: the stream has fewer than two sequences.
    """
    length = recipe.seq_len
    if len(stream) < 2 * length + 1:
        raise ConfigError(f"the corpus has {len(stream)} tokens, under 2 sequences of {length}; lower seq_len")
    generator = torch.Generator().manual_seed(recipe.seed)
    span = torch.arange(length + 1, device=stream.device)
    aligned = torch.cat([torch.zeros(1, dtype=torch.long), aligned])
    while True:
        offset = int(torch.randint(0, length, (), generator=generator))
        count = (len(stream) - 1 - offset) // length
        starts = torch.randperm(count, generator=generator) * length + offset
        moved = aligned[torch.searchsorted(aligned, starts, right=True) - 1]
        move = torch.rand(count, generator=generator) < recipe.aligned_share
        starts = torch.where(move, moved, starts).to(stream.device)
        # Whole batches only, where there is one: torch.compile would compile each other size anew.
        size = min(recipe.batch_size, count)
        for first in range(0, count - size + 1, size):
            yield stream[starts[first : first + size, None] + span]


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies, in nats; targets of -100 count nothing."""
    logits = F.linear(hidden, weight).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def _hidden(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, stream: torch.Tensor, text_bytes: int, *, length: int, batch_size: int = 16
) -> HeldOut:
    """Loss over `stream`, cut into windows of `length` tokens without overlap.

    Every token but the first is predicted once, the `<|endoftext|>` between files included, from what
    precedes it in its window; so the first tokens of a window have little context.
    """
    windows = math.ceil((len(stream) - 1) / length)
    padded = F.pad(stream, (0, windows * length + 1 - len(stream)), value=-100)
    inputs = padded[:-1].clamp(min=0).view(windows, length)
    targets = padded[1:].view(windows, length)
    total = 0.0
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        total += token_losses(_hidden(model, x), model.lm_head.weight, y).item()
    tokens = len(stream) - 1
    return HeldOut(total / tokens, total / math.log(2) / text_bytes, tokens, text_bytes)


def train(
    model: LlamaForCausalLM, data: Iterator[torch.Tensor], recipe: Recipe, evaluate: Callable[[], float]
) -> Trained:
    """Train in place, and leave the weights for which `evaluate` (a held-out loss) was least.

    Raises:
        ConfigError: no held-out loss was a number.
    """
    groups = _parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=model.device.type == "cuda")
    loss_sum = _compiled(model) if recipe.compile else token_losses
    first: torch.Tensor | None = None
    recent: deque[torch.Tensor] = deque(maxlen=50)
    best_loss, best_step, best = math.inf, 0, {}
    limit = math.inf if recipe.minutes is None else recipe.minutes * 60
    began, tokens, done, stale, finished = time.monotonic(), 0, 0, 0, False
    bar = tqdm(total=recipe.steps, desc="train", unit="step", disable=None)
    while not finished:
        seconds = time.monotonic() - began
        rate = learning_rate(recipe, done, max(done / recipe.steps, seconds / limit))
        batch = next(data)
        recent.append(_step(model, optimizer, loss_sum, batch, rate, recipe.clip))
        first = recent[0] if first is None else first
        done += 1
        tokens += batch[:, 1:].numel()
        bar.update()
        finished = done >= recipe.steps or seconds >= limit
        if finished or done % recipe.eval_every == 0:
            current, stale = evaluate(), stale + 1
            if current < best_loss:
                best_loss, best_step, stale = current, done, 0
                best = {name: value.detach().clone() for name, value in model.state_dict().items()}
            finished = finished or stale >= recipe.patience
            mean = torch.stack(list(recent)).mean().item()
            log.info("step %d  %.0f s  train %.4f  held out %.4f nats/token", done, seconds, mean, current)
    bar.close()
    if not best:
        raise ConfigError(f"the loss is not a number after {done} steps; lower learning_rate={recipe.learning_rate}")
    model.load_state_dict(best)
    assert first is not None
    return Trained(
        steps=done,
        seconds=time.monotonic() - began,
        tokens=tokens,
        first_loss=first.item(),
        last_loss=torch.stack(list(recent)).mean().item(),
        best_step=best_step,
    )


def _compiled(model: LlamaForCausalLM) -> Callable[..., torch.Tensor]:
    """Compile the model's layers in place, and `token_losses`."""
    # The layer rather than the model: transformers leaves the mask out of attention only outside of tracing.
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return torch.compile(token_losses, dynamic=False)


def _step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    loss_sum: Callable[..., torch.Tensor],
    batch: torch.Tensor,
    rate: float,
    clip: float,
) -> torch.Tensor:
    """One optimizer step; returns the loss before it, in nats per token."""
    targets = batch[:, 1:]
    with _autocast(batch.device):
        loss = loss_sum(_hidden(model, batch[:, :-1]), model.lm_head.weight, targets) / targets.numel()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss.detach()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the checkpoint in bfloat16; by default it decodes greedily, with a penalty because greedy text loops."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    output.mkdir(parents=True, exist_ok=True)
    torch.nn.Module.to(model, torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    # The file is laid out one merge part per line; without that it takes half the space.
    file = output / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    compact = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    file.write_text(compact + "\n", encoding="utf-8")


def directory_bytes(path: Path) -> int:
    """Size of the files directly in `path`, in bytes."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def sample_texts(model: Any, tokenizer: PreTrainedTokenizerFast, *, new_tokens: int, seed: int) -> list[dict[str, Any]]:
    """What the model writes after each of `PROMPTS`: greedily, and at temperature 0.7."""
    samples = []
    for temperature in (0.0, 0.7):
        torch.manual_seed(seed)
        how: dict[str, Any] = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0}
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").to(model.device)
            config = GenerationConfig(**how, max_new_tokens=new_tokens)
            out = model.generate(**ids, generation_config=config)[0, ids["input_ids"].shape[1] :]
            text = tokenizer.decode(out, skip_special_tokens=True)
            samples.append({"prompt": prompt, "temperature": temperature, "text": text})
    return samples


def run(
    recipe: Recipe,
    output: Path,
    *,
    corpus: Path | None = None,
    corpus_name: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Read the corpus, train tokenizer and model, write the checkpoint; returns what `training.json` holds.

    The held-out loss in it is of the weights as saved (bfloat16), read back and computed in float32.

    Raises:
        ConfigError: the corpus is too small, or the checkpoint's files take over `MAX_BYTES`.
    """
    torch.manual_seed(recipe.seed)
    where = torch.device(device)
    documents = read_corpus(corpus or standard_library(), recipe)
    tokenizer = train_tokenizer(documents.train, recipe.vocab_size, recipe.max_positions)
    ids = split_spaces(tokenizer, encode(tokenizer, documents.train), recipe.space_share, recipe.seed)
    data = batches(ids.to(where), line_starts(tokenizer, ids), recipe)
    unseen = encode(tokenizer, documents.held_out).to(where)
    unseen_bytes = sum(len(d.text.encode()) for d in documents.held_out)
    model = build_model(recipe, tokenizer)
    torch.nn.Module.to(model, where)
    parameters = sum(p.numel() for p in model.parameters())
    log.info("%d training tokens, %d held out, %d parameters", len(ids), len(unseen), parameters)

    def evaluate() -> float:
        with _autocast(where):
            return held_out_loss(model, unseen, unseen_bytes, length=recipe.seq_len).nats_per_token

    trained = train(model, data, recipe, evaluate)
    save(model, tokenizer, output)
    saved = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    torch.nn.Module.to(saved, where)
    loss = held_out_loss(saved, unseen, unseen_bytes, length=recipe.seq_len)
    library = f"the standard library of Python {platform.python_version()}"
    report: dict[str, Any] = {
        "recipe": asdict(recipe),
        "parameters": parameters,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "device": where.type,
        "corpus": {
            "name": corpus_name or ("a folder given" if corpus else library),
            "train_files": len(documents.train),
            "train_bytes": sum(len(d.text.encode()) for d in documents.train),
            "train_tokens": len(ids),
            "held_out_files": [d.name for d in documents.held_out],
        },
        "training": asdict(trained),
        "held_out": asdict(loss),
        "samples": sample_texts(saved, tokenizer, new_tokens=recipe.max_positions // 8, seed=recipe.seed),
    }
    (output / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    size = directory_bytes(output)
    log.info("held out %.4f nats/token, %.4f bits/byte; %d bytes", loss.nats_per_token, loss.bits_per_byte, size)
    if size > MAX_BYTES:
        raise ConfigError(f"{output} takes {size} bytes, over {MAX_BYTES}; train a smaller shape")
    return report


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    for f in fields(Recipe):
        flag = "--" + f.name.replace("_", "-")
        if isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            kind = int if isinstance(f.default, int) else float
            parser.add_argument(flag, type=kind, metavar="N", help=f"default {f.default}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `Recipe`'s fields as options, and where to read, write and compute."""
    parser = argparse.ArgumentParser("python -m hybridgen.demo.train", description="Train the demo model.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--corpus", type=Path, help="folder of .py files (default: the standard library)")
    parser.add_argument("--corpus-name", help="what training.json calls the corpus")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="a tiny model and a few steps")
    _recipe_arguments(parser)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = replace(Recipe(), **(SMALL if options.small else {}))
    given = {f.name: getattr(options, f.name) for f in fields(Recipe) if getattr(options, f.name) is not None}
    report = run(
        replace(recipe, **given),
        options.output,
        corpus=options.corpus,
        corpus_name=options.corpus_name,
        device=options.device,
    )
    for sample in report["samples"]:
        log.info("--- temperature %s\n%s%s", sample["temperature"], sample["prompt"], sample["text"])


if __name__ == "__main__":
    main()
