"""The shipped demo checkpoint, and the recipe that made it (on a corpus and a model of seconds)."""

from __future__ import annotations

import ast
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybridgen.demo
import hybridgen.demo.corpus as corpus_module
from hybridgen.demo import model_path, train
from hybridgen.demo.corpus import (
    END,
    Document,
    batches,
    encode,
    line_starts,
    read_corpus,
    split_spaces,
    train_tokenizer,
)
from hybridgen.demo.muon import Muon, orthogonalised
from hybridgen.demo.recipe import SMALL, Recipe
from hybridgen.errors import ConfigError, LoadError, ModelNotFoundError

SNIPPET = '''\
import os
import json


class Settings:
    """Settings of a program, kept in a file."""

    def __init__(self, path, default=None):
        self.path = path
        self.values = dict(default or {})

    def load(self):
        """Read the file. Return False if it does not exist."""
        if not os.path.exists(self.path):
            return False
        with open(self.path, encoding="utf-8") as f:
            data = json.load(f)
        if not isinstance(data, dict):
            raise ValueError("not a dictionary: %r" % (data,))
        for key, value in data.items():
            self.values[key] = value
        return True

    def save(self):
        with open(self.path, "w", encoding="utf-8") as f:
            json.dump(self.values, f, indent=4)

    def get(self, key, default=None):
        try:
            return self.values[key]
        except KeyError:
            return default
'''
PROMPTS = (
    "def is_prime(n):\n    if",
    "class Point:\n    def __init__(self, x, y):\n",
    "def add(a, b):\n    return",
    "class Stack:\n    ",
)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@torch.no_grad()
def nats_per_token(model, tokenizer, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt").input_ids
    return F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item()


@torch.no_grad()
def greedy(model, tokenizer, prompt: str, new_tokens: int, **options) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    options = {"repetition_penalty": 1.0} | options
    out = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False, **options)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def parsed_lines(text: str) -> int:
    """How many of the text's lines, from the first, Python parses (the last is taken as unfinished)."""
    lines = text.split("\n")[:-1]
    for count in range(len(lines), 0, -1):
        try:
            ast.parse("\n".join(lines[:count]) + "\n")
        except SyntaxError:
            continue
        return count
    return 0


def test_parsed_lines_counts_only_what_parses():
    assert parsed_lines("x = 1\ny = 2\nz = (") == 2
    assert parsed_lines("def f(\n    the of and\n") == 0


def test_shipped_checkpoint_is_complete_and_small():
    files = {file.name for file in model_path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= files
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
        "LICENSE-PYTHON.txt",
        "LICENSES-PACKAGES.txt",
    } <= files
    assert train.directory_bytes(model_path()) <= train.MAX_BYTES


def test_absent_checkpoint_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(hybridgen.demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelNotFoundError, match="install") as caught:
        model_path()
    assert isinstance(caught.value, LoadError)
    assert str(tmp_path) in str(caught.value)


def test_shipped_checkpoint_loads(model, tokenizer):
    config = model.config
    assert config.model_type == "llama"
    assert config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer) == 4096
    assert config.max_position_embeddings == tokenizer.model_max_length == 1024
    assert str(config.dtype) in ("torch.bfloat16", "torch.float32")
    assert json.loads((model_path() / "config.json").read_text())["dtype"] == "bfloat16"
    assert tokenizer.eos_token == tokenizer.bos_token == END
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not model.generation_config.do_sample
    assert model.generation_config.repetition_penalty == 1.2
    # Else a prompt would carry tokens that training never put there.
    assert tokenizer("x").input_ids == tokenizer("x", add_special_tokens=False).input_ids


def test_record_matches_the_checkpoint(model):
    record = json.loads((model_path() / "training.json").read_text(encoding="utf-8"))
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["held_out"]["nats_per_token"] < math.log(model.config.vocab_size)
    readme = (model_path().parent / "README.md").read_text(encoding="utf-8")
    for figure in (record["held_out"]["nats_per_token"], record["held_out"]["bits_per_byte"]):
        assert f"{figure:.4f}" in readme


