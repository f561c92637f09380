"""What prefill runs between products, on a GPU: the op for heads beside its reference, and whole engines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import families
from rotary_cases import CASES, Case, inputs

from hybridgen import Engine
from hybridgen.kernels.attention.rotary import rotate_and_write, rotate_and_write_on_cpu
from hybridgen.models.rotating import RotatingAttention

pytestmark = pytest.mark.gpu

LARGE = [
    Case(32, 8, 128, 128, 128, 64, (512, 1, 300)),
    Case(32, 8, 64, 64, 64, 64, (512, 1, 300)),
    Case(16, 8, 128, 128, 128, 64, (512, 1, 300), "qk"),
    Case(8, 4, 256, 256, 256, 64, (130, 7), "qk", 1.0),
]
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("kept", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", list(_TOLERANCE))
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_it_matches_its_reference(case: Case, dtype: torch.dtype, kept: torch.dtype | None) -> None:
    *found, norms, places = inputs(case, dtype, kept, "cuda")
    *expected, same_norms, wanted = inputs(case, dtype, kept, "cpu")
    for part in (*found, places.k_pages, places.v_pages):
        assert part.is_cuda
    out = rotate_and_write(*found, norms, places)
    reference = rotate_and_write_on_cpu(*expected, *same_norms, *wanted)
    tolerance = _TOLERANCE[dtype]
    torch.testing.assert_close(out.cpu(), reference, rtol=tolerance, atol=tolerance)
    # A key that lies between two numbers of a page can become either.
    coarse = tolerance if kept is None else 0.13
    torch.testing.assert_close(places.k_pages.cpu().float(), wanted.k_pages.float(), rtol=coarse, atol=tolerance)
    assert torch.equal(places.v_pages.cpu().float(), wanted.v_pages.float())


def test_it_replays_in_a_graph_with_other_places() -> None:
    case = LARGE[2]
    q, k, v, cos, sin, norms, places = inputs(case, torch.bfloat16, None, "cuda")
    rotate_and_write(q, k, v, cos, sin, norms, places)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rotate_and_write(q, k, v, cos, sin, norms, places)
    *others, _, moved = inputs(case, torch.bfloat16, None, "cuda", seed=1)
    with torch.no_grad():
        for ours, theirs in zip((q, k, v, cos, sin, *places[2:]), (*others, *moved[2:]), strict=True):
            ours.copy_(theirs)
    places.k_pages.fill_(-7)
    graph.replay()
    expected = rotate_and_write(*others, norms, moved)
    assert torch.equal(out, expected)
    assert torch.equal(places.k_pages, moved.k_pages)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "smollm3"])
@pytest.mark.parametrize("mode", ["jit", "hybrid"])
def test_engines_generate_what_hugging_face_does(name: str, mode: str) -> None:
    model = families.build(name)
    prompts = families.prompts_of((40, 7, 23))
    expected = [families.reference(model, prompt, 12)[0] for prompt in prompts]
    model.cuda()
    options = {"max_batch": 4, "max_context": 96, "page_size": 16, "kv_memory": "16MiB", "progress": False}
    with Engine.load(model, mode=mode, compile_cache=False, **options) as engine:
        assert any(isinstance(module, RotatingAttention) for module in engine._runner.bound.model.modules())
        outs = engine.generate(prompts, max_new_tokens=12, temperature=0)
        assert [list(out.token_ids) for out in outs] == [list(ids) for ids in expected]
        assert engine.stats().late_compiles == 0
