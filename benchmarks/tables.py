"""Writes the tables of results in the docs from the JSON files in `benchmarks/results/`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in a page of `docs/`. It is made from the files
`NAME-*.json`, and says where no such file is that nothing was measured yet.

    python benchmarks/tables.py            # rewrite the pages
    python benchmarks/tables.py --check    # exit status 1 when a page and the files disagree
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lookup import rewrite_pages

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
NOT_MEASURED = "not measured yet"
_MARKED = re.compile(r"<!-- table: (?P<name>[a-z0-9-]+) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)

_DECODE = re.compile(r"decode_\d+_us")

Result = dict[str, Any]


def table(head: list[str], rows: Iterable[list[str]], words: int = 1) -> list[str]:
    """Lines of a Markdown table; all but the first columns, which hold words, are aligned to the right."""
    line = ["---"] * words + ["---:"] * (len(head) - words)
    return [f"| {' | '.join(cells)} |" for cells in (head, line, *rows)]


def workflows(results: list[Result]) -> list[str]:
    """Lines and seconds of what research scripts do, here and with transformers alone."""
    rows = []
    for row in (row for result in results for row in result["rows"]):
        ours, theirs, same = row["ours"], row["theirs"], row["same"]
        found = "drawn" if same is None else "all" if same in (True, 1) else f"{float(same):.0%}"
        lines, times = (
            [str(each["lines"]) for each in (ours, theirs)],
            [f"{row['seconds']:.2f}" for row in (ours, theirs)],
        )
        rows.append([row["task"], *lines, *times, f"{row['times as fast']:.1f}", found])
    return table(["task", "lines", "transformers'", "seconds", "transformers'", "times as fast", "same results"], rows)


def decode_modes(results: list[Result]) -> list[str]:
    """Microseconds of a decode step, by model, batch and mode."""
    found = {(r["model"], r["batch"], r["mode"]): r["step_us"] for result in results for r in result["rows"]}
    modes = [
        mode
        for mode in ("huggingface", "eager", "jit", "graph", "hybrid", "trees", "both")
        if any(mode == of for *_, of in found)
    ]
    sizes = sorted({(model, batch) for model, batch, _ in found})
    rows = []
    for model, batch in sizes:
        steps = [found.get((model, batch, mode)) for mode in modes]
        hybrid = found.get((model, batch, "hybrid"))
        rate = "-" if hybrid is None else f"{batch / hybrid * 1e6:,.0f}"
        rows.append([model, str(batch), *(_number(step) for step in steps), rate])
    names = ["Hugging Face" if mode == "huggingface" else f"`{mode}`" for mode in modes]
    return table(["µs per step", "batch", *names, "`hybrid`, tokens/s"], rows)


def replay(results: list[Result]) -> list[str]:
    """Host time of a step, and replays."""
    rows = []
    for result in results:
        for row in result["rows"]:
            parts = [row["parts"][name]["p50_us"] for name in ("schedule", "launch", "read", "bookkeeping")]
            device, profile = row["replay"]["device"], row["profile"]
            seen = bool(profile["runtime_calls"])
            rows.append(
                [
                    f"{result['model']}, batch {row['batch']}",
                    _spread(row["host"]),
                    *(_number(part) for part in parts),
                    _spread(row["wall"]),
                    _spread(device),
                    f"{sum(profile['runtime_calls'].values()):.1f}" if seen else "-",
                    f"{profile['copies_to_device']:g} / {profile['device_or_stream_waits']:g}" if seen else "-",
                ]
            )
    head = ["µs; p50 / p99", "host, a step", "schedule", "launch", "read", "bookkeeping", "wall, a step", "replay"]
    return table([*head, "CUDA calls a step", "copies to the device / waits for it"], rows)


def unseen(results: list[Result]) -> list[str]:
    """Ratios of steps at sizes without a graph."""
    rows = []
    for result in results:
        captures = result["captures"]
        kinds = {
            f"{result['model']}, all": result["ratio"],
            **result["ratio_by_kind"],
            "the reference against its median": result["ratio_of_the_reference"],
        }
        for kind, ratio in kinds.items():
            values = [_number(ratio[name], 3) for name in ("p50", "p99", "max")]
            rows.append([kind, f"{ratio['count']:,}", *values, f"{ratio['above_limit']:,}"])
        took = f"{captures['seconds']:.1f} s in all"
        rows.append([f"captures between calls: {captures['count']}, {took}", "", "", "", "", ""])
    return table(["steps", "count", "p50", "p99", "largest", "above 1.2"], rows)


def ablation(results: list[Result]) -> list[str]:
    """What each part brings."""
    batches = sorted({int(name[7:-3]) for r in results for row in r["rows"] for name in row if _DECODE.match(name)})
    rows = []
    for result in results:
        for row in result["rows"]:
            named = " " in row["variant"] and "=" not in row["variant"]
            executors = [row.get(f"decode_{batch}_by", "").partition(",")[0] for batch in batches]
            rows.append(
                [
                    row["variant"] if named or row["variant"] == "all" else f"`{row['variant']}`",
                    *(_number(row.get(f"decode_{batch}_us")) for batch in batches),
                    _number(row["ttft_us"]),
                    f"{row['mixed_tokens_per_s']:,.0f}",
                    ", ".join(executors) if any(executors) else "-",
                ]
            )
    steps = [f"decode at batch {batch}, µs" for batch in batches]
    lines = table(["", *steps, "TTFT of 64 tokens, µs", "mixed, tokens/s", "decoded by"], rows)
    refused = [
        f"- `{row['variant']}`: fused decode serves {how}."
        for result in results
        for row in result["rows"]
        for how in (row.get("fused") or {}).values()
        if how.startswith("none") and "fused_decode=False" not in how
    ]
    return [*lines, *([""] if refused else []), *refused]


def metadata_copy(results: list[Result]) -> list[str]:
    """Ways to copy a step's metadata."""
    rows = [
        [
            str(row["pairs"]),
            row["way"],
            *(_number(row[f"{name}_us"]) for name in ("launch", "synchronised", "stream", "graph")),
        ]
        for result in results
        for row in result["rows"]
    ]
    return table(["pairs", "way", "launch, µs", "with a wait, µs", "of 1000 calls, µs", "in a graph, µs"], rows, 2)


