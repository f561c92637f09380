"""Research workflows on a GPU: functions of requests, hidden states, training loops, in every mode."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import hybridgen
from hybridgen import Engine, SamplingParams

pytestmark = pytest.mark.gpu
SETTINGS: dict[str, Any] = {"max_batch": 4, "max_context": 128, "kv_memory": "64MiB", "progress": False}
MODES = ("eager", "jit", "graph", "hybrid")
PROMPTS = families.prompts_of((40, 9, 60, 17))


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def shift(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Favours ids by the sum of those so far; waits for nothing on the device."""
    return logits.index_add(0, (ids.sum() % len(logits))[None], torch.full((1,), 30.0, device=logits.device))


def test_processors_run_on_the_device_and_disturb_nobody(mode: str, llama_path: Path) -> None:
    with Engine.load(llama_path, mode="eager", device="cpu", **SETTINGS) as engine:
        expected = engine.generate(PROMPTS[0], max_new_tokens=12, logits_processors=[shift]).token_ids
    with Engine.load(llama_path, mode=mode, **SETTINGS) as engine:
        alone = engine.generate(PROMPTS[1], max_new_tokens=12).token_ids
        params = [SamplingParams(max_new_tokens=12, logits_processors=own) for own in ([shift], ())]
        for _ in range(2):
            own, other = engine.generate(PROMPTS[:2], params)
            assert own.token_ids == expected
            assert other.token_ids == alone
        assert {step.kind for step in own.steps if "graph" in step.kind} or mode in ("eager", "jit")
        assert not engine.stats().fallbacks


def test_hidden_states(mode: str, llama_path: Path) -> None:
    model = families.build("llama", num_hidden_layers=2).cuda()  # the checkpoint's
    with Engine.load(llama_path, mode=mode, **SETTINGS) as engine:
        for prompt, states in zip(PROMPTS, engine.hidden_states(PROMPTS, (0, 2, -1)), strict=True):
            with torch.inference_mode():
                out = model(input_ids=torch.tensor([prompt], device="cuda"), output_hidden_states=True)
            expected = torch.stack([out.hidden_states[i][0] for i in (0, 2, -1)]).cpu()
            assert torch.allclose(states, expected, atol=1e-3, rtol=1e-3)
        assert engine.stats().late_compiles == 0


def test_the_cache_s_memory_comes_and_goes(mode: str, llama_path: Path) -> None:
    with Engine.load(llama_path, mode=mode, **SETTINGS) as engine:
        expected = engine.generate(PROMPTS, max_new_tokens=8)
        size = engine.stats().cache_bytes
        for ballast in (0, 2**20, 0):
            before = torch.cuda.memory_allocated()
            engine.release_cache()
            assert before - torch.cuda.memory_allocated() >= 0.9 * size
            kept = torch.empty(ballast, device="cuda")  # so that the memory lies elsewhere afterwards
            engine.resume()
            outs = engine.generate(PROMPTS, max_new_tokens=8)
            assert [out.token_ids for out in outs] == [out.token_ids for out in expected]
            del kept


def test_an_attached_module_trains_on(mode: str) -> None:
    model = families.build("llama").cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.tensor([PROMPTS[2]], device="cuda")
    fields: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with hybridgen.attach(model, mode=mode, **SETTINGS) as attached:
        for _ in range(3):
            found = model.generate(batch, **fields)
            assert torch.equal(found, attached._originals["generate"](batch, **fields))
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.training
        assert not attached.engine.stats().fallbacks


def test_coroutines(mode: str, llama_path: Path) -> None:
    with Engine.load(llama_path, mode=mode, **SETTINGS) as engine:
        expected = engine.generate(PROMPTS, max_new_tokens=12)

        async def run() -> list[Any]:
            return list(await asyncio.gather(*(engine.agenerate(prompt, max_new_tokens=12) for prompt in PROMPTS)))

        assert [out.token_ids for out in asyncio.run(run())] == [out.token_ids for out in expected]