@pytest.mark.parametrize(
    "text",
    [
        SNIPPET,
        "",
        " ",
        "  lead and trail  ",
        "\ttabs\r\n\r\nand\r returns \n\n   \n",
        "naïve 日本語 🙂 e\u0301 \u200b\ufeff \u2028 \x00\x07\x7f",
        "1234567 0xFF ___a__b_ ->*@",
    ],
)
def test_tokenizer_gives_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_gives_random_text_back(tokenizer):
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]
    for _ in range(500):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(30)))
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_keeps_indentation_whole(tokenizer):
    for width in (4, 8, 12, 16):
        tokens = [tokenizer.decode([i]) for i in tokenizer("x:\n" + " " * width + "return").input_ids]
        assert tokens[-2:] == [" " * width, "return"]


def test_loss_on_unseen_python(model, tokenizer):
    loss = nats_per_token(model, tokenizer, SNIPPET)
    assert loss < 2.0
    # The order of the words matters to it: it is no count of frequent tokens.
    words = SNIPPET.split(" ")
    random.Random(0).shuffle(words)
    assert nats_per_token(model, tokenizer, " ".join(words)) > loss + 1


def test_greedy_text_is_python(model, tokenizer):
    counts = [parsed_lines(greedy(model, tokenizer, prompt, 64)) for prompt in PROMPTS]
    assert sum(count >= 5 for count in counts) >= 3, counts


def test_function_gets_an_indented_body(model, tokenizer):
    prompt = "def main():"  # the README's
    text = greedy(model, tokenizer, prompt, 128, repetition_penalty=1.2)
    assert text.startswith(prompt + "\n    ")
    assert parsed_lines(text) >= 8


def test_every_package_that_was_read_has_its_licence():
    record = json.loads((model_path() / "training.json").read_text(encoding="utf-8"))
    notices = (model_path() / "LICENSES-PACKAGES.txt").read_text(encoding="utf-8").replace("\n", " ")
    names = [f["name"] for f in record["corpus"]["further"] if not f["name"].startswith("python-3")]
    assert names
    assert [name for name in names if name not in notices] == []


def test_text_goes_on_after_a_space(model, tokenizer):
    for prompt in ("class ", "import "):
        rest = greedy(model, tokenizer, prompt, 8)[len(prompt) :]
        assert rest[:1].isidentifier(), rest


def source(number: int) -> str:
    """A module of the tiny corpus."""
    lines = [f"def function_{number}_{i}(a, b):\n    return a + b * {i}\n\n" for i in range(20)]
    return "import os\n\n\n" + "\n".join(lines)


@pytest.fixture
def corpus(tmp_path) -> Path:
    root = tmp_path / "corpus"
    for name in ("test", "pkg/tests", "site-packages", "lib2to3"):
        (root / name).mkdir(parents=True)
    for number in range(8):
        (root / f"module_{number}.py").write_text(source(number), encoding="utf-8")
    (root / "test/test_it.py").write_text(source(100), encoding="utf-8")
    (root / "pkg/tests/test_pkg.py").write_text(source(101), encoding="utf-8")
    (root / "pkg/copy.py").write_text(source(0), encoding="utf-8")
    (root / "site-packages/other.py").write_text(source(102), encoding="utf-8")
    (root / "lib2to3/tokenize.py").write_text(source(103), encoding="utf-8")
    (root / "_sysconfigdata_x.py").write_text(source(104), encoding="utf-8")
    (root / "latin.py").write_bytes("# é\n".encode("latin-1"))
    (root / "empty.py").write_text("\n", encoding="utf-8")
    (root / "notes.txt").write_text("no Python", encoding="utf-8")
    return root


def small(**changes) -> Recipe:
    return Recipe(**{**SMALL, **changes})


def test_corpus_skips_and_splits(corpus):
    with_tests = read_corpus(corpus, small(tests=True, held_out_share=0.25))
    library = read_corpus(corpus, small(tests=False, held_out_share=0.25))
    modules = {f"module_{n}.py" for n in range(8)}
    assert with_tests.held_out == library.held_out
    assert len(library.held_out) == 2
    held_out = {d.name for d in library.held_out}
    # The first of two equal files stays.
    assert held_out | {d.name for d in library.train} == modules
    tests = {"test/test_it.py", "pkg/tests/test_pkg.py"}
    assert {d.name for d in with_tests.train} == modules - held_out | tests


def test_held_out_files_do_not_depend_on_where_the_corpus_lies(corpus, tmp_path):
    moved = tmp_path / "elsewhere"
    before = read_corpus(corpus, small())
    corpus.rename(moved)
    assert read_corpus(moved, small()) == before


