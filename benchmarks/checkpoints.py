"""Checkpoints of published shapes with random weights, on this machine's disk: what `hybridgen serve` loads."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from common import shape_config
from transformers import AutoModelForCausalLM

from hybridgen.demo import model_path


def write_checkpoint(name: str, directory: Path, dtype: torch.dtype, device: str) -> None:
    """Write a model of that shape with random weights from seed 0, and a tokenizer with a text for each of its ids.

    The tokenizer is the demo model's, with invented words behind its own ids: every token that comes out becomes text,
    as with a published model.

    Args:
        directory: an empty one, or one that is not there.
        device: where the weights are drawn.
    """
    data = json.loads((model_path() / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    torch.manual_seed(0)
    config = shape_config(name)
    config.vocab_size = max(config.vocab_size, len(vocabulary) + 64)
    config.bos_token_id = config.eos_token_id = 0
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.pad_token_id = 1
    model.save_pretrained(directory)
    words(vocabulary, config.vocab_size)
    (directory / "tokenizer.json").write_text(json.dumps(data))
    shutil.copy(model_path() / "tokenizer_config.json", directory)


def words(vocabulary: dict[str, int], size: int) -> None:
    """Fill a vocabulary up to a size: most with a space in front, as in published ones; some with a mark behind."""
    draw = random.Random(0)
    while len(vocabulary) < size:
        letters = "".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(3, 9)))
        word = draw.choice(("Ġ", "Ġ", "")) + letters + draw.choice(("",) * 16 + (",", ".", '"', '",', ":", "("))
        vocabulary.setdefault(word, len(vocabulary))
