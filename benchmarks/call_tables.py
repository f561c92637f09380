"""Tables of what calls and starts take: first tokens, prompts, throughput, and what a model loses in a format."""

from __future__ import annotations

from typing import Any

from table_cells import Result, number, share, table


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
                    *(number(row[f"ttft_{part}_ms"], 2) for part in ("mean", "std", "p50", "p99")),
                    *(number(row[f"tpot_{part}_ms"], 2) for part in ("p50", "p99")),
                    _graphs_used(row.get("graphs")),
                    number(None if row.get("memory_bytes") is None else row["memory_bytes"] / 2**30, 2),
                    *(share(row.get(f"{name}_utilisation")) for name in ("cpu", "gpu")),
                    share(row["mbu"]),
                    share(row["equal_tokens"]),
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
                    cells = [row["model"], f"{batch} x {row['prompt']}", number(row[key])]
                    rate = number(row[f"prefill_tokens_per_s_{batch}"], 0)
                    rows.append([*cells, rate, number(row.get(f"step_ms_{batch}"), 2)])
    return table(["shape", "prompts", "ms", "tokens/s", "decode of as many rows, ms a step"], rows, 2)


def prefill_ops(results: list[Result]) -> list[str]:
    """What runs between the products of a prefill call, and its share of the copy rate."""
    rows = []
    for result in results:
        for row in result["rows"]:
            figures = [number(row["bytes"] / 1e6), number(row["us"]), share(row["share"])]
            rows.append([row["model"], row["op"], row["how"], *figures])
    return table(["shape", "", "by", "bytes, MB", "µs", "of the copy rate"], rows, 3)


def prefill_calls(results: list[Result]) -> list[str]:
    """One-token calls for many prompts, and the kernels of the smallest of them."""
    rows = []
    for result in results:
        for row in result["calls"]:
            batches = [key.removeprefix("ms_") for key in row if key.startswith("ms_")]
            for batch in batches:
                busy = number(row["kernels_us"] / 1e3) if batch == batches[0] and "kernels_us" in row else "-"
                cells = [row["model"], row["variant"], f"{batch} x {row['prompt']}"]
                rows.append([*cells, number(row[f"ms_{batch}"]), busy])
    return table(["shape", "", "prompts", "ms", "of which kernels run"], rows, 3)


def prefix_cache(results: list[Result]) -> list[str]:
    """Questions over one context, and the last turn of a chat."""
    rows = [
        [
            result["model"],
            row["what"],
            number(row["seconds_without"] * 1e3),
            number(row["seconds"] * 1e3),
            number(row["over_without"], 3),
            share(row["cached_share"]),
        ]
        for result in results
        for row in result["rows"]
    ]
    return table(["shape", "", "without, ms", "with, ms", "with over without", "of the prompts found"], rows, 2)


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
            rows.append([*cells, *(number(parts.get(phase), 2) for phase in PHASES)])
    head = ["shape", "start", "commit", "first token, s", "starts", "over `eager`", *PHASES]
    return [*table(head, rows, 3), *([""] if notes else []), *notes]


def demo_model(results: list[Result]) -> list[str]:
    """The demo model's loss by format."""
    rows = []
    for result in results:
        for name, row in result["losses"].items():
            # Its embedding, which is the head too, stays as it is.
            sizes = [one["bits"] for kind, one in row["formats"].items() if not kind.startswith("dense")]
            plain = max(one["bits"] for one in row["formats"].values())
            bits = row.get("stored_bits", max(sizes, default=plain))
            rows.append([f"`{name}`", f"{bits:.1f}", f"{row['nats_per_token']:.4f}", f"{row['over_float32']:.4f}"])
    return table(["demo model", "bits of a weight", "nats a token", "over float32"], rows)


def structured(results: list[Result]) -> list[str]:
    """Tokens per second with a schema beside those without, of one engine."""
    rows = []
    for result in results:
        for row in result["rows"]:
            for what, rate in row["tokens_per_s"].items():
                rows.append([str(row["batch"]), what, number(rate, 0), number(row["of_plain"][what], 3)])
    return table(["batch", "text", "tokens/s", "of plain"], rows, 2)
