"""Calls of coroutines: the results of `generate()`, in one batch, and requests that end with their task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest

import hybridgen
from hybridgen import Engine

SETTINGS: dict[str, Any] = {
    "max_batch": 8,
    "page_size": 16,
    "token_budget": 96,
    "kv_memory": "16MiB",
    "device": "cpu",
    "progress": False,
}
PROMPTS = families.prompts_of((5, 40, 1, 17))
FIELDS: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(params=[{"mode": "eager"}, {"mode": "graph", "run_ahead": 1}], ids=lambda fields: fields["mode"])
def engine(request: pytest.FixtureRequest, llama_path: Path) -> Iterator[Engine]:
    with Engine.load(llama_path, **request.param, **SETTINGS) as engine:
        yield engine
        if not engine.closed:
            stats = engine.stats()
            assert (stats.free_pages, stats.running, stats.waiting) == (stats.pages, 0, 0)


def no_thread() -> bool:
    return not any(thread.name == "hybridgen-async" for thread in threading.enumerate())


async def settled(engine: Engine) -> None:
    """Wait until the engine has nothing to do and its thread has ended."""
    for _ in range(500):
        stats = engine.stats()
        if not stats.running and not stats.waiting and no_thread():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("requests are left")


def test_results_are_those_of_generate(engine: Engine) -> None:
    expected = engine.generate(PROMPTS, **FIELDS)

    async def run() -> tuple[Any, ...]:
        calls = [engine.agenerate(prompt, **FIELDS) for prompt in PROMPTS * 3]
        found = await asyncio.gather(*calls, engine.agenerate(PROMPTS, **FIELDS))
        await settled(engine)
        return tuple(found)

    *single, listed = asyncio.run(run())
    assert [out.token_ids for out in single] == [out.token_ids for out in expected] * 3
    assert [out.token_ids for out in listed] == [out.token_ids for out in expected]
    assert asyncio.run(engine.agenerate(PROMPTS[0], **FIELDS)).token_ids == expected[0].token_ids  # another event loop


def test_many_share_a_batch(engine: Engine) -> None:
    async def run() -> None:
        await asyncio.gather(*(engine.agenerate(PROMPTS[0], max_new_tokens=60, ignore_eos=True) for _ in range(8)))
        await settled(engine)

    asyncio.run(run())
    decode = sum(count for (phase, *_), count in engine.stats().steps.items() if phase == "decode")
    assert decode < 8 * 59


def test_a_stream_brings_each_token(engine: Engine) -> None:
    expected = list(engine.stream(PROMPTS[:2], **FIELDS))

    async def run() -> list[Any]:
        return [event async for event in engine.astream(PROMPTS[:2], **FIELDS)]

    events = asyncio.run(run())
    for index in range(2):
        ours, theirs = ([event.token_id for event in some if event.index == index] for some in (events, expected))
        assert ours == theirs
    assert sum(event.completion is not None for event in events) == 2


def test_a_cancelled_task_and_a_closed_stream_end_their_requests(engine: Engine) -> None:
    async def run() -> None:
        long = {"max_new_tokens": 400, "ignore_eos": True}
        other = asyncio.create_task(engine.agenerate(PROMPTS[1], **FIELDS))
        task = asyncio.create_task(engine.agenerate(PROMPTS[0], **long))
        at_once = asyncio.create_task(engine.agenerate(PROMPTS[2], **long))
        await asyncio.sleep(0)
        at_once.cancel()  # while it is being submitted
        stream = engine.astream(PROMPTS[3], **long)
        async for _ in stream:
            break
        await stream.aclose()
        task.cancel()
        for each in (task, at_once):
            with pytest.raises(asyncio.CancelledError):
                await each
        assert len((await other).token_ids) == 12
        await settled(engine)

    asyncio.run(run())
    assert engine.stats().requests["cancelled"] == 3


def test_errors_reach_their_caller(engine: Engine) -> None:
    def fails(ids: Any, logits: Any) -> Any:
        raise RuntimeError("out of luck")

    async def run() -> None:
        with pytest.raises(hybridgen.PromptError, match="outside the vocabulary"):
            await engine.agenerate([10**6])
        with pytest.raises(hybridgen.ConfigError, match="unknown keyword"):
            await engine.agenerate(PROMPTS[0], modus=1)
        with pytest.raises(hybridgen.RequestError, match="out of luck"):
            await engine.agenerate(PROMPTS[0], logits_processors=[fails])
        good, bad = await engine.agenerate([PROMPTS[0], [10**6]], errors="return", **FIELDS)
        assert len(good.token_ids) == 12
        assert isinstance(bad.error, hybridgen.PromptError)
        events = [event async for event in engine.astream([PROMPTS[0], [10**6]], errors="return", **FIELDS)]
        assert sum(event.completion is not None for event in events) == 2
        await settled(engine)

    asyncio.run(run())


def test_a_closed_engine_ends_them(engine: Engine) -> None:
    async def run() -> None:
        task = asyncio.create_task(engine.agenerate(PROMPTS[0], max_new_tokens=450, ignore_eos=True))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)
        with pytest.raises(hybridgen.EngineError, match="closed"):
            await task
        with pytest.raises(hybridgen.EngineError, match="closed"):
            await engine.agenerate(PROMPTS[0])

    asyncio.run(run())


def test_threads_and_coroutines_run_side_by_side(engine: Engine) -> None:
    expected = [out.token_ids for out in engine.generate(PROMPTS, **FIELDS)]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(engine.generate(PROMPTS, **FIELDS)))

    async def run() -> list[Any]:
        thread.start()
        return list(await asyncio.gather(*(engine.agenerate(prompt, **FIELDS) for prompt in PROMPTS)))

    outs = asyncio.run(run())
    thread.join()
    assert [out.token_ids for out in outs] == [out.token_ids for out in found] == expected
