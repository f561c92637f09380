"""The result as pictures: TTFT by prompt length, tokens per second by batch size, latencies, start-up.

Colours are Okabe and Ito's, which people with any kind of colour vision tell apart; markers and line styles differ too.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hybridgen.comparison.data.results import OK, CellResult, ComparisonData
from hybridgen.comparison.data.statistics import GRID, Summary
from hybridgen.comparison.render.report import startup_parts
from hybridgen.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#000000")
SWITCH_COLOUR = "#BBBBBB"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
MOST_PANELS = 6
MOST_COLUMNS = 4
DPI = 130


def check_matplotlib() -> None:
    """Raise if there is none.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib, which is not installed; install hybridgen[compare]")


def draw(comparison: ComparisonData) -> dict[str, bytes]:
    """PNG pictures by name.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_matplotlib()
    pictures: dict[str, Callable[[ComparisonData], Figure]] = {
        "ttft": ttft,
        "throughput": throughput,
        "latency": latency,
        "startup": startup,
    }
    return {name: _png(picture(comparison)) for name, picture in pictures.items()}


def ttft(comparison: ComparisonData) -> Figure:
    """TTFT by prompt length: medians above, 99th percentiles below; a column per batch size."""
    from matplotlib.figure import Figure

    batches = _spread(comparison.config.batch_sizes, MOST_COLUMNS)
    figure = Figure(figsize=(max(7.5, 4.2 * len(batches)), 7.2), layout="constrained")
    grid = figure.subplots(2, len(batches), squeeze=False, sharex=True)
    for row, (part, title) in enumerate((("p50", "median"), ("p99", "p99"))):
        for axes, batch in zip(grid[row], batches, strict=True):
            for index, name in enumerate(_lines(comparison)):
                cells = [cell for cell in _of(comparison, name) if cell.batch_size == batch]
                found = [(cell.prompt_length, cell.ttft) for cell in cells if cell.ttft is not None]
                if found:
                    heights = [getattr(times, part) * 1e3 for _, times in found]
                    axes.plot([length for length, _ in found], heights, label=name, **_style(index))
            axes.set_title(f"{title}, batch {batch}")
            _finish(axes, "prompt length, tokens" if row else "", f"TTFT {title}, ms")
    figure.suptitle("Time to first token")
    _legend(figure, list(grid.flat))
    return figure


def throughput(comparison: ComparisonData) -> Figure:
    """Tokens per second by batch size; a panel per prompt length."""
    lengths = _spread(comparison.config.prompt_lengths, MOST_PANELS)
    figure, panels = _panels(len(lengths), "Generated tokens per second, whole calls")
    sizes = comparison.config.batch_sizes
    for axes, length in zip(panels, lengths, strict=True):
        for index, name in enumerate(_lines(comparison)):
            row = [(c.batch_size, c.tokens_per_s) for c in _of(comparison, name) if c.prompt_length == length]
            found = [(batch, rate) for batch, rate in row if rate is not None]
            if found:
                axes.plot([batch for batch, _ in found], [rate for _, rate in found], label=name, **_style(index))
        if len(sizes) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(list(sizes), labels=[str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_title(f"prompts of {length} tokens")
        _finish(axes, "batch size", "tokens / s")
    _legend(figure, panels)
    return figure


def latency(comparison: ComparisonData) -> Figure:
    """Boxes of TTFT and TPOT of every row, at the smallest batch and the middle prompt length."""
    from matplotlib.figure import Figure

    config = comparison.config
    batch, length = config.batch_sizes[0], config.prompt_lengths[len(config.prompt_lengths) // 2]
    shown = [c for c in comparison.cells if (c.batch_size, c.prompt_length, c.status) == (batch, length, OK)]
    figure = Figure(figsize=(11, 1.7 + 0.42 * max(2, len(shown))), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind, title in zip(
        panels, ("ttft", "tpot"), ("time to first token", "time per output token"), strict=True
    ):
        drawn = [(place, times) for place, c in enumerate(shown) if (times := getattr(c, kind)) is not None]
        if drawn:
            boxes = [_box(times) for _, times in drawn]
            parts = axes.bxp(
                boxes, positions=[place for place, _ in drawn], orientation="horizontal", showfliers=False,
                widths=0.6, patch_artist=True, medianprops={"color": "black", "linewidth": 1.6},
            )  # fmt: skip
            lines = _lines(comparison)
            for patch, (place, _) in zip(parts["boxes"], drawn, strict=True):
                name = shown[place].subject
                colour = COLOURS[lines.index(name) % len(COLOURS)] if name in lines else SWITCH_COLOUR
                patch.set_facecolor(colour)
                patch.set_alpha(0.75)
            axes.plot(
                [times.p99 * 1e3 for _, times in drawn], [place for place, _ in drawn], "k|", markersize=13,
                markeredgewidth=1.8, label="p99",
            )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("ms (box: quartiles, whiskers: p4 to p96, stroke: p99)")
        axes.set_xlim(left=0)
        axes.grid(True, axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(shown)), labels=[cell.subject for cell in shown])
    panels[0].set_ylim(len(shown) - 0.4, -0.6)
    figure.suptitle(f"Latencies: prompts of {length} tokens, batch {batch}")
    return figure


def startup(comparison: ComparisonData) -> Figure:
    """Seconds of start-up, stacked by part."""
    from matplotlib.figure import Figure

    shown = [subject for subject in comparison.subjects if subject.status == OK]
    figure = Figure(figsize=(10, 1.9 + 0.45 * max(2, len(shown))), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(shown)
    # One fewer than colours, so that no two of 56 parts look alike.
    hatches = ("", "//", "..", "xx", "\\\\", "--", "oo")
    for index, part in enumerate(startup_parts(comparison)):
        widths = [subject.startup.get(part, 0.0) for subject in shown]
        axes.barh(
            range(len(shown)), widths, left=left, label=part, height=0.65, color=COLOURS[index % len(COLOURS)],
            edgecolor="white", hatch=hatches[index % len(hatches)],
        )  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.1f} s", va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), labels=[subject.name for subject in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, max([*left, 0.001]) * 1.12)
    axes.set_xlabel("seconds (first calls: by how much the first call of each cell was longer than its median)")
    axes.set_title("Start-up")
    axes.grid(True, axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _box(times: Summary) -> dict[str, Any]:
    at = dict(zip(GRID, times.grid, strict=True))
    # The grid has even percentiles.
    low, high = (at[24] + at[26]) / 2, (at[74] + at[76]) / 2
    return {
        "med": times.p50 * 1e3, "q1": low * 1e3, "q3": high * 1e3, "whislo": at[4] * 1e3, "whishi": at[96] * 1e3,
    }  # fmt: skip


def _lines(comparison: ComparisonData) -> list[str]:
    """Rows that get a line: modes and baselines; switches are in the tables and the boxes."""
    return [subject.name for subject in comparison.subjects if subject.kind != "switch"]


def _of(comparison: ComparisonData, name: str) -> list[CellResult]:
    return [cell for cell in comparison.cells if cell.subject == name and cell.status == OK]


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of them, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    step = (len(values) - 1) / (most - 1)
    return [values[round(index * step)] for index in range(most)]


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = math.ceil(count / columns)
    size = (7.5, 4.8) if count == 1 else (4.4 * columns, 3.5 * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    figure.suptitle(title)
    return figure, panels[:count]


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    # The margin above the points is a share of what is shown, from zero on: else the highest would be cut.
    axes.update_datalim([(0, 0)], updatex=False)
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.3)


def _legend(figure: Figure, panels: list[Axes]) -> None:
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.08, h_pad=0.08)  # type: ignore[call-arg]
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(6, len(found)), frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
