"""What does checking drafts bring, and what does it cost?

`machinery`: random weights of a shape, made to say one token for ever, so that no rounding changes what is right. An
oracle drafts 3 tokens a step, of which the first j are right: then a step brings j + 1. Tokens per second are of whole
calls: (time of a call for N new tokens, less the same call for one), against the same without drafts. Before that,
with weights that say anything (temperature 1), the n-gram drafter finds nothing: what it costs a step then.

`head`: the same weights and an EAGLE-3 head of random weights that says that token too, so that all of its 3 drafts are
right: a step checks 3 drafts and makes the next 3. `oracle` checks as many and makes them for nothing; `plain` drafts
nothing; `head fp8` has its weights in FP8. Each has an engine on the same weights, and their calls take turns. A step
(`step_us`) is the time of a call, less that of a shorter one that drafts too, by the steps that it has more: both have
the first step, which checks nothing, and the one launched ahead that nobody needs. `call_step_us`, the time of a token
in whole calls by the tokens a step, has these two in it.

`text`: the demo model in float32, greedy without penalty, on files of the standard library that it was not trained on:
the first tokens of a file are continued (with a penalty and sampled too), and a file with its beginning again, where
its commonest word was renamed, is continued as an edit would. Tokens a step of all requests by drafter, and whether the
tokens are those without drafts.

    python benchmarks/speculation.py machinery --model llama-3.1-8b [--output results.json]
    python benchmarks/speculation.py head --model llama-3.1-8b [--output results.json]
    python benchmarks/speculation.py text [--output results.json]
    python benchmarks/speculation.py --smoke          # all, a tiny model and a few tokens, anywhere
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import (
    held_out_files,
    how_it_ran,
    random_model,
    random_prompts,
    release,
    report,
    seconds,
    shape_dtype,
    synchronize,
    this_device,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import hybridgen
from hybridgen import Engine
from hybridgen.demo import model_path
from hybridgen.speculation.oracle import OracleDrafter

DRAFTS = 3
FIRST_LAYERS = 3
"""Of the demo model's 6, as a drafter."""
SAID = 7
"""The token that the model is made to say."""


