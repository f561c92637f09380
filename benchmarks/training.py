"""What do rollouts inside a training loop cost beside a plain engine and transformers' generate, and what a switch of
adapters?

`rollout` rows: prompts, each several times, sampled by an engine that loaded the weights itself; by one that is
attached to a live module in train mode (`attach`, weights shared), after a step that changed every weight in place; and
by the module's own `generate`, once, all of them in one batch. Medians of whole calls, none of which finds a prefix of
an earlier one: a step of training forgets them, and the plain engine is told to.

`adapter` rows, where peft is installed: seconds of `Engine.set_adapter` with adapters of all projections, each way.

    python benchmarks/training.py [--model llama-3.2-1b] [--adapter-model llama-3.1-8b] [--output results.json]
    python benchmarks/training.py --smoke      # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import random_model, random_prompts, release, report, shape_dtype, synchronize, this_device

import hybridgen


def tokens_per_second(call: Any, device: str, repeats: int, before: Any) -> float:
    """Median rate of calls that return how many tokens they made, after one that is not counted.

    Args:
        before: called ahead of each, and not timed.
    """
    before()
    call()
    rates = []
    for _ in range(repeats):
        before()
        synchronize(device)
        start = time.perf_counter()
        made = call()
        synchronize(device)
        rates.append(made / (time.perf_counter() - start))
    return statistics.median(rates)


def rollouts(
    name: str, device: str, case: dict[str, int], options: dict[str, Any], repeats: int
) -> list[dict[str, Any]]:
    model = random_model(name, shape_dtype(name, device), device)
    vocab = model.config.vocab_size
    prompts = [p for p in random_prompts(case["prompts"], case["length"], vocab) for _ in range(case["each"])]
    new = case["new"]
    fields = {"max_new_tokens": new, "temperature": 1.0, "ignore_eos": True}
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        with hybridgen.Engine.load(directory, **options) as engine:
            rate = tokens_per_second(
                lambda: sum(len(o.token_ids) for o in engine.generate(prompts, **fields)),
                device,
                repeats,
                engine.weights_changed,
            )
            rows.append({"what": "plain engine", "tokens_per_s": rate})
    release()
    model.train()
    batch = torch.tensor(prompts, device=device)
    asked: dict[str, Any] = {"max_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    with hybridgen.attach(model, **options) as attached:
        shared = {p.data_ptr() for p in model.parameters()}
        assert {p.data_ptr() for p in attached.engine._runner.bound.model.parameters()} <= shared

        def update() -> None:
            with torch.no_grad():
                torch._foreach_mul_(list(model.parameters()), 0.9999)  # every weight, in place, as an optimiser does

        def rollout() -> int:
            return int(model.generate(batch, **asked).shape[1] - batch.shape[1]) * len(batch)

        rate = tokens_per_second(rollout, device, repeats, update)
        rows.append({"what": "attached", "tokens_per_s": rate, "weights": "shared"})
        fallbacks = dict(attached.engine.stats().fallbacks)
    release()
    model.eval()

    def theirs() -> int:
        with torch.no_grad():
            return int(model.generate(batch, **asked).shape[1] - batch.shape[1]) * len(batch)

    synchronize(device)
    start = time.perf_counter()
    made = theirs()
    synchronize(device)
    rows.append({"what": "transformers generate", "tokens_per_s": made / (time.perf_counter() - start)})
    rows[1] |= {
        "over_plain": rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"],
        "over_transformers": rows[1]["tokens_per_s"] / rows[2]["tokens_per_s"],
        "fallbacks": fallbacks,
    }
    return rows


def adapters(name: str, device: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    import peft

    with tempfile.TemporaryDirectory() as directory:
        model = random_model(name, shape_dtype(name, device), device)
        model.save_pretrained(f"{directory}/model")
        paths = []
        for number in range(2):
            config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            adapted = peft.get_peft_model(model, config)
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(parameter, std=0.02)
            paths.append(f"{directory}/adapter-{number}")
            adapted.save_pretrained(paths[-1])
            model = adapted.unload()
        del model, adapted
        release()
        rows = []
        with hybridgen.Engine.load(f"{directory}/model", **options) as engine:
            for what, path in (("first", paths[0]), ("another", paths[1]), ("none", None), ("again", paths[0])):
                synchronize(device)
                start = time.perf_counter()
                engine.set_adapter(path)
                synchronize(device)
                rows.append({"what": f"adapter, {what}", "seconds": time.perf_counter() - start})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of common.shape_config, for rollouts")
    parser.add_argument("--adapter-model", default="llama-3.1-8b", help="a shape, for adapters")
    parser.add_argument("--only", choices=("rollout", "adapter"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    device = this_device()
    name, other = arguments.model, arguments.adapter_model
    case = {"prompts": 64, "each": 8, "length": 128, "new": 256}
    options: dict[str, Any] = {
        "mode": "hybrid",
        "max_batch": 256,
        "max_context": 512,
        "kv_memory": "32GiB",
        "progress": False,
    }
    if arguments.smoke:
        name = other = "tiny"
        case = {"prompts": 2, "each": 2, "length": 6, "new": 4}
        options |= {"compile_backend": "eager", "max_batch": 4, "max_context": 64, "kv_memory": "8MiB"}
    rows: list[dict[str, Any]] = []
    if arguments.only != "adapter":
        rows += rollouts(name, device, case, options, arguments.repeats)
    release()
    has_peft = importlib.util.find_spec("peft") is not None
    if arguments.only != "rollout" and has_peft:
        # Nothing is generated: no captures are needed.
        rows += adapters(other, device, options | {"mode": "eager", "max_batch": 8, "kv_memory": "1GiB"})
    for row in rows:
        print(" ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    report(
        {"benchmark": "training", "model": name, "adapter_model": other, "case": case, "peft": has_peft, "rows": rows},
        arguments.output,
    )


if __name__ == "__main__":
    main()
