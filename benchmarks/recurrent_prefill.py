"""What does a recurrence over several prompts take, one by one in torch and packed in `fla-core`?

The gated delta rule with the heads of Qwen3.5-4B (16 of keys, 32 of values, all of 128), and the scan of Mamba-2 with
those of its 2.7B model (80 of 64, states of 128, one group); bf16 in, states in float32. Prompts one by one are
transformers' own torch functions, those of one length in one call; packed they are one call of `fla-core` (MIT license,
`pip install "hybridgen[hybrid]"`), which is told where they begin. Before the times: outputs and states of both against
the definition token by token in float64, from states that are not zero, and 200 calls whose bits must not change. Wall
time of whole calls, medians, with what the first call took (kernels are compiled then).

    python benchmarks/recurrent_prefill.py [--output recurrent-prefill.json]
    python benchmarks/recurrent_prefill.py --smoke          # tiny, without fla-core
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import provenance, report, seconds, synchronize, this_device, write
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5

from hybridgen.kernels.packed_runs import delta_rule, load, scan
from hybridgen.models.packed import runs_of

KEY_HEADS, VALUE_HEADS, SIZE = 16, 32, 128
PROMPTS = {
    "one of 512": [512],
    "8 of 512": [512] * 8,
    "8 of 8 lengths": [700, 33, 512, 1, 64, 65, 900, 400],
    "64 of 64": [64] * 64,
    "64 of 64 lengths": [1 + 15 * i for i in range(64)],
    "one of 8192": [8192],
}
REPEATS = 200
_in_chunks: Callable[..., Any] = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)  # type: ignore[assignment]
_scan_in_chunks: Callable[..., Any] = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)  # type: ignore[assignment]


SCANS = ("one of 512", "8 of 8 lengths")
"""Of PROMPTS those that Mamba-2's torch function has the memory for."""