def preparation(results: list[Result]) -> list[str]:
    """Ways to prepare a replay."""
    rows = [
        [row["part"], row["way"], _number(row["host_us"]), _number(row["step_us"])]
        for result in results
        for row in result["rows"]
    ]
    return table(["part", "way", "host, a step, µs", "a step, µs"], rows, 2)


def trees(results: list[Result]) -> list[str]:
    """Sizes between the buckets by owner, and what each owner costs."""
    owners = ("manual", "exact", "both")
    found = [row for result in results for row in result["rows"]]
    steps = {(r["model"], r["batch"], r["owner"]): r for r in found if r["what"] == "decode"}
    rows = []
    for model, batch in sorted({(model, batch) for model, batch, _ in steps}):
        of = [steps.get((model, batch, owner)) for owner in owners]
        ran = "-" if of[2] is None else of[2]["by"][-1][1]
        rows.append([model, str(batch), *(_number(None if row is None else row["step_us"]) for row in of), ran])
    lines = table(["µs per step", "batch", "`manual`", "`exact`", "`both`", "`both` ran"], rows)
    lines += [""]
    costs = [
        [
            row["model"],
            f"`{row['owner']}`",
            f"{row['mix_tokens_per_s']:,.0f}",
            _number(row["start_s"]),
            _number(row["idle_s"]),
            str(row["graphs"]),
            *(_mib(row[name]) for name in ("graph_bytes", "start_bytes", "end_bytes")),
        ]
        for row in found
        if row["what"] == "start and mix"
    ]
    head = [
        "",
        "owner",
        "mix, tokens/s",
        "start, s",
        "idle, s",
        "graphs",
        "their MiB",
        "taken at start, MiB",
        "in the end",
    ]
    return [*lines, *table(head, costs, 2)]


