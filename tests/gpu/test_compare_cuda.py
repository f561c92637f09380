"""A comparison on a GPU: what a CPU run has no figures for."""

from __future__ import annotations

import time

import families
import pytest
import torch

import hybridgen
from hybridgen.comparison.measuring.utilisation import cuda_probe, device_shares
from hybridgen.comparison.results import Comparison

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def found() -> Comparison:
    model = families.build("llama").to("cuda")
    return hybridgen.compare(
        model, baselines=("hf-dynamic", "hf-static"), prompt_lengths=(10, 60), batch_sizes=(1, 4), new_tokens=6,
        budget=20, repeats=10, progress=False,
    )  # fmt: skip


def test_every_cell_has_the_gpu_s_figures(found: Comparison) -> None:
    assert {cell.status for cell in found.cells} == {"ok"}, found.notes
    for cell in found.cells:
        assert cell.agreement is not None
        assert cell.agreement.share == 1.0, cell.subject
        assert 0 < (cell.gpu_utilisation or 0) <= 1, cell.subject
        assert (cell.cpu_utilisation or 0) > 0
        assert (cell.memory or 0) > 0
        assert 0 < (cell.mbu or 0) < 1
    assert found.provenance["driver"]
    assert found.provenance["gpu_state_at_end"]["clocks.sm"]


def test_graphs_run_every_step_of_hybrid(found: Comparison) -> None:
    for length in (10, 60):
        graphs = found.cell("hybrid", length, 1).graphs
        assert graphs is not None
        assert graphs["none"] == 0, graphs["reasons"]


def test_the_read_ceiling_is_a_memory_s(found: Comparison) -> None:
    assert found.read_ceiling is not None
    assert 1e11 < found.read_ceiling < 2e13


def test_the_device_s_share_is_that_of_work_of_a_known_length() -> None:
    """Kernels that take half of each call, then the host sleeps as long: 50 %, not more and not less."""
    device = torch.device("cuda", torch.cuda.current_device())
    probe = cuda_probe(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10_000_000)
    start.record()
    torch.cuda._sleep(100_000_000)
    end.record()
    end.synchronize()
    seconds = start.elapsed_time(end) / 1e3

    def half() -> None:
        torch.cuda._sleep(50_000_000)
        torch.cuda._sleep(50_000_000)
        probe.wait()
        time.sleep(seconds)

    def whole() -> None:
        torch.cuda._sleep(100_000_000)

    found: dict[str, float] = {}
    assert device_shares({"half": half, "whole": whole}, probe, found) == []
    assert found["half"] == pytest.approx(0.5, abs=0.1)
    assert found["whole"] > 0.9