def say_one_token(model: PreTrainedModel) -> None:
    """Change the weights so that the same token is by far the most likely behind any text."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        head[:, 0] = 0.0
        embedding[:, 0] = 20.0  # the residual stream has it in all positions, whatever layers add
        head[SAID, 0] = 40.0


class Calls:
    """Whole calls of an engine, timed."""

    def __init__(self, engine: Engine, prompts: list[list[int]], new: int, device: str, repeats: int) -> None:
        self._engine, self._prompts, self._new, self._device, self._repeats = engine, prompts, new, device, repeats

    def step(self, **sampling: Any) -> float:
        """Seconds for one more token of each prompt."""

        def call(count: int) -> Any:
            return self._engine.generate(self._prompts, max_new_tokens=count, ignore_eos=True, **sampling)

        call(self._new)  # what it missed is recorded
        long = seconds(lambda: call(self._new), self._device, self._repeats)
        return (long - seconds(lambda: call(1), self._device, self._repeats)) / (self._new - 1)


def machinery(
    name: str, batches: list[int], prompt: int, new: int, repeats: int, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a shape, and how the engines ran them."""
    device = this_device()
    model = random_model(name, shape_dtype(name, device), device)
    vocab = model.config.vocab_size
    prompts = random_prompts(batches[-1], prompt, vocab)
    for index, ids in enumerate(prompts):
        ids[0] = 100 + index  # the oracle knows them by it
    options = {
        "max_batch": batches[-1], "max_context": prompt + new, "token_budget": batches[-1] * prompt,
        "decode_buckets": batches, "prefill_buckets": [], "kv_memory": "2GiB", **options,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    engines: dict[str, Any] = {}

    def add(what: str, batch: int, step: float, **more: Any) -> None:
        row = {"model": name, "what": what, "batch": batch, "prompt": prompt, "new": new, "token_us": step * 1e6}
        rows.append(row | {"tokens_per_s": batch / step} | more)
        print(f"{name:<14} {what:<28} {batch:3} {step * 1e6:10.1f} {batch / step:10.0f} {more or ''}", flush=True)

    oracle = OracleDrafter([[*ids, *[SAID] * new] for ids in prompts], [DRAFTS] * len(prompts), most=DRAFTS)
    drafters = {"plain": None, "ngram": "ngram", "oracle": oracle}
    for what, drafter in drafters.items():
        with Engine.load(model, speculation=drafter, **options) as engine:
            if what == "oracle":
                say_one_token(model)
            for batch in batches:
                calls = Calls(engine, prompts[:batch], new, device, repeats)
                if what == "oracle":
                    for right in range(DRAFTS + 1):
                        oracle.tell([right] * len(prompts))
                        before = engine.stats().speculation
                        step = calls.step(temperature=0)
                        after = engine.stats().speculation
                        brought = (after.tokens - before.tokens) / (after.steps - before.steps)
                        add(f"oracle, {right} right", batch, step, right=right, tokens_per_step=brought)
                else:
                    add(f"{what}, nothing matches", batch, calls.step(temperature=1.0, seed=1))
                    if what == "plain":
                        add("plain", batch, calls.step(temperature=0))
            engines[what] = how_it_ran(engine)
        release()
    return rows, engines


def write_head(directory: Path, config: Any, dtype: torch.dtype, device: str) -> Path:
    """An EAGLE-3 head of random weights for a model of this shape, with the sizes of published heads. What
    `say_one_token` put into the hidden states goes through it, and decides its drafts too."""
    hidden, inside, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    drafted, dim = min(32000, vocab), config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    make = torch.Generator(device).manual_seed(1)

    def values(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0, columns**-0.5, generator=make)

    norms = ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm")
    tensors = {
        "fc.weight": values(hidden, 3 * hidden),
        "midlayer.self_attn.q_proj.weight": values(queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": values(keys, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": values(keys, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": values(hidden, queries),
        "midlayer.mlp.gate_proj.weight": values(inside, hidden),
        "midlayer.mlp.up_proj.weight": values(inside, hidden),
        "midlayer.mlp.down_proj.weight": values(hidden, inside),
        "lm_head.weight": values(drafted, hidden),
        "d2t": torch.arange(drafted) * (vocab // drafted - 1),
    } | {f"{name}.weight": torch.ones(hidden, dtype=dtype) for name in norms}
    d2t = tensors["d2t"] + torch.arange(drafted)
    said = int((d2t <= SAID).sum()) - 1
    tensors["d2t"] += (SAID - d2t[said]) * (torch.arange(drafted) == said)
    tensors["fc.weight"][0] = 0.0
    tensors["fc.weight"][0, 0] = 1.0
    tensors["lm_head.weight"][:, 0] = 0.0
    tensors["lm_head.weight"][said, 0] = 40.0
    count = config.num_hidden_layers
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
        "hidden_size": hidden, "intermediate_size": inside, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads, "head_dim": dim, "vocab_size": vocab,
        "draft_vocab_size": drafted, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 2048,
    }  # fmt: skip
    if count < 6:  # the layers that heads read by default are not there
        fields["eagle_aux_hidden_state_layer_ids"] = [0, count // 2, count - 1]
    (directory / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def head(
    name: str, batches: list[int], prompt: int, new: int, repeats: int, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Steps that check 3 drafts of an EAGLE-3 head and make 3, beside plain ones; and how the engines ran them."""
    device = this_device()
    dtype = shape_dtype(name, device)
    model = random_model(name, dtype, device)
    say_one_token(model)
    prompts = random_prompts(batches[-1], prompt, model.config.vocab_size)
    for index, ids in enumerate(prompts):
        ids[0] = 100 + index
    options = {
        "max_batch": batches[-1], "max_context": prompt + new, "token_budget": batches[-1] * prompt,
        "decode_buckets": batches, "prefill_buckets": [], "kv_memory": "2GiB", **options,
    }  # fmt: skip
    oracle = OracleDrafter([[*ids, *[SAID] * new] for ids in prompts], [DRAFTS] * len(prompts), most=DRAFTS)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        drafter = write_head(directory, model.config, dtype, device)
        fields: dict[str, dict[str, Any]] = {
            "plain": {},
            "oracle": {"speculation": oracle},
            "head": {"drafter": drafter},
            "head fp8": {"drafter": drafter, "quantize_drafter": "fp8"},
        }
        engines = {what: stack.enter_context(Engine.load(model, **own, **options)) for what, own in fields.items()}

        def call(what: str, batch: int, count: int) -> tuple[float, float]:
            """Seconds of a call, and its steps."""
            engine = engines[what]
            before = engine.stats().speculation.steps
            synchronize(device)
            start = time.perf_counter()
            engine.generate(prompts[:batch], max_new_tokens=count, ignore_eos=True, temperature=0)
            synchronize(device)
            took = time.perf_counter() - start
            if what == "plain":
                return took, count - 1
            return took, (engine.stats().speculation.steps - before) / batch  # each counts for each of its requests

        short = new // 4
        for batch in batches:
            for what in (*engines, *engines):  # the first records, the second is not counted
                for count in (new, short, 1):
                    call(what, batch, count)
                while engines[what].record_missing():
                    pass
            before = {what: engine.stats().speculation for what, engine in engines.items()}
            tokens: dict[str, list[float]] = {what: [] for what in engines}
            steps: dict[str, list[float]] = {what: [] for what in engines}
            for _ in range(repeats):
                for what in engines:
                    (whole, count), (part, fewer), (first, _) = (call(what, batch, n) for n in (new, short, 1))
                    tokens[what].append((whole - first) / (new - 1))
                    steps[what].append((whole - part) / (count - fewer))
            for what, engine in engines.items():
                token, after = statistics.median(tokens[what]), engine.stats().speculation
                count = after.steps - before[what].steps
                brought = (after.tokens - before[what].tokens) / count if count else 1.0
                row = {"model": name, "what": what, "batch": batch, "prompt": prompt, "new": new}
                row |= {"step_us": statistics.median(steps[what]) * 1e6, "call_step_us": token * brought * 1e6}
                row |= {"tokens_per_step": brought, "tokens_per_s": batch / token}
                row |= {"drafter_bytes": after.weight_bytes, "token_us": token * 1e6}
                rows.append(row)
                print(
                    f"{name:<14} {what:<8} {batch:3} {row['step_us']:10.1f} {row['call_step_us']:10.1f} {brought:6.2f}",
                    flush=True,
                )
        ran = {what: how_it_ran(engine) for what, engine in engines.items()}
    release()
    return rows, ran


def edited(tokenizer: Any, text: str, length: int, again: int) -> list[int] | None:
    """A file's first tokens, and then the first of them again with its commonest word renamed."""
    ids = tokenizer(text[: 8 * length])["input_ids"][:length]
    words = re.findall(r"[a-z_]{5,}", tokenizer.decode(ids))
    if len(ids) < length or not words:
        return None
    word = max(sorted(set(words)), key=words.count)
    return [*ids, *tokenizer(tokenizer.decode(ids).replace(word, f"{word}_new"))["input_ids"][:again]]


def on_text(files: int | None, lengths: tuple[int, int, int], new: tuple[int, int]) -> list[dict[str, Any]]:
    """Tokens a step on the demo model.

    Args:
        files: how many files; None: all that there are.
        lengths: tokens of a continued prompt, of an edited file, and of its second beginning.
        new: tokens that are generated behind each.
    """
    this_device()
    options = {"mode": "eager", "device": "cpu", "dtype": "float32", "max_batch": 16}
    texts = held_out_files()[:files]
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    with Engine.load(None, **options) as plain:
        tokenizer = plain.tokenizer
        ids_of = [tokenizer(text[: 8 * lengths[0]])["input_ids"][: lengths[0]] for text in texts]
        begun = [ids for ids in ids_of if len(ids) == lengths[0]]
        edits = [ids for text in texts if (ids := edited(tokenizer, text, lengths[1], lengths[2])) is not None]
        cases: list[tuple[str, list[Any], dict[str, Any]]] = [
            ("held-out files", begun, {"temperature": 0.0, "max_new_tokens": new[0], "repetition_penalty": 1.0}),
            ("held-out files", begun, {"temperature": 0.0, "max_new_tokens": new[0], "repetition_penalty": 1.2}),
            ("held-out files", begun, {"temperature": 0.8, "max_new_tokens": new[0], "repetition_penalty": 1.0}),
            ("editing", edits, {"temperature": 0.0, "max_new_tokens": new[1], "repetition_penalty": 1.0}),
        ]
        for _, _, sampling in cases:
            sampling |= {"seed": 1, "ignore_eos": True}
        expected = [plain.generate(prompts, **sampling) for _, prompts, sampling in cases]
    for drafter, field in drafters_on_text().items():
        with Engine.load(None, **field, **options) as engine:
            for number, (what, prompts, sampling) in enumerate(cases):
                row = text_row(engine, prompts, sampling, expected[number])
                rows[number, drafter] = {"what": what, "drafter": drafter} | row
                print(rows[number, drafter], flush=True)
    return [rows[key] for key in sorted(rows, key=lambda key: key[0])]


def drafters_on_text() -> dict[str, dict[str, Any]]:
    """Fields of the config that draft for the demo model, by name: n-grams; the first layers of the model with its norm
    and head, which nobody trained to draft; and the whole model, all of whose drafts are right."""
    first = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    del first.model.layers[FIRST_LAYERS:]
    first.config.num_hidden_layers = FIRST_LAYERS
    return {
        "ngram": {"speculation": "ngram"},
        f"its first {FIRST_LAYERS} layers": {"drafter": first},
        "itself": {"drafter": model_path()},
    }


def text_row(engine: Engine, prompts: list[Any], sampling: dict[str, Any], expected: list[Any]) -> dict[str, Any]:
    """Tokens a step of a call, and whether its tokens are the expected ones."""
    before = engine.stats().speculation
    found = engine.generate(prompts, **sampling)
    after = engine.stats().speculation
    drafted = after.drafted - before.drafted
    steps = [sum(step.count for step in out.steps if step.phase == "decode") for out in found]
    each = sorted((sampling["max_new_tokens"] - 1) / number for number in steps)
    return {
        "repetition_penalty": sampling["repetition_penalty"],
        "temperature": sampling["temperature"],
        "requests": len(prompts),
        "new": sampling["max_new_tokens"],
        "tokens_per_step": (after.tokens - before.tokens) / (after.steps - before.steps),
        "least": each[0],
        "median": each[len(each) // 2],
        "most": each[-1],
        "accepted": (after.accepted - before.accepted) / max(drafted, 1),
        "equal": sum(a.token_ids == b.token_ids for a, b in zip(found, expected, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["machinery", "head", "text"], default="machinery")
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=129)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="inductor", help="eager: rows that the fused kernels serve matter alone")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="all parts, tiny, anywhere")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"benchmark": "speculation", "hybridgen": hybridgen.__version__}
    if arguments.smoke:
        rows, engines = machinery("tiny", [1, 2], 16, 9, 1, {"mode": "eager", "kv_memory": "16MiB"})
        more, others = head("tiny", [1, 2], 16, 9, 1, {"mode": "eager", "kv_memory": "16MiB"})
        results |= {"rows": rows + more + on_text(2, (32, 32, 8), (8, 8)), "engines": engines | {"head": others}}
    elif arguments.part == "text":
        results["rows"] = on_text(None, (256, 400, 80), (128, 192))
    else:
        measure = head if arguments.part == "head" else machinery
        rows, engines = measure(
            arguments.model,
            sorted(arguments.batches),
            arguments.prompt,
            arguments.new,
            arguments.repeats,
            {"compile_backend": arguments.backend},
        )
        results |= {"rows": rows, "engines": engines}
    report(results, arguments.output)


if __name__ == "__main__":
    main()
