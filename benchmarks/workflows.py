"""Fifteen things that research scripts do around generation: lines and seconds, here and with transformers alone.

Each task is two functions that return the same kind of result, written as one would write it there: `ours` gets an
engine, `theirs` transformers' model and tokenizer, with the padding and the loops that it takes. Lines are of their
bodies, without comments. Times are of the second call; where nothing is drawn, `same` says whether both found the same.

    python benchmarks/workflows.py [MODEL] [--mode hybrid] [--output results.json]
    python benchmarks/workflows.py --smoke      # less text
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import held_out_files, report, shape_dtype, synchronize, this_device
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

import hybridgen
from hybridgen.demo import model_path

WINDOW, STRIDE = 512, 256


class Data:
    """What the tasks work on."""

    def __init__(self, small: bool) -> None:
        files = held_out_files() or [inspect.getsource(argparse)]
        lines = [line for text in files for line in text.splitlines() if len(line) > 20]
        count = 4 if small else 32
        whole = "".join(files)
        self.text = whole[: 4000 if small else 20000]
        self.documents = [whole[start : start + 600] for start in range(0, 600 * count // 2, 600)]
        self.prompts = [line.strip()[: 12 + index % 30] for index, line in enumerate(lines[:count])]
        examples = "".join(f"# {line}\n" for line in lines[40:55])
        self.questions = [examples + f"# {line}\n#" for line in lines[60 : 60 + count // 2]]
        self.context = examples
        self.answers = [" a", " the", " not", " if"]
        self.n, self.new = (4, 12) if small else (16, 48)


# ------------------------------------------------------------------ scores


def perplexity_ours(engine: Any, data: Data) -> float:
    ids = engine.tokenizer(data.text)["input_ids"]
    prompts, ends = [ids[:1]], [ids[1:WINDOW]]
    for start in range(WINDOW, len(ids), STRIDE):
        end = min(start + STRIDE, len(ids))
        prompts.append(ids[end - WINDOW : start])
        ends.append(ids[start:end])
    scores = engine.score(prompts, ends)
    return math.exp(-sum(score.sum for score in scores) / (len(ids) - 1))


def perplexity_theirs(model: Any, tokenizer: Any, data: Data) -> float:
    ids = tokenizer(data.text, return_tensors="pt").input_ids.to(model.device)
    total, done = 0.0, 1
    for end in [*range(WINDOW, ids.shape[1], STRIDE), ids.shape[1]]:
        window = ids[:, max(0, end - WINDOW) : end]
        logits = model(window, use_cache=False).logits[0, :-1].float()
        scores = logits.log_softmax(-1).gather(-1, window[0, 1:, None])[:, 0]
        total += float(scores[-(end - done) :].sum())
        done = end
    return math.exp(-total / (ids.shape[1] - 1))


def choices_ours(engine: Any, data: Data) -> list[int]:
    count = len(data.answers)
    scores = engine.score([q for q in data.questions for _ in data.answers], data.answers * len(data.questions))
    sums = [score.sum for score in scores]
    return [max(range(count), key=sums[start : start + count].__getitem__) for start in range(0, len(sums), count)]


def choices_theirs(model: Any, tokenizer: Any, data: Data) -> list[int]:
    chosen = []
    for question in data.questions:
        start = len(tokenizer(question).input_ids)
        batch = tokenizer([question + answer for answer in data.answers], return_tensors="pt", padding=True)
        batch = batch.to(model.device)
        logits = model(**batch).logits.float().log_softmax(-1)
        width = batch.input_ids.shape[1]
        sums = []
        for row in range(len(data.answers)):
            first = start + width - int(batch.attention_mask[row].sum())
            targets = batch.input_ids[row, first:]
            sums.append(float(logits[row, first - 1 : -1].gather(-1, targets[:, None]).sum()))
        chosen.append(sums.index(max(sums)))
    return chosen


def rolling_ours(engine: Any, data: Data) -> list[float]:
    return [round(score.sum, 1) for score in engine.score(data.documents)]


def rolling_theirs(model: Any, tokenizer: Any, data: Data) -> list[float]:
    sums = []
    for start in range(0, len(data.documents), 8):
        batch = tokenizer(data.documents[start : start + 8], return_tensors="pt", padding=True).to(model.device)
        logits = model(**batch).logits[:, :-1].float().log_softmax(-1)
        targets = batch.input_ids[:, 1:]
        scores = logits.gather(-1, targets[..., None])[..., 0]
        mask = batch.attention_mask[:, 1:] * batch.attention_mask[:, :-1]
        sums += (scores * mask).sum(-1).tolist()
    return [round(value, 1) for value in sums]


def rerank_ours(engine: Any, data: Data) -> list[int]:
    scores = engine.score(data.context, data.prompts)
    return sorted(range(len(scores)), key=lambda index: scores[index].sum / len(scores[index].logprobs))


def rerank_theirs(model: Any, tokenizer: Any, data: Data) -> list[int]:
    start, means = len(tokenizer(data.context).input_ids), []
    for text in data.prompts:
        ids = tokenizer(data.context + text, return_tensors="pt").input_ids.to(model.device)
        logits = model(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
        means.append(float(logits.gather(-1, ids[0, start:, None]).mean()))
    return sorted(range(len(means)), key=means.__getitem__)


# ------------------------------------------------------------------ texts


def dataset_ours(engine: Any, data: Data) -> list[str]:
    return [out.text for out in engine.generate(data.prompts, max_new_tokens=data.new, temperature=0)]


def dataset_theirs(model: Any, tokenizer: Any, data: Data) -> list[str]:
    texts = []
    for start in range(0, len(data.prompts), 8):
        batch = tokenizer(data.prompts[start : start + 8], return_tensors="pt", padding=True).to(model.device)
        ids = model.generate(**batch, max_new_tokens=data.new, do_sample=False)
        texts += tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def votes_ours(engine: Any, data: Data) -> Counter[str]:
    out = engine.generate(data.questions[0], n=data.n, temperature=1.0, seed=1, max_new_tokens=data.new)
    return Counter(choice.text.split("\n")[0] for choice in out.choices)


def votes_theirs(model: Any, tokenizer: Any, data: Data) -> Counter[str]:
    batch = tokenizer(data.questions[0], return_tensors="pt").to(model.device)
    options = {"num_return_sequences": data.n, "do_sample": True, "top_k": 0, "max_new_tokens": data.new}
    ids = model.generate(**batch, **options)[:, batch.input_ids.shape[1] :]
    return Counter(text.split("\n")[0] for text in tokenizer.batch_decode(ids, skip_special_tokens=True))


def best_ours(engine: Any, data: Data) -> str:
    fields = {"n": data.n, "temperature": 1.0, "seed": 1, "max_new_tokens": data.new, "logprobs": 0}
    choices = engine.generate(data.prompts[0], **fields).choices
    return str(max(choices, key=lambda choice: choice.cumulative_logprob / len(choice.token_ids)).text)


def best_theirs(model: Any, tokenizer: Any, data: Data) -> str:
    batch = tokenizer(data.prompts[0], return_tensors="pt").to(model.device)
    options = {"num_return_sequences": data.n, "do_sample": True, "top_k": 0, "max_new_tokens": data.new}
    out = model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    scores = model.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)
    new = out.sequences[:, batch.input_ids.shape[1] :]
    mask = new != tokenizer.pad_token_id
    best = ((scores * mask).nan_to_num(0, 0, 0).sum(-1) / mask.sum(-1)).argmax()
    return str(tokenizer.decode(new[best], skip_special_tokens=True))


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def rejection_ours(engine: Any, data: Data) -> int:
    left = list(data.prompts)
    for seed in range(4):
        outs = engine.generate(left, temperature=1.0, seed=seed, max_new_tokens=data.new, stop="\n")
        left = [prompt for prompt, out in zip(left, outs, strict=True) if not parses(prompt + out.text)]
        if not left:
            break
    return len(data.prompts) - len(left)


def rejection_theirs(model: Any, tokenizer: Any, data: Data) -> int:
    left = list(data.prompts)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": data.new, "stop_strings": "\n", "tokenizer": tokenizer}
    for _ in range(4):
        again = []
        for start in range(0, len(left), 8):
            prompts = left[start : start + 8]
            batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
            ids = model.generate(**batch, **options)[:, batch.input_ids.shape[1] :]
            texts = [text.split("\n")[0] for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
            again += [prompt for prompt, text in zip(prompts, texts, strict=True) if not parses(prompt + text)]
        left = again
    return len(data.prompts) - len(left)


def json_ours(engine: Any, data: Data) -> int:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    outs = engine.generate(data.prompts[:4], json_schema=schema, temperature=0, max_new_tokens=24)
    return sum(isinstance(json.loads(out.text)["ok"], bool) for out in outs)


def json_theirs(model: Any, tokenizer: Any, data: Data) -> int:
    ends, count = [tokenizer.encode(text) for text in ('{"ok":true}', '{"ok":false}')], 0
    for prompt in data.prompts[:4]:
        batch = tokenizer(prompt, return_tensors="pt").to(model.device)
        start = batch.input_ids.shape[1]

        def allowed(_: int, ids: Any, start: int = start) -> list[int]:
            said = ids[start:].tolist()
            after = [end[len(said)] for end in ends if end[: len(said)] == said and len(end) > len(said)]
            return after or [tokenizer.eos_token_id]

        ids = model.generate(**batch, max_new_tokens=24, do_sample=False, prefix_allowed_tokens_fn=allowed)
        text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        count += isinstance(json.loads(text)["ok"], bool)
    return count


# ------------------------------------------------------------------ logits and states


class Marked(LogitsProcessor):
    """A watermark: half of the ids, by the one before, are favoured."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(scores.shape[-1], device=scores.device)
        return scores + 6.0 * ((ids + input_ids[:, -1:] * 40503) * 2654435761 % 4294967296 >> 16) % 2