def memory_limit(results: list[Result]) -> list[str]:
    """Decode steps against the floor that reading the weights sets."""
    rows = [
        [
            f"{row['model']}, batch {row['batch']}",
            row["what"],
            _number(row["step_us"]),
            _number(row.get("floor_us")),
            "-" if row.get("mbu") is None else f"{row['mbu']:.1%}",
            f"{row['batch'] / row['step_us'] * 1e6:,.0f}",
            _number(row["first_token_ms"], 2),
            *(_share(row.get(f"{name}_utilisation")) for name in ("cpu", "gpu")),
        ]
        for result in results
        for row in result["rows"]
    ]
    head = ["", "", "µs per step", "floor, µs", "MBU", "tokens/s", "a call for 1 token, ms", "CPU", "GPU"]
    return table(head, rows, 2)


def ttft(results: list[Result]) -> list[str]:
    """The table by prompt length: TTFT with its 99th percentile, what graphs ran, memory, utilisation, agreement."""
    rows = []
    for result in results:
        for row in [*sorted(result["rows"], key=lambda row: row["prompt"]), *averages(result["rows"])]:
            known = row["status"] == "ok" and row["calls"]
            rows.append(
                [
                    f"{result['model']}, {row['prompt']}",
                    f"`{row['mode']}`",
                    *(_number(row[f"ttft_{part}_ms"], 2) for part in ("mean", "std", "p50", "p99")),
                    *(_number(row[f"tpot_{part}_ms"], 2) for part in ("p50", "p99")),
                    _graphs_used(row.get("graphs")),
                    _number(None if row.get("memory_bytes") is None else row["memory_bytes"] / 2**30, 2),
                    *(_share(row.get(f"{name}_utilisation")) for name in ("cpu", "gpu")),
                    _share(row["mbu"]),
                    _share(row["equal_tokens"]),
                    "-" if row["logit_error"] is None else f"{row['logit_error']:.2g}",
                    f"{row['calls']} ({row['stopped']})" if known else row["status"],
                ]
            )
    # A 99th percentile by nearest rank is the largest value below 100 calls.
    few = all(row["calls"] < 100 for result in results for row in result["rows"])
    tail = "worst" if few else "p99"
    head = ["prompt", "mode", "TTFT mean, ms", "std", "p50", tail, "TPOT p50, ms", tail, _GRAPHS_USED, "memory, GiB"]
    lines = table([*head, "CPU", "GPU", "MBU", "= eager", "logit error", "calls (ended by)"], rows, 2)
    return [*lines, "", *(line for result in results for line in _lowest(result, tail))]


_GRAPHS_USED = "steps by graphs of the start / later ones / none"


def _graphs_used(graphs: dict[str, Any] | None) -> str:
    return "-" if graphs is None else " / ".join(f"{graphs[name]:,}" for name in ("pre_captured", "lazy", "none"))


