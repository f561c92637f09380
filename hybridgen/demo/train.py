"""Train the demo model: a byte-level BPE tokenizer and a small Llama on the standard library's source.

    python -m hybridgen.demo.train --output DIR
    python -m hybridgen.demo.train --output DIR --small      # seconds on a CPU; shows that the recipe runs

A fixed part of the library's files, chosen by the hash of their names, is held out of the training; the
checkpoint kept is the one with the least loss on them. DIR gets a Hugging Face checkpoint in bfloat16 and
`training.json`, which records versions, sizes, losses and sample texts.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybridgen.demo.corpus import (
    Document,
    batches,
    encode,
    line_starts,
    read_corpus,
    split_spaces,
    standard_library,
    train_tokenizer,
)
from hybridgen.demo.muon import Muon
from hybridgen.demo.recipe import SMALL, Recipe
from hybridgen.errors import ConfigError

log = logging.getLogger(__name__)

MAX_BYTES = 11_500_000
"""The checkpoint's files together may take this many bytes, since they ship inside the package."""
PROMPTS = ("def fibonacci(n):", "class ", "import ", "def read_lines(path):\n    ")


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


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for the embeddings and the norms, and for the layers' matrices where they are not Muon's."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() >= 2] if recipe.muon else []
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=model.device.type == "cuda")
    return [adamw, Muon(matrices, weight_decay=recipe.weight_decay)] if matrices else [adamw]


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """The rate of a step: linear warm-up by steps, times a line by `progress` (0 to 1) from 1 to 0."""
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * max(0.0, 1 - progress)


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
    model: LlamaForCausalLM,
    data: Iterator[torch.Tensor],
    recipe: Recipe,
    evaluate: Callable[[], float],
    began: float | None = None,
) -> Trained:
    """Train in place, and leave the weights for which `evaluate` (a held-out loss) was least.

    `recipe.seconds` count from `began`, a reading of `time.monotonic` (default: now).

    Raises:
        ConfigError: no held-out loss was a number.
    """
    optimizers = _optimizers(model, recipe)
    loss_sum = _compiled(model) if recipe.compile else token_losses
    first: torch.Tensor | None = None
    recent: deque[torch.Tensor] = deque(maxlen=50)
    best_loss, best_step, best = math.inf, 0, {}
    entered = time.monotonic()
    limit = math.inf if recipe.seconds is None else recipe.seconds + (began or entered) - entered
    ready, tokens, done, stale, finished = 0.0, 0, 0, 0, False
    bar = tqdm(total=recipe.steps, desc="train", unit="step", disable=None)
    while not finished:
        seconds = time.monotonic() - entered
        if done == 1:
            ready = seconds
        timed = (seconds - ready) / (limit - ready) if limit > ready else 1.0
        rate = learning_rate(recipe, done, max(done / recipe.steps, timed))
        batch = next(data)
        recent.append(_step(model, optimizers, loss_sum, batch, rate, recipe.clip))
        if first is None:
            first = recent[0]
            first.item()  # waits for the device: the schedule's clock starts when all is compiled
        done += 1
        tokens += batch[:, 1:].numel()
        bar.update()
        finished = done >= recipe.steps or time.monotonic() - entered >= limit
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
        seconds=time.monotonic() - entered,
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
    optimizers: list[torch.optim.Optimizer],
    loss_sum: Callable[..., torch.Tensor],
    batch: torch.Tensor,
    rate: float,
    clip: float,
) -> torch.Tensor:
    """One optimizer step; returns the loss before it, in nats per token."""
    targets = batch[:, 1:]
    with _autocast(batch.device):
        loss = loss_sum(_hidden(model, batch[:, :-1]), model.lm_head.weight, targets) / targets.numel()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
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
    """What the model writes after each of `PROMPTS`: greedily, and at temperature 0.7; without its penalty."""
    samples = []
    for temperature in (0.0, 0.7):
        torch.manual_seed(seed)
        how: dict[str, Any] = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0}
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").to(model.device)
            config = GenerationConfig(**how, repetition_penalty=1.0, max_new_tokens=new_tokens)
            out = model.generate(**ids, generation_config=config)[0, ids["input_ids"].shape[1] :]
            text = tokenizer.decode(out, skip_special_tokens=True)
            samples.append({"prompt": prompt, "temperature": temperature, "text": text})
    return samples


def _by_folder(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """How many files and bytes of each further folder were trained on."""
    found: dict[str, list[int]] = {}
    for document in documents:
        found.setdefault(document.name.split("/")[0], []).append(len(document.text.encode()))
    return [{"name": name, "files": len(sizes), "bytes": sum(sizes)} for name, sizes in found.items()]


def run(
    recipe: Recipe,
    output: Path,
    *,
    corpus: Path | None = None,
    corpus_name: str | None = None,
    also: Sequence[Path] = (),
    device: str = "cpu",
) -> dict[str, Any]:
    """Read the corpus, train tokenizer and model, write the checkpoint; returns what `training.json` holds.

    `also` are folders of further files to train on. The tokenizer and the held-out files come from the corpus.

    The held-out loss in it is of the weights as saved (bfloat16), read back and computed in float32.

    Raises:
        ConfigError: the corpus is too small, or the checkpoint's files take over `MAX_BYTES`.
    """
    began = time.monotonic()
    torch.manual_seed(recipe.seed)
    where = torch.device(device)
    documents = read_corpus(corpus or standard_library(), recipe, also)
    tokenizer = train_tokenizer(documents.train, recipe.vocab_size, recipe.max_positions)
    ids = encode(tokenizer, documents.train)
    corpus_tokens = len(ids)
    if documents.further:
        ids = torch.cat([ids.repeat(recipe.corpus_repeats), encode(tokenizer, documents.further)])
    ids = split_spaces(tokenizer, ids, recipe.space_share, recipe.seed)
    data = batches(ids.to(where), line_starts(tokenizer, ids), recipe)
    unseen = encode(tokenizer, documents.held_out).to(where)
    unseen_bytes = sum(len(d.text.encode()) for d in documents.held_out)
    model = build_model(recipe, tokenizer)
    torch.nn.Module.to(model, where)
    parameters = sum(p.numel() for p in model.parameters())
    log.info(
        "%.0f s  %d training tokens an epoch, %d of them the corpus once, %d held out, %d parameters",
        *(time.monotonic() - began, len(ids), corpus_tokens, len(unseen), parameters),
    )

    def evaluate() -> float:
        with _autocast(where):
            return held_out_loss(model, unseen, unseen_bytes, length=recipe.seq_len).nats_per_token

    trained = train(model, data, recipe, evaluate, began)
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
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "corpus": {
            "name": corpus_name or ("a folder given" if corpus else library),
            "train_files": len(documents.train),
            "train_bytes": sum(len(d.text.encode()) for d in documents.train),
            "train_tokens": corpus_tokens,
            "further": _by_folder(documents.further),
            "epoch_tokens": len(ids),
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
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder of further .py files to train on, such as another package; may be given often",
    )
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
        also=options.also,
        device=options.device,
    )
    for sample in report["samples"]:
        log.info("--- temperature %s\n%s%s", sample["temperature"], sample["prompt"], sample["text"])


if __name__ == "__main__":
    main()
