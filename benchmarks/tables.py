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
from collections.abc import Callable
from pathlib import Path

import call_tables
import speculation_tables
import step_tables
from lookup import rewrite_pages
from table_cells import Result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
NOT_MEASURED = "not measured yet"
_MARKED = re.compile(r"<!-- table: (?P<name>[a-z0-9-]+) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)

TABLES: dict[str, Callable[[list[Result]], list[str]]] = {
    "decode-modes": step_tables.decode_modes,
    "workflows": call_tables.workflows,
    "memory-limit": step_tables.memory_limit,
    "replay": step_tables.replay,
    "unseen": step_tables.unseen,
    "ablation": step_tables.ablation,
    "preparation": step_tables.preparation,
    "trees": step_tables.trees,
    "metadata-copy": step_tables.metadata_copy,
    "ttft": call_tables.ttft,
    "throughput": call_tables.throughput,
    "prefill": call_tables.prefill,
    "prefill-ops": call_tables.prefill_ops,
    "prefill-calls": call_tables.prefill_calls,
    "prefix-cache": call_tables.prefix_cache,
    "ceilings": step_tables.ceilings,
    "warm-start": call_tables.warm_start,
    "speculation-text": speculation_tables.speculation_text,
    "speculation-search": speculation_tables.speculation_search,
    "demo-model": call_tables.demo_model,
    "speculation-machinery": speculation_tables.speculation_machinery,
    "speculation-rows": speculation_tables.speculation_machinery,
    "speculation-head": speculation_tables.speculation_head,
    "memory-fp8": step_tables.memory_limit,
    "memory-bf16": step_tables.memory_limit,
    "memory-int4": step_tables.memory_limit,
    "utilisation": step_tables.memory_limit,
    "experts": step_tables.experts,
    "structured": call_tables.structured,
    "latent": step_tables.latent,
    "model-shapes": step_tables.model_shapes,
    "model-shapes-modes": step_tables.model_shapes,
    "rows": step_tables.rows,
}


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