def test_further_folders_add_what_is_new(corpus, tmp_path, monkeypatch):
    more = tmp_path / "package-1.0"
    (more / "sub_vendor").mkdir(parents=True)
    held_out = read_corpus(corpus, small()).held_out[0].text
    texts = {
        "new.py": source(200),
        "twice.py": source(200) + "# a comment at the end\n",
        "near.py": source(1).replace("a + b * 3", "a + b * 33"),
        "leak.py": source(201) + held_out[: len(held_out) // 2],
        "sub_vendor/other.py": source(202),
        "long.py": source(203) + source(204),
        "one_line.py": "x = 1\n",
    }
    for name, text in texts.items():
        (more / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(corpus_module, "MOST_CHARACTERS", max(len(text) for text in texts.values()) - 1)
    read = read_corpus(corpus, small(), [more])
    assert [d.name for d in read.further] == ["package-1.0/new.py"]
    assert replace(read, further=()) == read_corpus(corpus, small())


def test_too_small_a_corpus_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="0 usable"):
        read_corpus(tmp_path, small())
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    with pytest.raises(ConfigError, match="no file to train on"):
        read_corpus(tmp_path, small(held_out_share=0.9))
    with pytest.raises(ConfigError, match="lower seq_len"):
        train.run(small(), tmp_path / "out", corpus=tmp_path)


def test_recipe_runs_and_learns(corpus, tmp_path):
    output = tmp_path / "out"
    where = ["--output", str(output), "--corpus", str(corpus), "--device", "cpu"]
    train.main([*where, "--small", "--steps", "45"])
    record = json.loads((output / "training.json").read_text(encoding="utf-8"))
    assert record["recipe"]["steps"] == record["training"]["steps"] == 45
    assert record["recipe"]["hidden_size"] == SMALL["hidden_size"]
    assert record["training"]["first_loss"] > 5  # near the uniform log(384) = 5.95
    assert record["training"]["last_loss"] < record["training"]["first_loss"] - 1.5
    assert record["held_out"]["nats_per_token"] < record["training"]["first_loss"] - 1.5
    assert str(tmp_path) not in json.dumps(record)
    assert len(record["samples"]) == 2 * len(train.PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(output)
    held_out = "".join(d.text for d in read_corpus(corpus, small()).held_out)
    assert nats_per_token(model.float(), tokenizer, held_out[:300]) < 4


def test_checkpoint_over_the_limit_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="over 1000"):
        train.run(small(steps=1), tmp_path / "out", corpus=corpus)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonalised_takes_singular_values_to_about_one(shape):
    torch.manual_seed(0)
    update = torch.randn(3, *shape)
    values = torch.linalg.svdvals(orthogonalised(update))
    assert values.min() > 0.4
    assert values.max() < 1.3
    # Each matrix of the batch by itself, and the same directions.
    assert torch.allclose(orthogonalised(update[1:2]), orthogonalised(update)[1:2], atol=1e-5)
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    assert torch.cosine_similarity(orthogonalised(update).flatten(), (left @ right).flatten(), dim=0) > 0.9


def test_muon_steps_by_the_rate_and_decays():
    torch.manual_seed(0)
    pair = [torch.nn.Parameter(torch.randn(16, 8)) for _ in range(2)]
    other = torch.nn.Parameter(torch.randn(8, 16))
    still = torch.nn.Parameter(torch.ones(8, 8))
    before = [p.detach().clone() for p in (*pair, other)]
    optimizer = Muon([*pair, other, still], lr=0.01, weight_decay=0.5)
    for p in (*pair, other):
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, old in zip((*pair, other), before, strict=True):
        moved = p.detach() - old * (1 - 0.01 * 0.5)
        # The root mean square is 0.2 of the rate, as AdamW's, up to how near to 1 the singular values are.
        assert 0.6 < moved.square().mean().sqrt().item() / (0.2 * 0.01) < 1.3
        assert (moved * p.grad).sum() < 0
    assert torch.equal(still, torch.ones(8, 8))


@pytest.fixture(scope="module")
def tiny():
    documents = [Document(f"{n}.py", source(n)) for n in range(3)]
    tokenizer = train_tokenizer(documents, 320, 128)
    return tokenizer, encode(tokenizer, documents)


def test_training_keeps_the_best_weights_and_stops(tiny):
    tokenizer, ids = tiny
    recipe = small(steps=20, eval_every=2, patience=2, batch_size=2)
    model = train.build_model(recipe, tokenizer)
    seen: list[torch.Tensor] = []

    def evaluate() -> float:
        seen.append(model.lm_head.weight.detach().clone())
        return float(len(seen))

    data = batches(ids, line_starts(tokenizer, ids), recipe)
    trained = train.train(model, data, recipe, evaluate)
    assert (trained.steps, trained.best_step) == (6, 2)
    assert trained.tokens == 6 * 2 * recipe.seq_len
    assert torch.equal(model.lm_head.weight, seen[0])
    assert not torch.equal(seen[0], seen[-1])


def test_time_limit_ends_training(tiny):
    tokenizer, ids = tiny
    recipe = small(seconds=1e-9, batch_size=2)
    data = batches(ids, line_starts(tokenizer, ids), recipe)
    trained = train.train(train.build_model(recipe, tokenizer), data, recipe, lambda: 1.0)
    assert trained.steps == trained.best_step == 1


def test_held_out_loss_counts_every_token_once(tiny):
    tokenizer, ids = tiny
    model = train.build_model(small(), tokenizer).eval()
    whole = train.held_out_loss(model, ids[:100], 250, length=99)
    with torch.no_grad():
        want = F.cross_entropy(model(ids[None, :99]).logits[0], ids[1:100]).item()
    assert whole.tokens == 99
    assert whole.nats_per_token == pytest.approx(want, rel=1e-4)
    assert whole.bits_per_byte == pytest.approx(want * 99 / math.log(2) / 250, rel=1e-4)
    # A last window that is not full counts its own tokens only.
    cut = train.held_out_loss(model, ids[:100], 250, length=64, batch_size=1)
    with torch.no_grad():
        parts = [
            F.cross_entropy(model(ids[None, a:b]).logits[0], ids[a + 1 : b + 1], reduction="sum").item()
            for a, b in ((0, 64), (64, 99))
        ]
    assert cut.nats_per_token == pytest.approx(sum(parts) / 99, rel=1e-4)


def test_split_spaces_keeps_the_text(tiny):
    tokenizer, ids = tiny
    split = split_spaces(tokenizer, ids, 0.5, 0)
    assert len(split) > len(ids)
    assert tokenizer.decode(split) == tokenizer.decode(ids)
    assert torch.equal(split_spaces(tokenizer, ids, 0.0, 0), ids)


def test_sequences_begin_at_unindented_lines(tiny):
    tokenizer, ids = tiny
    starts = line_starts(tokenizer, ids)
    text = "".join(source(n) for n in range(3))
    lines = [line for line in text.split("\n") if line and not line.startswith(" ")]
    assert len(starts) == len(lines)
    recipe = small(aligned_share=1.0, batch_size=4)
    data = batches(ids, starts, recipe)
    for _ in range(20):
        for row in next(data):
            assert row.shape == (recipe.seq_len + 1,)
            assert tokenizer.decode(row).removeprefix(END).startswith(("def", "import"))


@pytest.mark.parametrize("muon", [True, False])
def test_every_weight_is_trained_by_one_optimizer(tiny, muon):
    tokenizer, _ = tiny
    model = train.build_model(small(), tokenizer)
    optimizers = train._optimizers(model, small(muon=muon))
    taken = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters())
    assert len(optimizers) == 1 + muon


