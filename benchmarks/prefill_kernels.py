"""Where does the time of a prefill call go, and how near to the memory's speed is what runs between its products?

Parts, each for the shapes of `--models`:

- `ops`: residual add with the norm behind it, silu * up, and heads normalised, rotated and written to their pages, for
  calls of `--tokens` tokens: our op (`hybridgen.kernels.attention.rotary`), and what Inductor makes of transformers'
  code where it is shown 7 tokens (as engines did until then) and 4,099, each compiled anew: Inductor's caches tell
  functions apart by the names of their sizes, so that they hand out what was made for another size. Bytes are those
  that such an op has to move, in and out; the share is of the rate at which a large tensor is copied, measured in the
  same run. Inputs are taken in turn, so that no cache holds them. Results are compared.
- `tune`: our op with other launch options.
- `calls`: one-token calls for 64 and 256 prompts of 512 random ids by an engine in mode `hybrid`: wall time, and the
  time of each kernel in one of them, by torch's profiler. `gates apart` is without the op for gate and up, `launched`
  without prefill graphs, `apart` also without the op for heads, `small` has layers that were shown 7 tokens, too.
  Layers are compiled anew for each.

    python benchmarks/prefill_kernels.py --models qwen3-0.6b llama-3.2-1b llama-3.1-8b [--output results.json]
    python benchmarks/prefill_kernels.py --smoke          # tiny, anywhere
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import (
    how_it_ran,
    random_model,
    random_prompts,
    release,
    report,
    seconds,
    shape_config,
    shape_dtype,
    synchronize,
    this_device,
)
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hybridgen import Engine
from hybridgen.device.timing import graph_seconds
from hybridgen.engine.builder import Builder
from hybridgen.execution import warm_up
from hybridgen.kernels.attention.ops import Places, write_kv
from hybridgen.kernels.attention.rotary import HeadNorms, rotate_and_write
from hybridgen.models import gated

PAGE, PROMPT = 64, 512
SHOWN = {"small": 7, "large": 4099}
"""Tokens that Inductor is shown."""
TURNS = 400 * 2**20
"""Bytes of inputs that are taken in turn."""
VARIANTS = ("as it is", "gates apart", "launched", "apart", "small")


class Heads(NamedTuple):
    """What lies between the projections and the attention of a call."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    norms: HeadNorms
    places: Places


def timed(calls: list[Callable[[], Any]], device: str) -> float:
    """Seconds of one of these calls; they run one after the other."""

    def all_of_them() -> None:
        for call in calls:
            call()

    if device == "cuda":
        return graph_seconds(all_of_them, 7, 2) / len(calls)
    return seconds(all_of_them, device, 2) / len(calls)


def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of copying a large tensor."""
    source = torch.empty(2**30 if device == "cuda" else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed([lambda: target.copy_(source)], device)


def anew(device: str) -> Any:
    """A context in which compilers hand out nothing that was made before; where nothing is timed, they may."""
    return torch._inductor.config.patch(force_disable_caches=device == "cuda")


def compiled(function: Callable[..., Any], inputs: Callable[[int], tuple[Any, ...]], shown: int, most: int) -> Any:
    """A function for any number of tokens, compiled at `shown` of them."""
    torch._dynamo.reset()
    made = torch.compile(function, fullgraph=True, dynamic=False)
    arguments = inputs(shown)
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.shape[:1] == (shown,):
            torch._dynamo.mark_dynamic(argument, 0, min=2, max=most)
    with anew(this_device()):
        made(*arguments)

    def run(*arguments: Any) -> Any:
        with torch._dynamo.config.patch(error_on_recompile=True):
            return made(*arguments)

    return run


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What stands before an MLP in a layer: the sum goes on to the layer's end."""
    total = residual + x
    rows = total.float()
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)
    return total, weight * rows.to(total.dtype)


