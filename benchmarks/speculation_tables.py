"""Tables of drafts: how many tokens a step brings, and what checking them takes."""

from __future__ import annotations

from table_cells import Result, number, share, table


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
            number(row["tokens_per_step"], 2),
            " / ".join(number(row[name], 2) for name in ("least", "median", "most")),
            share(row["accepted"]),
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
            cell = f"{number(row['tokens_per_step'], 2)} ({row['accepted']:.0%})"
            how = row["shortest"], row["longest"], row["drafter"]
            found.setdefault(how, {})[row["what"], row["repetition_penalty"]] = cell
    kinds = list(dict.fromkeys(kind for cells in found.values() for kind in cells))
    head = ["tokens that agree", "drafter", *(f"{what}, penalty {penalty:g}" for what, penalty in kinds)]
    rows = [
        [f"{shortest} to {longest}", drafter, *(cells.get(kind, "-") for kind in kinds)]
        for (shortest, longest, drafter), cells in sorted(found.items())
    ]
    return table(head, rows, 2)


def speculation_machinery(results: list[Result]) -> list[str]:
    """Whole calls with so many right drafts, beside plain ones of the same run."""
    rows = []
    for result in results:
        plain = {
            (row["what"].rpartition(",")[2], row["batch"]): row for row in result["rows"] if "plain" in row["what"]
        }
        for row in result["rows"]:
            beside = plain["plain" if "right" in row else row["what"].rpartition(",")[2], row["batch"]]
            rate = [number(row["tokens_per_s"], 0), number(row["tokens_per_s"] / beside["tokens_per_s"], 3)]
            rows.append([row["model"], row["what"], str(row["batch"]), number(row.get("tokens_per_step"), 2), *rate])
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
            figures = [number(row["step_us"], 0), number(over, 3), number(row["tokens_per_step"], 2)]
            rows.append([row["model"], what, str(row["batch"]), *figures, number(row["tokens_per_s"], 0)])
    return table(["shape", "", "batch", "a step, us", "over plain", "tokens a step", "tokens/s"], rows, 2)
