"""Tables of what steps take: modes, hosts, graphs, kernels."""

from __future__ import annotations

import re

from table_cells import Result, mib, number, share, spread, table

_DECODE = re.compile(r"decode_\d+_us")


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
        rows.append([model, str(batch), *(number(step) for step in steps), rate])
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
                    spread(row["host"]),
                    *(number(part) for part in parts),
                    spread(row["wall"]),
                    spread(device),
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
            values = [number(ratio[name], 3) for name in ("p50", "p99", "max")]
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
                    *(number(row.get(f"decode_{batch}_us")) for batch in batches),
                    number(row["ttft_us"]),
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
            *(number(row[f"{name}_us"]) for name in ("launch", "synchronised", "stream", "graph")),
        ]
        for result in results
        for row in result["rows"]
    ]
    return table(["pairs", "way", "launch, µs", "with a wait, µs", "of 1000 calls, µs", "in a graph, µs"], rows, 2)


def preparation(results: list[Result]) -> list[str]:
    """Ways to prepare a replay."""
    rows = [
        [row["part"], row["way"], number(row["host_us"]), number(row["step_us"])]
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
        rows.append([model, str(batch), *(number(None if row is None else row["step_us"]) for row in of), ran])
    lines = table(["µs per step", "batch", "`manual`", "`exact`", "`both`", "`both` ran"], rows)
    lines += [""]
    costs = [
        [
            row["model"],
            f"`{row['owner']}`",
            f"{row['mix_tokens_per_s']:,.0f}",
            number(row["start_s"]),
            number(row["idle_s"]),
            str(row["graphs"]),
            *(mib(row[name]) for name in ("graph_bytes", "start_bytes", "end_bytes")),
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
            number(row["step_us"]),
            number(row.get("floor_us")),
            "-" if row.get("mbu") is None else f"{row['mbu']:.1%}",
            f"{row['batch'] / row['step_us'] * 1e6:,.0f}",
            number(row["first_token_ms"], 2),
            *(share(row.get(f"{name}_utilisation")) for name in ("cpu", "gpu")),
        ]
        for result in results
        for row in result["rows"]
    ]
    head = ["", "", "µs per step", "floor, µs", "MBU", "tokens/s", "a call for 1 token, ms", "CPU", "GPU"]
    return table(head, rows, 2)


def ceilings(results: list[Result]) -> list[str]:
    """What the device reaches at most."""
    rows = [
        [row["what"], row["unit"], number(row["rate"], 0), number(row["best"], 0)]
        for result in results
        for row in result["rows"]
    ]
    return table(["", "unit", "median", "best"], rows, 2)


def rows(results: list[Result]) -> list[str]:
    """The kernel for several columns, by shape and format of the weights."""
    lines = []
    for result in results:
        for variant in result["variants"]:
            if "times" not in variant:  # not measured: the check refused it, or the time was up
                continue
            times = {(time["columns"], time["position"], "one_request" in time): time for time in variant["times"]}
            repeats = [variant["repeats"]]  # by which columns a step has
            for others in ("repeats_of_several_tokens", "repeats_of_other_columns"):
                repeats += variant.get(others, {}).values()
            found = [times.get((columns, 512, False)) for columns in (1, 2, 4, 8)]
            drafts = times.get((4, 512, True))
            lines.append(
                [
                    variant["model"],
                    variant["format"],
                    *("-" if time is None else f"{time['us']:,.0f}" for time in (*found, drafts)),
                    share(found[0] and found[0]["of_ceiling"]),
                    share(found[-1] and found[-1]["of_ceiling"]),
                    f"{sum(each['different'] for each in repeats)} of {sum(each['steps'] for each in repeats):,}",
                ]
            )
    head = ["shape", "weights", "1 column, µs", "2", "4", "8", "4 tokens of one request", "of the ceiling, 1", "8"]
    return table([*head, "repeats with other bits"], lines, 2)


def experts(results: list[Result]) -> list[str]:
    """A layer's experts by our op and by transformers' ways, against reading the chosen experts' weights."""
    rows = []
    for result in results:
        for row in result["times"]:
            figures = [number(row["active_experts"]), number(row["us"]), f"{row['percent_of_ceiling']:.1f}%"]
            rows.append([row["shape"], str(row["rows"]), f"`{row['way']}`", *figures])
    return table(["shape", "rows", "way", "experts read", "µs a layer", "of the ceiling"], rows, 3)


def latent(results: list[Result]) -> list[str]:
    """Decode attention to latents, beside only reading them, and prefill beside keys and values."""
    rows = []
    for result in results:
        for row in result["decode"]:
            times = [number(row.get(name)) for name in ("us", "attend_us", "combine_us", "only_read_us")]
            shares = [number(row.get(name)) for name in ("percent_of_ceiling", "percent_of_only_reading")]
            rows.append([f"decode, {row['batch']} rows of {row['context']:,}", *times, *shares, "-", "-"])
        for row in result["prefill"]:
            others = [number(row.get(name)) for name in ("own_keys_us", "keys_and_values_us")]
            rows.append([f"prefill, {row['tokens']:,} tokens", number(row["us"]), *["-"] * 5, *others])
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
        ratios = [number(row.get(name), 2) for name in ("times_huggingface", "share_of_ceiling")]
        ratios.append(number(row["p99_over_p50"], 2) if row.get("gaps", 0) >= 50 else "-")  # else it is the largest gap
        repeats = f"{row['repeats_that_differ']} of {row['repeats']:,}" if "repeats" in row else "-"
        rows.append([*where, number(row["step_us"], 0), *ratios, number(row["prefill_ms"]), repeats])
    figures = ["µs a step", "times Hugging Face", "of the read ceiling", "p99 over p50", "prefill, ms"]
    return table(["model", "rows", "mode", *figures, "repeats with other bits"], rows, 3)
