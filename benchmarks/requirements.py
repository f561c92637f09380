"""Writes the figures that the docs quote in their sentences from the JSON files in `benchmarks/results/`.

A figure stands between `<!-- figure: NAME -->` and `<!-- . -->` in a page of `docs/`; FIGURES says where each is from.

    python benchmarks/requirements.py            # rewrite the pages
    python benchmarks/requirements.py --check    # exit status 1 when a page and the files disagree
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

from lookup import RESULTS, ROOT, figure, result, rewrite_pages

DOCS = ROOT / "docs"
_MARKED = re.compile(r"<!-- figure: (?P<name>[a-z0-9-]+) -->(?P<text>.*?)<!-- \. -->", re.DOTALL)


class Figure(NamedTuple):
    """One figure of the docs."""

    file: str
    key: str
    digits: int = 0
    scale: float = 1.0
    """What the docs' unit is in the file's."""


REPLAY, LIMIT, COPY, ABLATION = (
    "replay-h200.json",
    "memory-limit-1b-h200.json",
    "metadata-copy-h200.json",
    "ablation-h200.json",
)
TTFT, START, VLLM = "ttft-h200.json", "warm-start-8b-h200.json", "vllm-h200.json"
_EACH, _PREPARED = "rows[pairs=7;way=torch copy_ each]", "rows[pairs=7;way=MetadataCopy]"

FIGURES: dict[str, Figure] = {
    "host-1": Figure(REPLAY, "rows[batch=1].host.p50_us"),
    "host-32": Figure(REPLAY, "rows[batch=32].host.p50_us"),
    "step-1b": Figure(LIMIT, "rows[what=hybrid;batch=1].step_us"),
    "step-1b-8": Figure(LIMIT, "rows[what=hybrid;batch=8].step_us"),
    "step-1b-plain": Figure(LIMIT, "rows[what=hybrid, not fused;batch=1].step_us"),
    "step-1b-plain-8": Figure(LIMIT, "rows[what=hybrid, not fused;batch=8].step_us"),
    "step-1b-hf": Figure(LIMIT, "rows[what=huggingface, dynamic].step_us"),
    "step-1b-hf-static": Figure(LIMIT, "rows[what=huggingface, static].step_us"),
    "copies-launch": Figure(COPY, f"{_EACH}.launch_us", 1),
    "copies-graph": Figure(COPY, f"{_EACH}.graph_us", 1),
    "copy-launch": Figure(COPY, f"{_PREPARED}.launch_us", 1),
    "copy-graph": Figure(COPY, f"{_PREPARED}.graph_us", 1),
    "ablation-all": Figure(ABLATION, "rows[variant=all].decode_1_us"),
    "ablation-one-block": Figure(ABLATION, "rows[variant=double_buffer=False].decode_1_us"),
    "ablation-no-run-ahead": Figure(ABLATION, "rows[variant=run_ahead=0].decode_1_us"),
    "start-hf": Figure(START, "rows[case=hf].median_s", 1),
    "start-eager": Figure(START, "rows[case=eager].median_s", 1),
    "start-cold": Figure(START, "rows[case=cold].median_s", 1),
    "start-warm": Figure(START, "rows[case=warm].median_s", 1),
    "start-import": Figure(START, "rows[case=warm].last.startup.import", 1),
    **{
        f"ttft-{prompt}": Figure(TTFT, f"rows[mode=hybrid;prompt={prompt}].ttft_p50_ms", 1)
        for prompt in (10, 50, 100, 200, 400, 500)
    },
    **{
        f"vllm-ttft-{prompt}": Figure(VLLM, f"rows[what=ttft;prompt={prompt}].ms", 1)
        for prompt in (10, 50, 100, 200, 400, 500)
    },
    "vllm-mix-qwen": Figure(VLLM, "rows[what=mix;model=qwen3-0.6b;temperature=0].tokens_per_s"),
    "vllm-mix-1b": Figure(VLLM, "rows[what=mix;model=llama-3.2-1b;temperature=0;when=2026-11-20].tokens_per_s"),
}

NOTES: dict[str, tuple[str, str]] = {
    "ablation-state": (ABLATION, "decode of small batches was fused"),
}
"""Sentences that say of which state of the library a file is."""


def text_of(name: str, results: Path = RESULTS) -> str:
    """What stands in the docs for a figure.

    Raises:
        SystemExit: there is none of this name.
        KeyError: its file has nothing at its key.
    """
    if name in NOTES:
        file, change = NOTES[name]
        found = result(file, results)
        later = any(row["variant"] == "fused_decode=False" for row in found["rows"])
        return f"measured {'after' if later else 'before'} {change}, commit {found['provenance']['commit']}"
    if name not in FIGURES:
        raise SystemExit(f"unknown figure {name!r}; there are: {', '.join((*FIGURES, *NOTES))}")
    file, key, digits, scale = FIGURES[name]
    return f"{figure(file, key, results) * scale:,.{digits}f}"


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A page with its figures as the files have them."""
    return _MARKED.sub(
        lambda match: f"<!-- figure: {match['name']} -->{text_of(match['name'], results)}<!-- . -->", text
    )


def without_figures(text: str) -> str:
    """A page with its figures cut out."""
    return _MARKED.sub("", text)


def main() -> int:
    return rewrite_pages(__doc__, DOCS, rewritten)


if __name__ == "__main__":
    sys.exit(main())
