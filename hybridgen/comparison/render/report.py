"""The result as tables: on a terminal, in Markdown, as CSV."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections import Counter
from typing import Any, NamedTuple

from hybridgen.comparison.data.results import OK, CellResult, ComparisonData, SubjectResult
from hybridgen.comparison.data.statistics import Summary
from hybridgen.engine.warm_start import PHASES
from hybridgen.errors import ConfigError

NONE = "-"


class Table(NamedTuple):
    """A table of text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(comparison: ComparisonData) -> list[Table]:
    """Everything that a reader compares."""
    cells = comparison.cells
    found = [
        Table("Times and agreement", _TIMES, [_times(cell) for cell in cells]),
        Table("Resources and graphs", _RESOURCES, [_resources(cell) for cell in cells if cell.status == OK]),
        startup(comparison),
    ]
    reasons = _reasons(comparison)
    if reasons:
        found.append(Table("How steps ran", ["", "steps", "phase, kind: reason"], reasons))
    return found


_TIMES = [
    "", "prompt", "batch", "TTFT mean, ms", "std", "p50", "p99", "TPOT p50, ms", "p95", "p99", "tokens/s",
    "= eager", "first diff.", "logit error", "calls", "±",
]  # fmt: skip


def _times(cell: CellResult) -> list[str]:
    place = [cell.subject, str(cell.prompt_length), str(cell.batch_size)]
    if cell.status != OK:
        return [*place, cell.status, *[NONE] * (len(_TIMES) - 5), NONE]
    first, gap = cell.ttft, cell.tpot
    agreement = cell.agreement
    difference = NONE
    if agreement is not None and agreement.first_difference is not None:
        difference = f"token {agreement.first_difference[1]} of prompt {agreement.first_difference[0]}"
    return [
        *place,
        *(_ms(first, name) for name in ("mean", "std", "p50", "p99")),
        *(_ms(gap, name) for name in ("p50", "p95", "p99")),
        _number(cell.tokens_per_s, ",.0f"),
        NONE if agreement is None else _percent(agreement.share),
        difference,
        _number(cell.logit_error, ".2g"),
        "1*" if cell.repeats == 1 else str(cell.repeats),
        stopped(cell),
    ]


def stopped(cell: CellResult) -> str:
    """How well the medians are known, and what ended the repeats."""
    shares = [s.interval_share for s in (cell.wall, cell.ttft) if s is not None]
    known = [share for share in shares if share is not None]
    width = NONE if len(known) < len(shares) or not known else f"{max(known):.1%}"
    return width if cell.stopped == "interval" else f"{width} ({cell.stopped})"


_RESOURCES = [
    "", "prompt", "batch", "CPU per step, ms", "CPU", "GPU", "memory, GiB", "MBU", "pre-captured", "lazy", "padded",
    "no graph", "hit rate", "failed captures",
]  # fmt: skip


def _resources(cell: CellResult) -> list[str]:
    graphs = cell.graphs
    return [
        cell.subject,
        str(cell.prompt_length),
        str(cell.batch_size),
        _number(None if cell.cpu_per_step is None else cell.cpu_per_step * 1e3, ",.2f"),
        _number(cell.cpu_utilisation, ".0%"),
        NONE if cell.gpu_utilisation is None else _percent(cell.gpu_utilisation),
        _number(None if cell.memory is None else cell.memory / 2**30, ",.2f"),
        NONE if cell.mbu is None else _percent(cell.mbu),
        *(NONE if graphs is None else f"{graphs[name]:,}" for name in ("pre_captured", "lazy", "padded", "none")),
        _number(None if graphs is None else graphs.get("hit_rate"), ".1%"),
        NONE if graphs is None or "capture_failures" not in graphs else str(graphs["capture_failures"]),
    ]


def startup_parts(comparison: ComparisonData) -> list[str]:
    """The parts of start-up that any subject has, in order."""
    order = [*PHASES, "other", "first calls"]
    found = {part for subject in comparison.subjects for part in subject.startup}
    return [*(part for part in order if part in found), *sorted(found.difference(order))]


