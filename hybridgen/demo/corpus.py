"""What the demo model is trained on: source files, their tokenizer, and batches of token ids."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hybridgen.demo.recipe import Recipe
from hybridgen.errors import ConfigError

END = "<|endoftext|>"
PAD = "<|pad|>"
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
SKIPPED = (
    "site-packages/*",
    "dist-packages/*",
    "config-*/*",
    "_sysconfigdata*",  # generated at the build, with the paths of the machine that built it
    "encodings/*",  # mostly generated tables, near copies of each other
    "pydoc_data/*",  # generated from the documentation
    "lib2to3/*",  # copies of other modules; held-out files would not be unseen
    "*_vendor/*",  # copies of other packages, under licences of their own
    "*vendored/*",
)
MOST_CHARACTERS = 200_000
"""Longer files of further folders are left out: most are tables, or code that a program wrote."""
RUN_LINES = 3
"""Lines of a run; files are compared by the runs that they have in common."""
SHARED_RUNS = 5
"""A further file with so many runs of held-out files is left out."""

# Pieces that no token crosses: line ends; a line's indentation, whole; words with the underscores before
# them; numbers of up to three digits; other characters. Line end and indentation are apart so that a prompt
# may end after either and still be split as in training.
PIECES = (
    r"[\r\n]+|(?<![^\r\n])[ \t]+(?=\S|$)| ?_*\p{L}[\p{L}\p{M}]*| ?\p{N}{1,3}| ?_+| ?[^\s\p{L}\p{N}_]+"
    r"|[ \t]+(?=[\r\n]|$)|\s+(?!\S)|\s+"
)


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
    further: tuple[Document, ...] = ()
    """Trained on as well, from other folders; the tokenizer does not count them."""


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


def line_runs(text: str) -> set[int]:
    """Hashes of the text's runs of `RUN_LINES` lines; blank lines and the space around lines do not count."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    return {hash(tuple(lines[i : i + RUN_LINES])) for i in range(len(lines) - RUN_LINES + 1)}


def further_documents(folder: Path, held_out: set[int], seen: set[int]) -> Iterator[Document]:
    """The files under `folder` that are new: of their runs of lines less than half are in `seen`.

    Files with `SHARED_RUNS` or more runs in `held_out` are left out, for they hold a copy of a held-out file
    or of a piece of one. `seen` grows by the runs of the files that are kept. Names begin with the folder's.
    """
    for document in read_documents(folder):
        runs = line_runs(document.text)
        if not runs or len(document.text) > MOST_CHARACTERS:
            continue
        if len(runs & held_out) >= SHARED_RUNS or 2 * len(runs & seen) >= len(runs):
            continue
        seen |= runs
        yield Document(f"{folder.name}/{document.name}", document.text)


def read_corpus(root: Path, recipe: Recipe, also: Sequence[Path] = ()) -> Corpus:
    """Split the source under `root`; the library files (not tests) whose names hash lowest are held out.

    Files under the folders `also` are trained on too, as `further_documents` chooses them: near copies of
    what is there already and of what is held out stay out.

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
    if not also:
        return Corpus(kept, held_out)
    seen = set[int]().union(*(line_runs(d.text) for d in kept))
    # Runs that training files have anyway (headers, the usual imports) do not show a copy.
    apart = set[int]().union(*(line_runs(d.text) for d in held_out)) - seen
    further = [d for folder in also for d in further_documents(folder, apart, seen)]
    return Corpus(kept, held_out, tuple(further))


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
    parts = [torch.tensor([end])]
    for first in range(0, len(documents), 256):  # an encoding takes many times its ids' memory
        texts = [d.text for d in documents[first : first + 256]]
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts)
        parts.append(torch.tensor([i for encoding in encodings for i in (*encoding.ids, end)]))
    return torch.cat(parts)


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