def averages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each mode over its prompt lengths: the mean of every figure that all of them have; of steps and calls
    the sum. Modes with a row that was not measured have none, since it would be an average of other prompts."""
    found = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode]
        if any(row["status"] != "ok" for row in own):
            continue
        average: dict[str, Any] = {"mode": mode, "prompt": "average", "status": "ok", "stopped": f"{len(own)} prompts"}
        average["calls"] = sum(row["calls"] for row in own)
        for name in own[0]:
            if name in average or isinstance(own[0][name], str):
                continue
            values = [row.get(name) for row in own]
            numbers = [value for value in values if isinstance(value, (int, float))]
            average[name] = sum(numbers) / len(numbers) if len(numbers) == len(values) else None
        if all(row.get("graphs") is not None for row in own):
            names = ("pre_captured", "lazy", "none")
            average["graphs"] = {name: sum(row["graphs"][name] for row in own) for name in names}
        found.append(average)
    return found


def _lowest(result: Result, tail: str) -> list[str]:
    """Which mode is the fastest at each prompt length, by each figure."""
    lines = []
    figures = {"ttft_p50_ms": "median TTFT", "ttft_p99_ms": f"{tail} TTFT", "tpot_p99_ms": f"{tail} TPOT"}
    for name, title in figures.items():
        found: dict[str, list[str]] = {}
        for prompt in sorted({row["prompt"] for row in result["rows"]}):
            known = [row for row in result["rows"] if row["prompt"] == prompt and row[name] is not None]
            if known:
                found.setdefault(min(known, key=lambda row: row[name])["mode"], []).append(str(prompt))
        modes = "; ".join(f"`{mode}` at {', '.join(prompts)}" for mode, prompts in found.items())
        lines.append(f"- {result['model']}, lowest {title}: {modes or 'nothing measured'}.")
    return lines


def throughput(results: list[Result]) -> list[str]:
    """Offline throughput by model and engine."""
    rows = []
    for result in results:
        for row in result["rows"]:
            cells = [row["model"], f"`{row['engine']}`", f"{row['requests']:,}", f"{row['temperature']:g}"]
            if "error" in row:
                rows.append([*cells, "-", "-", row["error"]])
                continue
            seconds = sorted(row["seconds"])
            spread = f"{seconds[0]:,.2f}" if len(seconds) == 1 else f"{seconds[0]:,.2f} to {seconds[-1]:,.2f}"
            rows.append([*cells, f"{row['generated_tokens']:,}", spread, f"{row['tokens_per_s']:,.0f}"])
    return table(["model", "engine", "requests", "temperature", "tokens", "seconds", "tokens/s"], rows, 2)


def prefill(results: list[Result]) -> list[str]:
    """Prefill of many prompts, and decode of many rows."""
    rows = []
    for result in results:
        for row in result["rows"]:
            for key in row:
                if key.startswith("prefill_ms_"):
                    batch = key.rpartition("_")[2]
                    cells = [row["model"], f"{batch} x {row['prompt']}", _number(row[key])]
                    rate = _number(row[f"prefill_tokens_per_s_{batch}"], 0)
                    rows.append([*cells, rate, _number(row.get(f"step_ms_{batch}"), 2)])
    return table(["shape", "prompts", "ms", "tokens/s", "decode of as many rows, ms a step"], rows, 2)


def prefill_ops(results: list[Result]) -> list[str]:
    """What runs between the products of a prefill call, and its share of the copy rate."""
    rows = []
    for result in results:
        for row in result["rows"]:
            figures = [_number(row["bytes"] / 1e6), _number(row["us"]), _share(row["share"])]
            rows.append([row["model"], row["op"], row["how"], *figures])
    return table(["shape", "", "by", "bytes, MB", "µs", "of the copy rate"], rows, 3)


def prefill_calls(results: list[Result]) -> list[str]:
    """One-token calls for many prompts, and the kernels of the smallest of them."""
    rows = []
    for result in results:
        for row in result["calls"]:
            batches = [key.removeprefix("ms_") for key in row if key.startswith("ms_")]
            for batch in batches:
                busy = _number(row["kernels_us"] / 1e3) if batch == batches[0] and "kernels_us" in row else "-"
                cells = [row["model"], row["variant"], f"{batch} x {row['prompt']}"]
                rows.append([*cells, _number(row[f"ms_{batch}"]), busy])
    return table(["shape", "", "prompts", "ms", "of which kernels run"], rows, 3)


def prefix_cache(results: list[Result]) -> list[str]:
    """Questions over one context, and the last turn of a chat."""
    rows = [
        [
            result["model"],
            row["what"],
            _number(row["seconds_without"] * 1e3),
            _number(row["seconds"] * 1e3),
            _number(row["over_without"], 3),
            _share(row["cached_share"]),
        ]
        for result in results
        for row in result["rows"]
    ]
    return table(["shape", "", "without, ms", "with, ms", "with over without", "of the prompts found"], rows, 2)


def ceilings(results: list[Result]) -> list[str]:
    """What the device reaches at most."""
    rows = [
        [row["what"], row["unit"], _number(row["rate"], 0), _number(row["best"], 0)]
        for result in results
        for row in result["rows"]
    ]
    return table(["", "unit", "median", "best"], rows, 2)


PHASES = ("import", "load weights", "artifacts", "allocate cache", "tuning", "compile", "capture")


def warm_start(results: list[Result]) -> list[str]:
    """Seconds from the start of a process to its first token, and the phases of the last start."""
    rows, notes = [], []
    for result in results:
        eager = {row["shape"]: row["median_s"] for row in result["rows"] if row["case"] == "eager"}
        for row in result["rows"]:
            if row["case"] == "import":
                notes.append(f"- importing `hybridgen` takes {row['median_s']:.2f} s more than torch and transformers.")
                continue
            over = "-" if row["shape"] not in eager else f"{row['median_s'] / eager[row['shape']]:.2f}"
            parts = row["last"].get("startup", {})
            commit = result["provenance"]["commit"]
            cells = [row["shape"], row["case"], commit, f"{row['median_s']:.1f}", str(len(row["times_s"])), over]
            rows.append([*cells, *(_number(parts.get(phase), 2) for phase in PHASES)])
    head = ["shape", "start", "commit", "first token, s", "starts", "over `eager`", *PHASES]
    return [*table(head, rows, 3), *([""] if notes else []), *notes]


def speculation_text(results: list[Result]) -> list[str]:
    """Tokens a step on the demo model, by prompts and drafter."""
    rows = [
        [
            row["what"],
            row["drafter"],
            f"{row['repetition_penalty']:g}",
            f"{row['temperature']:g}",
            str(row["requests"]),
            str(row["new"]),
            _number(row["tokens_per_step"], 2),
            " / ".join(_number(row[name], 2) for name in ("least", "median", "most")),
            _share(row["accepted"]),
            f"{row['equal']} of {row['requests']}",
        ]
        for result in results
        for row in result["rows"]
    ]
    head = ["prompts", "drafter", "repetition penalty", "temperature", "requests", "tokens each", "tokens a step"]
    return table([*head, "least / median / most", "drafts accepted", "equal to plain"], rows, 2)


def speculation_search(results: list[Result]) -> list[str]:
    """Tokens a step and accepted drafts of ways to look for the end of a text in it, by prompts."""
    found: dict[tuple[int, int, str], dict[tuple[str, float], str]] = {}
    for result in results:
        for row in result["rows"]:
            cell = f"{_number(row['tokens_per_step'], 2)} ({row['accepted']:.0%})"
            how = row["shortest"], row["longest"], row["drafter"]
            found.setdefault(how, {})[row["what"], row["repetition_penalty"]] = cell
    kinds = list(dict.fromkeys(kind for cells in found.values() for kind in cells))
    head = ["tokens that agree", "drafter", *(f"{what}, penalty {penalty:g}" for what, penalty in kinds)]
    rows = [
        [f"{shortest} to {longest}", drafter, *(cells.get(kind, "-") for kind in kinds)]
        for (shortest, longest, drafter), cells in sorted(found.items())
    ]
    return table(head, rows, 2)


def demo_model(results: list[Result]) -> list[str]:
    """The demo model's loss by format."""
    rows = []
    for result in results:
        for name, row in result["losses"].items():
            # Its embedding, which is the head too, stays as it is.
            sizes = [one["bits"] for kind, one in row["formats"].items() if not kind.startswith("dense")]
            bits = max(sizes, default=32.0 if name == "float32" else 16.0)
            rows.append([f"`{name}`", f"{bits:.1f}", f"{row['nats_per_token']:.4f}", f"{row['over_float32']:.4f}"])
    return table(["demo model", "bits of a weight", "nats a token", "over float32"], rows)