def startup(comparison: ComparisonData) -> Table:
    """Seconds of start-up by part, and what was captured."""
    parts = startup_parts(comparison)
    rows = []
    for subject in comparison.subjects:
        if subject.status != OK:
            rows.append([subject.name, subject.status, *[NONE] * (len(parts) + 4)])
            continue
        rows.append(
            [
                subject.name,
                f"{sum(subject.startup.values()):,.2f}",
                *(_number(subject.startup.get(part), ",.2f") for part in parts),
                subject.compile_cache or NONE,
                *(NONE if count is None else str(count) for count in (subject.captured, subject.lazy_captures)),
                _number(None if subject.graph_bytes is None else subject.graph_bytes / 2**20, ",.0f"),
            ]
        )
    head = ["", "total, s", *parts, "compile cache", "graphs", "of them lazy", "graphs, MiB"]
    return Table("Start-up", head, rows)


def _reasons(comparison: ComparisonData) -> list[list[str]]:
    """Steps of all cells of a subject, by how they ran."""
    counted: dict[str, Counter[str]] = {}
    for cell in comparison.cells:
        if cell.graphs is not None:
            counted.setdefault(cell.subject, Counter()).update(cell.graphs["reasons"])
    return [
        [subject, f"{count:,}", reason]
        for subject, reasons in counted.items()
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ]


def warnings(comparison: ComparisonData) -> list[str]:
    """What a reader has to know before the figures; it stands above them."""
    ok = [cell for cell in comparison.cells if cell.status == OK]
    alone = sum(cell.repeats == 1 for cell in ok)
    if not alone:
        return []
    return [
        f"{alone} of {len(ok)} rows are of one call (calls 1*): their times say little. A larger budget "
        f"(--budget, here {comparison.config.budget:g} s) gives more."
    ]


def summary(comparison: ComparisonData) -> list[str]:
    """Lines on what was run, where, and how it ended."""
    config, facts = comparison.config, comparison.provenance
    where = facts.get("gpu") or f"{facts.get('processor') or 'CPU'}, {facts.get('threads')} thread(s)"
    draws = "greedy" if config.temperature == 0 else f"temperature {config.temperature:g}"
    ended = Counter(cell.stopped if cell.status == OK else cell.status for cell in comparison.cells)
    what = {
        "interval": f"within {config.tolerance:.0%}",
        "repeats": f"not within it after {config.repeats} calls",
        "budget": f"not within it when the budget of {config.budget:g} s ended",
    }
    lines = [
        f"{comparison.model}, {comparison.dtype} on {comparison.device} ({where}); torch {facts.get('torch')}, "
        f"transformers {facts.get('transformers')}, commit {facts.get('commit') or 'unknown'}.",
        f"{config.new_tokens} new tokens, {draws}, end-of-sequence ignored, seed {config.seed}; "
        f"{'calls of all rows in one random order' if config.together else 'one row after the other'}, "
        f"{comparison.measured_seconds:.0f} s measured.",
        f"Confidence interval ({config.confidence:.0%}) of the medians of a call's time and of TTFT (column ±): "
        + "; ".join(f"{count} cells {what.get(str(key), key)}" for key, count in sorted(ended.items(), key=str))
        + ".",
    ]
    if comparison.read_ceiling is not None:
        lines.append(f"Read ceiling for MBU, measured in this run: {comparison.read_ceiling / 1e9:,.0f} GB/s.")
    if any(subject.kind == "baseline" and subject.status == OK for subject in comparison.subjects):
        lines.append(
            "Baselines run on the same weights; their tokens are compared with mode eager's, and half precision lets "
            "near ties differ."
        )
    lines += [f"{place}: {cell.status}: {cell.error}" for cell, place in _failures(comparison)]
    for subject in comparison.subjects:
        lines += [f"{subject.name}: {problem}" for problem in _problems(subject)]
    return lines + comparison.notes