def test_corpus_counts_more_often_than_further_files(corpus, tmp_path):
    more = tmp_path / "more-2.0"
    more.mkdir()
    (more / "new.py").write_text(source(200), encoding="utf-8")
    recipe = small(steps=1, corpus_repeats=3, space_share=0.0)
    record = train.run(recipe, tmp_path / "out", corpus=corpus, also=[more])["corpus"]
    assert record["further"] == [{"name": "more-2.0", "files": 1, "bytes": len(source(200))}]
    alone = train.run(recipe, tmp_path / "alone", corpus=corpus)["corpus"]
    assert alone["epoch_tokens"] == alone["train_tokens"] == record["train_tokens"]
    assert 0 < record["epoch_tokens"] - 3 * record["train_tokens"] < len(source(200))


def test_learning_rate_rises_then_falls():
    recipe = small(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [train.learning_rate(recipe, step, step / 100) for step in range(100)]
    assert rates[0] < rates[5] < rates[9] > rates[50] > rates[99] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 100},
        {"heads": 3},
        {"kv_heads": 3},
        {"steps": 0},
        {"seq_len": 4096},
        {"held_out_share": 1.5},
        {"space_share": -0.1},
        {"seconds": 0.0},
    ],
)
def test_recipe_refuses(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Recipe(**changes)