def rows(results: list[Result]) -> list[str]:
    """The kernel for several columns, by shape and format of the weights."""
    lines = []
    for result in results:
        for variant in result["variants"]:
            times = {(time["columns"], time["position"], "one_request" in time): time for time in variant["times"]}
            found = [times.get((columns, 512, False)) for columns in (1, 2, 4, 8)]
            drafts = times.get((4, 512, True))
            lines.append(
                [
                    variant["model"],
                    variant["format"],
                    *("-" if time is None else f"{time['us']:,.0f}" for time in (*found, drafts)),
                    _share(found[0] and found[0]["of_ceiling"]),
                    _share(found[-1] and found[-1]["of_ceiling"]),
                    f"{variant['repeats']['different']} of {variant['repeats']['steps']:,}",
                ]
            )
    head = ["shape", "weights", "1 column, µs", "2", "4", "8", "4 tokens of one request", "of the ceiling, 1", "8"]
    return table([*head, "repeats with other bits"], lines, 2)


def speculation_machinery(results: list[Result]) -> list[str]:
    """Whole calls with so many right drafts, beside plain ones of the same run."""
    rows = []
    for result in results:
        plain = {
            (row["what"].rpartition(",")[2], row["batch"]): row for row in result["rows"] if "plain" in row["what"]
        }
        for row in result["rows"]:
            beside = plain["plain" if "right" in row else row["what"].rpartition(",")[2], row["batch"]]
            rate = [_number(row["tokens_per_s"], 0), _number(row["tokens_per_s"] / beside["tokens_per_s"], 3)]
            rows.append([row["model"], row["what"], str(row["batch"]), _number(row.get("tokens_per_step"), 2), *rate])
    return table(["shape", "", "batch", "tokens a step", "tokens/s", "over plain"], rows, 2)