def watermark_ours(engine: Any, data: Data) -> list[str]:
    fields = {"logits_processors": [Marked()], "temperature": 0, "max_new_tokens": data.new}
    return [out.text for out in engine.generate(data.prompts, **fields)]


def watermark_theirs(model: Any, tokenizer: Any, data: Data) -> list[str]:
    texts = []
    for start in range(0, len(data.prompts), 8):
        batch = tokenizer(data.prompts[start : start + 8], return_tensors="pt", padding=True).to(model.device)
        marked = LogitsProcessorList([Marked()])
        ids = model.generate(**batch, max_new_tokens=data.new, do_sample=False, logits_processor=marked)
        texts += tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def states_ours(engine: Any, data: Data) -> list[float]:
    return [round(float(each.float().norm()), 2) for each in engine.hidden_states(data.documents, 2, pool="mean")]


def states_theirs(model: Any, tokenizer: Any, data: Data) -> list[float]:
    norms = []
    for start in range(0, len(data.documents), 8):
        batch = tokenizer(data.documents[start : start + 8], return_tensors="pt", padding=True).to(model.device)
        states = model(**batch, output_hidden_states=True).hidden_states[2].float()
        mask = batch.attention_mask[..., None]
        norms += ((states * mask).sum(1) / mask.sum(1)).norm(dim=-1).tolist()
    return [round(value, 2) for value in norms]