def _failures(comparison: ComparisonData) -> list[tuple[CellResult, str]]:
    """Cells that are not ok, one line for all of a subject that could not be built."""
    told: set[tuple[str, str | None]] = set()
    found = []
    for cell in comparison.cells:
        if cell.status == OK:
            continue
        whole = next(subject for subject in comparison.subjects if subject.name == cell.subject).status != OK
        if whole and (cell.subject, cell.error) in told:
            continue
        told.add((cell.subject, cell.error))
        place = cell.subject if whole else f"{cell.subject}, prompt {cell.prompt_length}, batch {cell.batch_size}"
        found.append((cell, place))
    return found


def _problems(subject: SubjectResult) -> list[str]:
    found = [f"{count} times: {reason}" for reason, count in subject.fallbacks.items()]
    found += [f"{what}: {why}" for what, why in subject.failures.items()]
    if subject.late_compiles:
        found.append(f"{subject.late_compiles} functions compiled after warm-up")
    return found


def check_tabulate() -> None:
    """Raise if there is none.

    Raises:
        ConfigError: tabulate is not installed.
    """
    if importlib.util.find_spec("tabulate") is None:
        raise ConfigError("tables need tabulate, which is not installed; install hybridgen[compare]")


def terminal(comparison: ComparisonData) -> str:
    """Tables for a terminal.

    Raises:
        ConfigError: tabulate is not installed.
    """
    check_tabulate()
    from tabulate import tabulate

    parts = warnings(comparison)
    for table in tables(comparison):
        text = tabulate(table.rows, table.head, tablefmt="simple", disable_numparse=True, colalign=_aligned(table))
        parts.append(f"{table.title}\n\n{text}")
    return "\n\n".join([*parts, "\n".join(summary(comparison))])


def _aligned(table: Table) -> list[str]:
    left = {"", "phase, kind: reason", "compile cache"}
    return ["left" if name in left else "right" for name in table.head]


def markdown(comparison: ComparisonData) -> str:
    """The same as a Markdown page."""
    lines = [f"# Comparison: {comparison.model}", ""]
    for line in warnings(comparison):
        lines += [f"**{line}**", ""]
    for table in tables(comparison):
        rules = ["---" if side == "left" else "---:" for side in _aligned(table)]
        rows = [table.head, rules, *table.rows]
        lines += [f"## {table.title}", "", *(_row(row) for row in rows), ""]
    lines += ["## Notes", "", *(f"- {line}" for line in summary(comparison))]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


_CSV_TIMES = ("count", "mean", "std", "p50", "p95", "p99", "low", "high")


def rows_for_csv(comparison: ComparisonData) -> list[dict[str, Any]]:
    """One flat row per cell; seconds, bytes and shares."""
    rows = []
    for cell in comparison.cells:
        row: dict[str, Any] = {
            name: getattr(cell, name)
            for name in ("subject", "prompt_length", "batch_size", "status", "error", "repeats", "stopped")
        }
        for name in ("wall", "ttft", "tpot"):
            found = getattr(cell, name)
            row |= {f"{name}_{part}": None if found is None else getattr(found, part) for part in _CSV_TIMES}
        row |= {
            name: getattr(cell, name)
            for name in (
                "tokens_per_s",
                "cpu_per_step",
                "cpu_utilisation",
                "gpu_utilisation",
                "memory",
                "mbu",
                "logit_error",
            )
        }
        agreement = cell.agreement
        row["equal_tokens"] = None if agreement is None else agreement.share
        place = None if agreement is None else agreement.first_difference
        row |= {"first_difference_prompt": place and place[0], "first_difference_token": place and place[1]}
        for name in ("pre_captured", "lazy", "padded", "none"):
            row[f"steps_{name}"] = None if cell.graphs is None else cell.graphs[name]
        for name in ("hit_rate", "capture_failures"):
            row[name] = None if cell.graphs is None else cell.graphs.get(name)
        rows.append(row)
    return rows


def comma_separated(comparison: ComparisonData) -> str:
    """The rows as CSV; empty where nothing is known."""
    rows = rows_for_csv(comparison)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _ms(found: Summary | None, name: str) -> str:
    return NONE if found is None else f"{getattr(found, name) * 1e3:,.2f}"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 1 else "100 %"