def speculation_head(results: list[Result]) -> list[str]:
    """Steps that check 3 drafts, by who made them, beside plain ones of the same run."""
    rows = []
    for result in results:
        plain = {row["batch"]: row for row in result["rows"] if row["what"] == "plain"}
        names = {
            "head": "EAGLE-3 head",
            "head fp8": "EAGLE-3 head in FP8",
            "oracle": "oracle, 3 drafts checked and none made",
        }
        for row in result["rows"]:
            over = row["step_us"] / plain[row["batch"]]["step_us"]
            what = names.get(row["what"], row["what"])
            figures = [_number(row["step_us"], 0), _number(over, 3), _number(row["tokens_per_step"], 2)]
            rows.append([row["model"], what, str(row["batch"]), *figures, _number(row["tokens_per_s"], 0)])
    return table(["shape", "", "batch", "a step, us", "over plain", "tokens a step", "tokens/s"], rows, 2)


def experts(results: list[Result]) -> list[str]:
    """A layer's experts by our op and by transformers' ways, against reading the chosen experts' weights."""
    rows = []
    for result in results:
        for row in result["times"]:
            figures = [_number(row["active_experts"]), _number(row["us"]), f"{row['percent_of_ceiling']:.1f}%"]
            rows.append([row["shape"], str(row["rows"]), f"`{row['way']}`", *figures])
    return table(["shape", "rows", "way", "experts read", "µs a layer", "of the ceiling"], rows, 3)


def structured(results: list[Result]) -> list[str]:
    """Tokens per second with a schema beside those without, of one engine."""
    rows = []
    for result in results:
        for row in result["rows"]:
            for what, rate in row["tokens_per_s"].items():
                rows.append([str(row["batch"]), what, _number(rate, 0), _number(row["of_plain"][what], 3)])
    return table(["batch", "text", "tokens/s", "of plain"], rows, 2)


def latent(results: list[Result]) -> list[str]:
    """Decode attention to latents, beside only reading them, and prefill beside keys and values."""
    rows = []
    for result in results:
        for row in result["decode"]:
            times = [_number(row.get(name)) for name in ("us", "attend_us", "combine_us", "only_read_us")]
            shares = [_number(row.get(name)) for name in ("percent_of_ceiling", "percent_of_only_reading")]
            rows.append([f"decode, {row['batch']} rows of {row['context']:,}", *times, *shares, "-", "-"])
        for row in result["prefill"]:
            others = [_number(row.get(name)) for name in ("own_keys_us", "keys_and_values_us")]
            rows.append([f"prefill, {row['tokens']:,} tokens", _number(row["us"]), *["-"] * 5, *others])
    parts = ["µs", "first kernel alone", "second alone", "only reading"]
    shares = ["of the read ceiling, %", "of only reading, %"]
    return table(["call", *parts, *shares, "own keys and values, µs", "torch's, µs"], rows)