def steered_ours(engine: Any, data: Data, model: Any) -> list[str]:
    direction = torch.ones(model.config.hidden_size, device=model.device, dtype=model.dtype)
    hook = model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + direction, *args[1:]))
    outs = engine.generate(data.prompts[:8], max_new_tokens=data.new, temperature=0)
    hook.remove()
    return [out.text for out in outs]


def steered_theirs(model: Any, tokenizer: Any, data: Data) -> list[str]:
    direction = torch.ones(model.config.hidden_size, device=model.device, dtype=model.dtype)
    hook = model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + direction, *args[1:]))
    batch = tokenizer(data.prompts[:8], return_tensors="pt", padding=True).to(model.device)
    ids = model.generate(**batch, max_new_tokens=data.new, do_sample=False)
    hook.remove()
    return list(tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True))


# ------------------------------------------------------------------ training


def rollouts_ours(engine: Any, data: Data, model: Any) -> int:
    outs = engine.generate(
        data.prompts[:8], n=8, temperature=1.0, seed=2, max_new_tokens=data.new, logprobs=0, ignore_eos=True
    )
    return sum(len(choice.logprobs) for out in outs for choice in out.choices)


def rollouts_theirs(model: Any, tokenizer: Any, data: Data) -> int:
    batch = tokenizer(data.prompts[:8], return_tensors="pt", padding=True).to(model.device)
    options = {"num_return_sequences": 8, "do_sample": True, "top_k": 0, "min_new_tokens": data.new}
    ids = model.generate(**batch, **options, max_new_tokens=data.new)
    mask = torch.cat((batch.attention_mask.repeat_interleave(8, 0), torch.ones_like(ids[:, -data.new :])), dim=1)
    logits = model(ids, attention_mask=mask, logits_to_keep=data.new + 1).logits[:, :-1].float().log_softmax(-1)
    return int(logits.gather(-1, ids[:, -data.new :, None]).numel())


def sampled_ours(engine: Any, data: Data, model: Any) -> list[str]:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.0)  # a step of training
    return [out.text for out in engine.generate(data.prompts[:4], max_new_tokens=data.new, temperature=0)]


def sampled_theirs(model: Any, tokenizer: Any, data: Data) -> list[str]:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.0)  # a step of training
    batch = tokenizer(data.prompts[:4], return_tensors="pt", padding=True).to(model.device)
    ids = model.generate(**batch, max_new_tokens=data.new, do_sample=False)
    return list(tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True))


def turns_ours(engine: Any, data: Data) -> list[str]:
    text, said = data.questions[0], []
    for question in data.prompts[:4]:
        text += f" {question}\n"
        said.append(engine.generate(text, max_new_tokens=data.new, temperature=0).text)
        text += said[-1]
    return said


