"""Whatever the files of a checkpoint say, loading it works or raises one of our errors.

A part runs each time; `HYBRIDGEN_MUTATIONS=3000 pytest tests/loading/test_hostile_files.py` runs so many of each file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hybridgen import Engine, HybridgenError

EXAMPLES = int(os.environ.get("HYBRIDGEN_MUTATIONS", "25"))
FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
MORE = {
    "config.json": (
        "auto_map", "transformers_weights", "tokenizer_class", "quantization_config", "rope_scaling", "rope_parameters",
        "layer_types", "text_config", "num_labels", "head_dim", "n_positions", "is_encoder_decoder", "sliding_window",
        "per_layer_config", "torch_dtype", "dtype", "architectures", "_attn_implementation", "attn_implementation",
        "experts_implementation", "pruned_heads", "id2label", "chunk_size_feed_forward", "max_length", "eos_token_id",
        "tie_word_embeddings", "partial_rotary_factor", "attention_bias", "hidden_act", "model_type",
    ),
    "tokenizer.json": ("truncation", "padding", "normalizer", "post_processor", "decoder", "version"),
    "tokenizer_config.json": (
        "tokenizer_class", "auto_map", "chat_template", "model_max_length", "added_tokens_decoder",
        "extra_special_tokens",
        "additional_special_tokens", "add_bos_token", "eos_token", "clean_up_tokenization_spaces", "backend",
        "name_or_path", "init_inputs", "processor_class", "legacy", "use_fast", "padding_side",
    ),
    "generation_config.json": (
        "temperature", "top_k", "top_p", "eos_token_id", "max_new_tokens", "max_length", "suppress_tokens", "do_sample",
        "bad_words_ids", "cache_implementation", "compile_config", "watermarking_config", "generation_mode", "seed",
        "min_p", "repetition_penalty", "num_beams", "stop_strings", "sequence_bias", "forced_eos_token_id",
    ),
    "model.safetensors.index.json": ("weight_map", "metadata"),
}  # fmt: skip
"""Keys that the files do not have and could."""
WORDS = (
    "", "x", "llama", "gpt2", "bert", "t5", "mamba", "float8_e4m3fn", "int8", "auto", "RagTokenizer", "T5Tokenizer",
    "LlamaTokenizer", "BertTokenizer", "GPT2TokenizerFast", "dynamic", "yarn", "longrope", "llama3",
    "sliding_attention", "full_attention", "linear_attention", "../x", "/etc/passwd", "owner/name", "gelu", "nan",
    "{{ x }}", "\ud800", "\0",
    "model-00001-of-00002.safetensors", "torch.float16", "<s>", "flash_attention_2", "kernels-community/flash-attn",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 2**15, 10**5, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.sampled_from([0.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), 0.5]),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.sampled_from([*WORDS, *sum(MORE.values(), ())]), st.text(max_size=4)), inner, max_size=4
        ),
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("base")
    model = families.build("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    model.save_pretrained(path, max_shard_size="30KB")
    tokenizer.save_pretrained(path)
    assert all((path / name).is_file() for name in FILES)
    return path


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to the values in a JSON document, long lists and objects cut."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())[:40]
    elif isinstance(value, list):
        items = list(enumerate(value))[:5]
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def mutate(draw: st.DrawFn, name: str, text: str) -> bytes:
    """Another content of the file."""
    data = text.encode()
    kind = draw(st.sampled_from(["value"] * 8 + ["add"] * 6 + ["delete", "delete", "cut", "flip", "deep"]))
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "flip":
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    if kind == "deep":
        return draw(st.sampled_from([b"[" * 10**5, b'{"a":' * 10**5, b"", b"null", b"[]", b"{}"]))
    document = json.loads(text)
    if kind == "add":
        document[draw(st.sampled_from(MORE[name]))] = draw(VALUES)
        return json.dumps(document).encode()
    place = draw(st.sampled_from(places(document)))
    if not place:
        return json.dumps(draw(VALUES)).encode()
    owner = document
    for key in place[:-1]:
        owner = owner[key]
    if kind == "delete":
        del owner[place[-1]]
    else:
        owner[place[-1]] = draw(VALUES)
    return json.dumps(document).encode()


def load_and_run(path: Path) -> None:
    """Raises what is none of our errors."""
    fields: dict[str, Any] = {"mode": "eager", "kv_memory": "1MiB", "max_batch": 2, "local_files_only": True}
    with contextlib.suppress(HybridgenError), Engine.load(path, **fields) as engine:
        for prompt in ("w1 w2", [5, 6]):
            with contextlib.suppress(HybridgenError):
                engine.generate(prompt, max_new_tokens=2)


@pytest.mark.parametrize("name", FILES)
def test_mutations(base: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = (base / name).read_text()
    mutations = st.composite(mutate)(name, text)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutations)
    def check(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            for file in base.iterdir():
                if file.name != name:
                    (path / file.name).symlink_to(file)
            (path / name).write_bytes(content)
            load_and_run(path)

    check()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"auto_map": "x"}),
        ("config.json", {"auto_map": ["a"]}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": 5}}),
        ("config.json", {"transformers_weights": 5}),
        ("config.json", {"max_position_embeddings": 2**63 - 1}),
        ("config.json", {"max_position_embeddings": 2**40}),
        ("config.json", {"num_labels": 10**12}),
        ("config.json", {"num_hidden_layers": 10**12}),
        ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
    ],
)
def test_what_once_raised_something_else(base: Path, tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    path = tmp_path / "model"
    shutil.copytree(base, path)
    (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | change))
    load_and_run(path)
