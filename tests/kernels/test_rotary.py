"""Heads normalised, rotated and written in one op."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import Interpreter
from rotary_cases import CASES, Case, inputs
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hybridgen.kernels.attention.ops import write_kv
from hybridgen.kernels.attention.rotary import rotate_and_write


def _by_transformers(q, k, v, cos, sin, norms, places):
    def normed(x, weight, eps):
        if weight is None:
            return x
        module = LlamaRMSNorm(x.shape[-1], eps)
        module.weight.data = weight + norms.shift
        return module(x)

    q, k = normed(q, norms.q_weight, norms.q_eps), normed(k, norms.k_weight, norms.k_eps)
    if norms.half:
        cos, sin = (torch.cat((table, table), -1) for table in (cos, sin))
    width = cos.shape[-1]
    heads = [part[..., :width].transpose(0, 1)[None] for part in (q, k)]
    turned = apply_rotary_pos_emb(*heads, cos[None], sin[None])
    q, k = (torch.cat((new[0].transpose(0, 1), old[..., width:]), -1) for new, old in zip(turned, (q, k), strict=True))
    write_kv(k, v, places)
    return q


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_transformers_computes(case: Case) -> None:
    found, expected = inputs(case, torch.float32), inputs(case, torch.float32)
    out = rotate_and_write(*found)
    torch.testing.assert_close(out, _by_transformers(*expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[-1].k_pages, expected[-1].k_pages, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[-1].v_pages, expected[-1].v_pages)
    assert out.is_contiguous()


def test_pages_of_8_bits() -> None:
    case = CASES[0]
    *found, norms, places = inputs(case, torch.float32, torch.float8_e4m3fn)
    *same, _, wanted = inputs(case, torch.float32)
    rotate_and_write(*found, norms, places)
    rotate_and_write(*same, norms, wanted)
    for pages, kept in ((wanted.k_pages, places.k_pages), (wanted.v_pages, places.v_pages)):
        assert torch.equal(pages.to(torch.float8_e4m3fn).float(), kept.float())


@pytest.mark.parametrize("number", [1, 4])
def test_the_op_is_one_to_a_compiler(number: int) -> None:
    *tensors, norms, places = inputs(CASES[number], torch.float32)
    torch.library.opcheck(torch.ops.hybridgen.rotate_and_write.default, (*tensors, *norms, *places))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_triton_kernel(number: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("rotary_interpreter.py"), "check_case", number)
