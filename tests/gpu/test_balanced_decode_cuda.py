"""Steps that attend by a schedule in whole engines on a GPU: the tokens of steps that do not."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

import hybridgen

pytestmark = pytest.mark.gpu

ROWS = 74
SETTINGS = {
    "device": "cuda",
    "max_batch": 80,
    "page_size": 16,
    "token_budget": 2048,
    "kv_memory": "64MiB",
    "max_context": 352,
    "decode_buckets": [8, 64, 80],
    "prefill_buckets": [],
}
CASES = [
    ("llama", {"mode": "eager"}),
    ("llama", {"mode": "hybrid"}),
    ("llama", {"mode": "hybrid", "graphs": "trees"}),
    ("gemma2", {"mode": "jit"}),
    ("gemma2", {"mode": "graph"}),
    ("gemma2", {"mode": "hybrid"}),
    ("gpt_oss", {"mode": "jit"}),
]


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def _requests() -> tuple[list[list[int]], list[hybridgen.SamplingParams]]:
    """Prompts of many lengths, some of which begin alike, and outputs so that rows end one after another."""
    lengths = tuple(torch.randint(1, 250, (ROWS - 14,), generator=torch.Generator().manual_seed(3)).tolist())
    prompts = families.prompts_of(lengths)
    shared = families.prompts_of((100,), seed=5)[0]
    prompts += [shared + end for end in families.prompts_of(tuple(range(1, 15)), seed=6)]
    params = [hybridgen.SamplingParams(temperature=0.0, max_new_tokens=12 + i % 19) for i in range(ROWS)]
    return prompts, params


@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
def test_steps_of_many_rows_give_the_tokens_of_few(
    name: str, how: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridgen.kernels.attention import balanced

    rows: set[int] = set()
    attend = balanced.decode_attention
    monkeypatch.setattr(balanced, "decode_attention", lambda q, *rest: rows.add(len(q)) or attend(q, *rest))
    path = families.write(name, tmp_path)
    prompts, params = _requests()
    few = SETTINGS | {"max_batch": 8, "decode_buckets": None, "prefill_buckets": None}
    with hybridgen.Engine.load(path, mode="eager", **few) as engine:
        expected = [out.token_ids for out in engine.generate(prompts, params)]
    assert not rows
    with hybridgen.Engine.load(path, **SETTINGS, **how) as engine:
        for _ in range(2):  # graphs that were missing are recorded at the end of the first call
            outs = engine.generate(prompts, params)
            assert [out.token_ids for out in outs] == expected
        assert engine.stats().late_compiles == 0
        assert not engine.stats().fallbacks
    assert max(rows) >= ROWS