def add(x: Tensor, residual: Tensor) -> Tensor:
    return residual + x


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def ops(name: str, device: str, tokens: int, rate: float, tunes: bool) -> list[dict[str, Any]]:
    """Rows of part `ops` and, if asked for, `tune`."""
    config: Any = shape_config(name)
    dtype = shape_dtype(name, device)
    heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    dim = getattr(config, "head_dim", None) or hidden // heads
    normed = name.startswith("qwen3")
    rows: list[dict[str, Any]] = []

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float32, device=device).to(dtype)

    def tell(op: str, how: str, took: float, bytes_: int, **more: Any) -> None:
        row = {"model": name, "op": op, "how": how, "us": took * 1e6, "bytes": bytes_, "share": bytes_ / took / rate}
        rows.append(row | more)
        print(f"{name:<14} {op:<16} {how:<22} {took * 1e6:9.1f} us {bytes_ / 1e6:8.1f} MB {row['share']:6.1%}", more)

    weight = random(hidden)
    simple: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Tensor, ...]], int]] = {
        "add + norm": (add_norm, lambda n: (random(n, hidden), random(n, hidden), weight), 4 * hidden),
        "add": (add, lambda n: (random(n, hidden), random(n, hidden)), 3 * hidden),
        "silu * up": (silu_mul, lambda n: (random(n, 2 * config.intermediate_size),), 3 * config.intermediate_size),
    }
    for op, (function, inputs, width) in simple.items():
        bytes_ = tokens * width * dtype.itemsize
        turns = [inputs(tokens) for _ in range(max(1, TURNS // bytes_))] if device == "cuda" else [inputs(tokens)]
        for how, shown in SHOWN.items():
            made = compiled(function, inputs, min(shown, tokens), tokens)
            took = timed([lambda made=made, turn=turn: made(*turn) for turn in turns], device)
            tell(op, f"Inductor, shown {shown}", took, bytes_, shown=how)
        del turns

    weights = [random(dim).abs() + 0.5 for _ in range(2)] if normed else [None, None]
    sizes = heads * dim, kv_heads * dim, kv_heads * dim

    def case(count: int) -> Heads:
        prompts = -(-tokens // PROMPT)  # whatever the count: pages are no dynamic dimension here
        each = -(-PROMPT // PAGE)
        pages = [torch.zeros(prompts * each + 1, kv_heads, PAGE, dim, dtype=dtype, device=device) for _ in range(2)]
        table = torch.arange(1, prompts * each + 1, dtype=torch.int32, device=device).view(prompts, each)
        index = torch.arange(count, device=device)
        positions = index % PROMPT
        angles = positions[:, None] / 10000 ** (torch.arange(0, dim, 2, device=device) / dim)
        angles = torch.cat((angles, angles), -1)
        places = Places(*pages, table, (index // PROMPT).int(), positions)
        norms = HeadNorms(*weights, 1e-6, 1e-6)
        return Heads(random(count, sum(sizes)), angles.cos().to(dtype), angles.sin().to(dtype), norms, places)

    def split(qkv: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (-1, dim)) for part in qkv.split(sizes, -1)]

    norm_modules = []
    for by in weights:
        module = LlamaRMSNorm(dim, 1e-6).to(device, dtype).requires_grad_(False)
        if by is not None:
            module.weight.data = by
        norm_modules.append(module)

    def by_transformers(
        qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, positions: Tensor, *rest: Tensor
    ) -> Tensor:
        q, k, v = split(qkv)
        if normed:
            q, k = (module(part) for module, part in zip(norm_modules, (q, k), strict=True))
        turned = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
        q, k = (part[0].transpose(0, 1) for part in turned)
        write_kv(k, v, Places(*rest, slots, positions))
        return q * 1  # contiguous, as attention gets it

    def flat(case: Heads) -> tuple[Tensor, ...]:
        return case.qkv, case.cos, case.sin, *case.places[3:], *case.places[:3]

    bytes_ = tokens * dtype.itemsize * (2 * sum(sizes) + 2 * dim)
    cases = [case(tokens) for _ in range(max(1, TURNS // bytes_) if device == "cuda" else 1)]
    results: dict[str, tuple[Tensor, Tensor]] = {}

    def ours(case: Heads, **tune: Any) -> Tensor:
        if not tune:
            return rotate_and_write(*split(case.qkv), case.cos, case.sin, case.norms, case.places)
        from hybridgen.kernels.attention.rotary_kernels import rotate_and_write as launch

        return launch(*split(case.qkv), case.cos, case.sin, *case.norms, *case.places, **tune)

    with torch.inference_mode():
        results["ours"] = ours(cases[0]), cases[0].places.k_pages.clone()
        took = timed([lambda each=each: ours(each) for each in cases], device)
    for how, shown in SHOWN.items():
        made = compiled(by_transformers, lambda n: flat(case(n)), min(shown, tokens), tokens)
        cases[0].places.k_pages.zero_()
        out = made(*flat(cases[0]))
        error = [
            float((a.float() - b.float()).abs().max())
            for a, b in zip((out, cases[0].places.k_pages), results["ours"], strict=True)
        ]
        compiled_took = timed([lambda made=made, each=each: made(*flat(each)) for each in cases], device)
        tell("heads", f"Inductor, shown {shown}", compiled_took, bytes_, shown=how, largest_difference=max(error))
    tell("heads", "ours", took, bytes_)
    if tunes and device == "cuda":
        from hybridgen.kernels.attention.rotary_kernels import Tuning

        with torch.inference_mode():
            for elements in (512, 1024, 2048, 4096):
                for warps in (2, 4, 8):
                    tune = Tuning(elements, warps)
                    took = timed([lambda each=each, tune=tune: ours(each, tune=tune) for each in cases], device)
                    tell("heads", f"ours {elements} {warps}", took, bytes_, tune=tune._asdict())
    return rows


def kernels_of(call: Callable[[], Any]) -> dict[str, Any]:
    """The device's time in a call by kernel, and the call's wall time, both in us."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - start) * 1e6
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiled.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            total[event.name][0] += event.time_range.elapsed_us()
            total[event.name][1] += 1
    ordered = sorted(total.items(), key=lambda item: -item[1][0])
    busy = sum(took for took, _ in total.values())
    print(f"  wall {wall / 1e3:.1f} ms with the profiler, kernels {busy / 1e3:.1f} ms")
    for kernel, (took, count) in ordered[:16]:
        print(f"  {took / 1e3:9.2f} ms {took / busy:6.1%} {count:6} x {took / count:8.1f} us  {kernel[:90]}")
    rows = [{"kernel": kernel, "us": took, "count": count} for kernel, (took, count) in ordered[:40]]
    return {"profiled_wall_us": wall, "kernels_us": busy, "kernels": rows}


def calls(
    name: str, device: str, variant: str, batches: list[int], prompt: int, repeats: int, options: dict[str, Any]
) -> dict[str, Any]:
    """A row of part `calls`."""
    shown, rotates, has_kernel = warm_up.shown_sizes, Builder._rotates_in_one_op, gated.has_kernel
    if variant == "small":
        warm_up.shown_sizes = lambda runner: (warm_up.WARM_UP_RUN, warm_up.WARM_UP_ROWS)
    if variant == "gates apart":
        gated.has_kernel = lambda weight: False
    if variant not in ("as it is", "gates apart"):
        options = {**options, "prefill_buckets": []}
    if variant not in ("as it is", "gates apart", "launched"):
        Builder._rotates_in_one_op = lambda self: False  # type: ignore[method-assign]
    row: dict[str, Any] = {"model": name, "variant": variant, "prompt": prompt}
    seeds = iter(range(1000))
    try:
        model = random_model(name, shape_dtype(name, device), device)
        with anew(device), Engine.load(model, prefix_cache=False, **options) as engine:

            def call(batch: int) -> float:
                ids = random_prompts(batch, prompt, model.config.vocab_size, seed=next(seeds))
                synchronize(device)
                start = time.perf_counter()
                engine.generate(ids, max_new_tokens=1, temperature=0, ignore_eos=True)
                synchronize(device)
                return time.perf_counter() - start

            for batch in batches:
                call(batch)
                row[f"ms_{batch}"] = statistics.median(call(batch) for _ in range(repeats)) * 1e3
                print(f"{name:<14} {variant:<9} {batch:4} x {prompt}: {row[f'ms_{batch}']:9.1f} ms", flush=True)
            if device == "cuda":
                row |= kernels_of(lambda: call(batches[0]))
            row["how"] = how_it_ran(engine)
    finally:
        warm_up.shown_sizes = shown
        gated.has_kernel = has_kernel
        Builder._rotates_in_one_op = rotates  # type: ignore[method-assign]
    release()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--parts", nargs="+", default=["ops", "calls"], choices=["ops", "tune", "calls"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny, anywhere")
    arguments = parser.parse_args()
    device = this_device()
    # No step is recorded or fused here: starts are faster, and prefill does not depend on it.
    options: dict[str, Any] = {"max_batch": 256, "max_context": 4608, "capture_at_start": False, "fused_decode": False}
    models, tokens, batches, prompt, repeats = (
        arguments.models, arguments.tokens, arguments.batches, PROMPT, arguments.repeats,
    )  # fmt: skip
    if arguments.smoke:
        models, tokens, batches, prompt, repeats = ["tiny"], 32, [2, 3], 16, 1
        options |= {"max_batch": 4, "max_context": 64, "kv_memory": "16MiB", "compile_backend": "eager"}
    options |= {"mode": "hybrid", "progress": False}
    results: dict[str, Any] = {"benchmark": "prefill_kernels", "tokens": tokens, "rows": [], "calls": []}
    if "ops" in arguments.parts or "tune" in arguments.parts:
        rate = results["copy_bytes_per_s"] = copy_rate(device)
        print(f"copies {rate / 1e9:.0f} GB/s, read and written")
        for name in models:
            results["rows"] += ops(name, device, tokens, rate, "tune" in arguments.parts)
            release()
    if "calls" in arguments.parts:
        for name in models:
            for variant in arguments.variants:
                results["calls"].append(calls(name, device, variant, batches, prompt, repeats, options))
    report(results, arguments.output)


if __name__ == "__main__":
    main()