def turns_theirs(model: Any, tokenizer: Any, data: Data) -> list[str]:
    text, said = data.questions[0], []
    for question in data.prompts[:4]:
        text += f" {question}\n"
        batch = tokenizer(text, return_tensors="pt").to(model.device)
        ids = model.generate(**batch, max_new_tokens=data.new, do_sample=False)
        said.append(tokenizer.decode(ids[0, batch.input_ids.shape[1] :], skip_special_tokens=True))
        text += said[-1]
    return said


TASKS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "perplexity with a stride": (perplexity_ours, perplexity_theirs, ""),
    "A/B/C/D by log-probabilities": (choices_ours, choices_theirs, ""),
    "log-likelihood of documents": (rolling_ours, rolling_theirs, ""),
    "order texts by likelihood": (rerank_ours, rerank_theirs, ""),
    "texts for a dataset": (dataset_ours, dataset_theirs, ""),
    "self-consistency": (votes_ours, votes_theirs, "drawn"),
    "best of n": (best_ours, best_theirs, "drawn"),
    "rejection over a dataset": (rejection_ours, rejection_theirs, "drawn"),
    "answers as JSON": (json_ours, json_theirs, ""),
    "watermark by a processor": (watermark_ours, watermark_theirs, ""),
    "mean hidden states": (states_ours, states_theirs, ""),
    "steering by a hook": (steered_ours, steered_theirs, "live"),
    "rollouts with log-probabilities": (rollouts_ours, rollouts_theirs, "live"),
    "samples while training": (sampled_ours, sampled_theirs, "live"),
    "turns of a conversation": (turns_ours, turns_theirs, ""),
}
"""What is done here, with transformers, and whether results are drawn or the engine is on the live module."""


def lines_of(function: Callable[..., Any]) -> int:
    """Lines of a function's body that are not blank, nor a comment."""
    body: Any = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    lines = inspect.getsource(function).splitlines()[body.body[0].lineno - 1 :]
    return sum(1 for line in lines if line.strip() and not line.strip().startswith("#"))


def second_call(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of a call after one that is not counted, and what it returned."""
    call()
    synchronize(device)
    start = time.perf_counter()
    found = call()
    synchronize(device)
    return time.perf_counter() - start, found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory with a tokenizer (default: the demo model)")
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="less text")
    arguments = parser.parse_args()
    device = this_device()
    path = arguments.model or model_path()
    dtype = shape_dtype("", device)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    data = Data(arguments.smoke)
    options: dict[str, Any] = {"mode": "eager" if arguments.smoke else arguments.mode, "progress": False}
    options |= {"dtype": str(dtype).removeprefix("torch."), "max_batch": 64, "max_context": 1024, "kv_memory": "128MiB"}
    rows = []
    with (
        hybridgen.Engine.load(path, **options) as own,
        hybridgen.Engine.load(model, tokenizer=tokenizer, **options) as live,
    ):
        for name, (ours, theirs, kind) in TASKS.items():
            mine = partial(ours, live, data, model) if kind == "live" else partial(ours, own, data)
            row: dict[str, Any] = {"task": name}
            for whose, call in (("ours", mine), ("theirs", partial(theirs, model, tokenizer, data))):
                took, found = second_call(call, device)
                row[whose] = {"lines": lines_of(ours if whose == "ours" else theirs), "seconds": took}
                row[f"found by {whose}"] = found
            pair = row.pop("found by ours"), row.pop("found by theirs")
            row["same"] = None if kind == "drawn" else agree(*pair)
            row["times as fast"] = row["theirs"]["seconds"] / row["ours"]["seconds"]
            rows.append(row)
            print(
                f"{name:<32} {row['ours']['lines']:>3} lines {row['ours']['seconds']:8.3f} s   with transformers "
                f"{row['theirs']['lines']:>3} lines {row['theirs']['seconds']:8.3f} s   "
                f"{row['times as fast']:6.1f} times   same: {row['same']}",
                flush=True,
            )
    kept = {"benchmark": "workflows", "model": "demo" if arguments.model is None else Path(path).name}
    report({**kept, "mode": options["mode"], "dtype": options["dtype"], "rows": rows}, arguments.output)


def agree(one: Any, other: Any) -> bool | float:
    """Whether both are the same; of lists the share of entries that are."""
    if isinstance(one, list):
        return sum(map(near, one, other)) / max(1, len(one))
    return near(one, other)


def near(one: Any, other: Any) -> bool:
    """Equal, numbers up to a thousandth."""
    return math.isclose(one, other, rel_tol=1e-3) if isinstance(one, float) else bool(one == other)


if __name__ == "__main__":
    main()