class Case(NamedTuple):
    """What packed prompts bring to the rule, each [1, T, heads, ...], and their states from before."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    states: Tensor
    """[prompts, value heads, size, size], float32"""
    lengths: Sequence[int]

    def runs(self) -> list[slice]:
        return slices(self.lengths)


def make_case(lengths: Sequence[int], device: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> Case:
    key_heads, value_heads, size = heads
    tokens = sum(lengths)
    q, k = (torch.randn(1, tokens, key_heads, size, device=device).to(dtype) for _ in range(2))
    v = torch.randn(1, tokens, value_heads, size, device=device).to(dtype)
    g = -torch.rand(1, tokens, value_heads, device=device) * 0.2
    beta = torch.rand(1, tokens, value_heads, device=device).to(dtype)
    states = torch.randn(len(lengths), value_heads, size, size, device=device) * 0.1
    return Case(q, k, v, g, beta, states, lengths)


def one_by_one(case: Case) -> tuple[Tensor, Tensor]:
    """By torch, prompts of one length together. Returns outputs [1, T, value heads, size] and states."""
    out, states = torch.empty_like(case.v), torch.empty_like(case.states)
    repeat = case.v.shape[2] // case.q.shape[2]
    runs = case.runs()
    for length in dict.fromkeys(case.lengths):
        rows = [row for row, other in enumerate(case.lengths) if other == length]
        q, k, v, g, beta = (torch.cat([each[:, runs[row]] for row in rows]) for each in case[:5])
        q, k = (each.repeat_interleave(repeat, dim=2) for each in (q, k))
        asked = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        found, after = _in_chunks(q, k, v, g, beta, initial_state=case.states[rows], **asked)
        for row, each in zip(rows, found, strict=True):
            out[0, runs[row]] = each
        states[rows] = after
    return out, states


def exactly(case: Case) -> tuple[Tensor, Tensor]:
    """Token by token in float64, the definition."""
    q, k, v, g, beta = (each[0].double() for each in case[:5])
    repeat = v.shape[1] // q.shape[1]
    q, k = (
        (each * (each.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(repeat, dim=1)
        for each in (q, k)
    )
    q = q * q.shape[-1] ** -0.5
    out, states = torch.empty_like(v), case.states.double()
    for row, run in enumerate(case.runs()):
        state = states[row]
        for t in range(run.start, run.stop):
            state = state * g[t].exp()[:, None, None]
            change = (v[t] - torch.einsum("hk,hkv->hv", k[t], state)) * beta[t][:, None]
            state = state + k[t][:, :, None] * change[:, None]
            out[t] = torch.einsum("hk,hkv->hv", q[t], state)
        states[row] = state
    return out[None], states


def difference(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """Of outputs or states, the larger, relative to the largest number."""
    pairs = zip(found, wanted, strict=True)
    return max(
        float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()) for ours, theirs in pairs
    )


def changed_bits(call: Callable[[], tuple[Tensor, Tensor]], repeats: int) -> int:
    """How many of so many calls gave other bits than the first."""
    first = [each.clone() for each in call()]
    count = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(repeats):
        count += torch.stack([(a != b).any() for a, b in zip(call(), first, strict=True)]).any()
    return int(count)


def slices(lengths: Sequence[int]) -> list[slice]:
    ends = list(itertools.accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


class Scan:
    """What packed prompts bring to the scan of Mamba-2."""

    def __init__(self, lengths: list[int], device: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
        heads, size, state = sizes
        tokens = sum(lengths)
        self.lengths, self.runs = lengths, slices(lengths)
        self.x = torch.randn(1, tokens, heads, size, device=device).to(dtype)
        self.dt = torch.rand(1, tokens, heads, device=device).to(dtype) * 0.1
        self.b, self.c = (torch.randn(1, tokens, 1, state, device=device).to(dtype) for _ in range(2))
        self.decay, self.skip = -torch.rand(heads, device=device) * 16, torch.ones(heads, device=device)
        self.states = torch.randn(len(lengths), heads, size, state, device=device) * 0.1
        self.on_host = torch.tensor([0, *itertools.accumulate(lengths)])
        self.starts = self.on_host.to(device)

    def one_by_one(self) -> tuple[Tensor, Tensor]:
        out, states = torch.empty_like(self.x, dtype=torch.float32), torch.empty_like(self.states)
        for row, run in enumerate(self.runs):
            x, dt, b, c = (each[:, run] for each in (self.x, self.dt, self.b, self.c))
            out[:, run], states[row : row + 1] = _scan_in_chunks(
                x, dt, self.decay, b, c, chunk_size=256, D=self.skip, initial_states=self.states[row : row + 1],
                return_final_states=True,
            )  # fmt: skip
        return out, states

    def packed(self, rule: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        inputs = self.x, self.dt, self.decay, self.b, self.c, self.skip, self.states
        return scan(rule, *inputs, self.starts, self.on_host)

    def exactly(self) -> tuple[Tensor, Tensor]:
        x, dt, b, c = (each[0].double() for each in (self.x, self.dt, self.b, self.c))
        out, states = torch.empty_like(x), self.states.double()
        for row, run in enumerate(self.runs):
            state = states[row]
            for t in range(run.start, run.stop):
                fading = (dt[t] * self.decay.double()).exp()[:, None, None]
                state = state * fading + (x[t] * dt[t][:, None])[:, :, None] * b[t][:, None]
                out[t] = (state * c[t][:, None]).sum(-1) + self.skip.double()[:, None] * x[t]
            states[row] = state
        return out[None], states


def measure_scan(name: str, lengths: list[int], rule: Callable[..., Any] | None, device: str) -> dict[str, Any]:
    sizes = (4, 8, 16) if device == "cpu" else (80, 64, 128)
    case = Scan(lengths, device, torch.float32 if device == "cpu" else torch.bfloat16, sizes)
    row: dict[str, Any] = {"recurrence": "scan", "prompts": name, "tokens": sum(lengths)}
    exact = case.exactly()
    row["torch_error"] = difference(case.one_by_one(), exact)
    row["torch_ms"] = seconds(case.one_by_one, device, 3) * 1e3
    if rule is not None:
        row |= measure_packed(partial(case.packed, rule), exact, device)
    show(f"scan, {name}", row)
    return row


def measure_packed(call: Callable[[], Any], wanted: tuple[Tensor, Tensor], device: str) -> dict[str, Any]:
    start = time.perf_counter()
    found = call()
    synchronize(device)
    row: dict[str, Any] = {"first_s": time.perf_counter() - start, "packed_error": difference(found, wanted)}
    row["changed"] = changed_bits(call, REPEATS)
    row["packed_ms"] = seconds(call, device, 15) * 1e3
    return row


def show(name: str, row: dict[str, Any]) -> None:
    shown = (row.get(each) for each in ("torch_ms", "packed_ms", "first_s", "torch_error", "packed_error", "changed"))
    print(f"{name:22}", *("        -" if each is None else f"{each:9.4g}" for each in shown), flush=True)


def measure(name: str, lengths: list[int], rule: Callable[..., Any] | None, device: str, smoke: bool) -> dict[str, Any]:
    heads = (2, 4, 16) if smoke else (KEY_HEADS, VALUE_HEADS, SIZE)
    case = make_case(lengths, device, torch.float32 if device == "cpu" else torch.bfloat16, heads)
    row: dict[str, Any] = {"recurrence": "delta rule", "prompts": name, "tokens": sum(lengths)}
    by_torch = one_by_one(case)
    exact = exactly(case) if sum(lengths) <= 4096 else None
    row["torch_error"] = None if exact is None else difference(by_torch, exact)
    row["torch_ms"] = seconds(partial(one_by_one, case), device, 5) * 1e3
    if rule is not None:
        runs = runs_of(lengths, 1, case.q.device)
        call = partial(delta_rule, rule, *case[:6], runs.starts, runs.chunks)
        row |= measure_packed(call, by_torch if exact is None else exact, device)
    show(name, row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, without fla-core")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    device = this_device()
    results: dict[str, Any] = {"benchmark": "recurrent_prefill", "rows": []}
    head = {"provenance": provenance()}
    rules = None
    if not arguments.smoke and device == "cuda":
        start = time.perf_counter()
        rules = load()
        if rules is None:
            raise SystemExit('fla-core cannot be loaded; pip install "hybridgen[hybrid]"')
        results |= {"fla": importlib.metadata.version("fla-core"), "import_s": time.perf_counter() - start}
        print(f"fla {results['fla']}, loaded in {results['import_s']:.1f} s", flush=True)
    print(f"{'prompts':22}  torch ms packed ms   first s  errors: torch, packed   changed", flush=True)
    torch.manual_seed(0)
    few = {"3": [5, 1, 5]}
    with torch.inference_mode():
        for name, lengths in (few if arguments.smoke else PROMPTS).items():
            rule = None if rules is None else rules.delta
            results["rows"].append(measure(name, lengths, rule, device, arguments.smoke))
            write(head | results, arguments.output)
        for name, lengths in few.items() if arguments.smoke else [(name, PROMPTS[name]) for name in SCANS]:
            rule = None if rules is None else rules.linear
            results["rows"].append(measure_scan(name, lengths, rule, device))
            write(head | results, arguments.output)
    report(results, arguments.output)


if __name__ == "__main__":
    main()