def model_shapes(results: list[Result]) -> list[str]:
    """Decode steps and prefill of models of many kinds, by mode."""
    rows = []
    for row in (row for result in results for row in result["rows"]):
        where = [row["model"], str(row["batch"]), f"`{row['mode']}`"]
        if "error" in row:
            rows.append([*where, row["error"].split(":")[0], *["-"] * 5])
            continue
        ratios = [_number(row.get(name), 2) for name in ("times_huggingface", "share_of_ceiling", "p99_over_p50")]
        repeats = f"{row['repeats_that_differ']} of {row['repeats']:,}" if "repeats" in row else "-"
        rows.append([*where, _number(row["step_us"], 0), *ratios, _number(row["prefill_ms"]), repeats])
    figures = ["µs a step", "times Hugging Face", "of the read ceiling", "p99 over p50", "prefill, ms"]
    return table(["model", "rows", "mode", *figures, "repeats with other bits"], rows, 3)


TABLES: dict[str, Callable[[list[Result]], list[str]]] = {
    "decode-modes": decode_modes,
    "workflows": workflows,
    "memory-limit": memory_limit,
    "replay": replay,
    "unseen": unseen,
    "ablation": ablation,
    "preparation": preparation,
    "trees": trees,
    "metadata-copy": metadata_copy,
    "ttft": ttft,
    "throughput": throughput,
    "prefill": prefill,
    "prefill-ops": prefill_ops,
    "prefill-calls": prefill_calls,
    "prefix-cache": prefix_cache,
    "ceilings": ceilings,
    "warm-start": warm_start,
    "speculation-text": speculation_text,
    "speculation-search": speculation_search,
    "demo-model": demo_model,
    "speculation-machinery": speculation_machinery,
    "speculation-rows": speculation_machinery,
    "speculation-head": speculation_head,
    "memory-fp8": memory_limit,
    "memory-bf16": memory_limit,
    "memory-int4": memory_limit,
    "utilisation": memory_limit,
    "experts": experts,
    "structured": structured,
    "latent": latent,
    "model-shapes": model_shapes,
    "rows": rows,
}


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _spread(times: dict[str, float]) -> str:
    return f"{times['p50_us']:,.1f} / {times['p99_us']:,.1f}"


def render(name: str, results: Path = RESULTS) -> str:
    """A table from its files, with where they are from."""
    if name not in TABLES:
        raise SystemExit(f"unknown table {name!r}; there are: {', '.join(TABLES)}")
    # A file belongs to the table with the longest name that it begins with.
    others = [other for other in TABLES if other.startswith(f"{name}-")]
    paths = sorted(
        path for path in results.glob(f"{name}-*.json") if not path.name.startswith(tuple(f"{o}-" for o in others))
    )
    if not paths:
        return f"{NOT_MEASURED}\n"
    found = [json.loads(path.read_text()) for path in paths]
    lines = [*TABLES[name](found), ""]
    for path, result in zip(paths, found, strict=True):
        where = result["provenance"]
        lines.append(f"`{path.name}`: {where.get('gpu', 'a CPU')}, torch {where['torch']}, commit {where['commit']}.")
    return "\n".join(lines) + "\n"


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A page with its tables as the files have them."""
    return _MARKED.sub(
        lambda m: f"<!-- table: {m['name']} -->\n{render(m['name'], results)}<!-- end -->",
        text,
    )


def main() -> int:
    return rewrite_pages(__doc__, DOCS, rewritten)


if __name__ == "__main__":
    sys.exit(main())
