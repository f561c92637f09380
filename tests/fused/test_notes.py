"""What `stats().fused` says: each size by who runs it, and why nobody does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from hybridgen.fused.decode import FusedDecode

ONE, SEVERAL, CHAIN = "one persistent kernel", "one persistent kernel for several rows", "a chain of Triton kernels"
QUANTISED = "a weight is int4; dense ones are fused"


def fused(rows: tuple[int, int] | None, chain: tuple[int, int] | None, persistent: bool = True) -> FusedDecode:
    """With executors that serve so many rows, at least and at most."""

    def executor(name: str, sizes: tuple[int, int] | None) -> Any:
        return None if sizes is None else SimpleNamespace(name=name, least=sizes[0], most=sizes[1])

    made: Any = FusedDecode(SimpleNamespace())
    made.persistent = SimpleNamespace(name="persistent") if persistent else None
    made.rows, made.chain = executor("rows", rows), executor("chain", chain)
    return made


@pytest.mark.parametrize(
    ("rows", "chain", "notes"),
    [
        ((2, 8), None, {"decode of 2 to 8 rows": SEVERAL}),
        ((2, 8), (2, 8), {"decode of 2 to 8 rows": SEVERAL, "the chain": "not used: the kernel for several rows"}),
        ((2, 8), (2, 16), {"decode of 2 to 8 rows": SEVERAL, "decode of 9 to 16 rows": CHAIN}),
        ((2, 16), (2, 16), {"decode of 2 to 16 rows": SEVERAL, "the chain": "not used"}),
        (
            (4, 8),
            (2, 9),
            {"decode of 2 to 3 rows": CHAIN, "decode of 4 to 8 rows": SEVERAL, "decode of 9 rows": CHAIN},
        ),
        ((2, 1), (2, 16), {"decode of a few rows": "not the kernel", "decode of 2 to 16 rows": CHAIN}),
        (None, (2, 4), {"decode of 2 to 4 rows": CHAIN}),
    ],
)
def test_each_size_is_told_by_who_runs_it(
    rows: tuple[int, int] | None, chain: tuple[int, int] | None, notes: dict[str, str]
) -> None:
    found = fused(rows, chain).notes
    assert found.pop("decode of 1 row") == ONE
    assert found.keys() == notes.keys()
    for size, how in notes.items():
        assert found[size].startswith(how)


def test_why_no_more_sizes() -> None:
    model = fused((2, 8), (2, 16))
    model.use_rows(3, 8, "2 rows take it 1.10 ms, and the chain 1.00 ms")
    model.use_chain_up_to(12, "16 rows take it 2.00 ms, and the layers 1.90 ms")
    assert model.notes == {
        "decode of 1 row": ONE,
        "decode of 3 to 8 rows": f"{SEVERAL}; 2 rows take it 1.10 ms, and the chain 1.00 ms",
        "decode of 2 rows": CHAIN,
        "decode of 9 to 12 rows": f"{CHAIN}; 16 rows take it 2.00 ms, and the layers 1.90 ms",
    }
    model.use_chain_up_to(1, "2 rows take it 2.00 ms, and the layers 1.90 ms")
    assert (
        model.notes["decode of more rows"] == "the model's own layers; 2 rows take it 2.00 ms, and the layers 1.90 ms"
    )


def test_why_there_is_none() -> None:
    """What serves in its place is not hidden by a reason."""
    model = fused((1, 8), None, persistent=False)
    model.refusals = {"persistent": QUANTISED, "chain": QUANTISED}
    assert model.notes == {
        "decode of 1 row": f"no persistent kernel: {QUANTISED}",
        "decode of 1 to 8 rows": SEVERAL,
        "the chain": f"none: {QUANTISED}",
    }
    model = fused(None, (1, 1), persistent=False)
    model.refusals = {"persistent": "float32", "rows": "float32"}
    assert model.notes == {
        "decode of 1 row": f"{CHAIN}; no persistent kernel: float32",
        "decode of a few rows": "no persistent kernel for several rows: float32",
    }
    model.nothing = "its layers cache latents"
    assert model.notes == {"fused decode": "none: its layers cache latents"}
