"""Recorded steps on a GPU: right tokens through growth, eviction and failure, and no waiting."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import families
import pytest
import torch

import hybridgen
from hybridgen.engine.requests import Request
from hybridgen.graphs.cuda import CudaGraphRecorder
from hybridgen.graphs.key import GraphKey
from hybridgen.sampling import SamplerPlan

pytestmark = pytest.mark.gpu

LENGTHS = (7, 300, 1, 33, 64, 65, 130, 2)
SETTINGS = {"max_batch": 17, "page_size": 16, "token_budget": 96, "kv_memory": "64MiB", "max_context": 352}
GREEDY = SamplerPlan()


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("graphs"))


def load(path: Path, **fields: object) -> hybridgen.Engine:
    return hybridgen.Engine.load(path, device="cuda", **(SETTINGS | fields))


def poison(engine: hybridgen.Engine) -> None:
    """Everything that only padding may read: NaN in the dummy page, ids and lengths out of range in its slot."""
    runner = engine._runner
    with torch.inference_mode():
        for state in runner.states:
            for pages in state.pages:
                pages[0] = float("nan")
        runner.state.table[:, -1] = 2**40


def arrivals(seed: int, count: int) -> list[tuple[int, list[int], hybridgen.SamplingParams]]:
    """(step, prompt, sampling) of requests that keep a batch of up to 17 growing and shrinking."""
    source = random.Random(seed)
    step, found = 0, []
    for i in range(count):
        step += source.randrange(0, 9)
        prompt = [source.randrange(3, families.VOCAB) for _ in range(source.choice((1, 5, 17, 40, 96, 130)))]
        kind = source.randrange(5)
        params = {"max_new_tokens": source.randrange(1, 60), "seed": i, "ignore_eos": True}
        if kind >= 2:
            params |= {"temperature": 0.9}
        if kind == 3:
            params |= {"top_p": 0.9, "top_k": 40}
        if kind == 4:
            params |= {"repetition_penalty": 1.2, "logprobs": 2}
        found.append((step, prompt, hybridgen.SamplingParams(**params)))
    return found


def run(
    engine: hybridgen.Engine, requests: list[tuple[int, list[int], hybridgen.SamplingParams]], between: Callable
) -> tuple[list[tuple[int, ...]], int]:
    """Tokens of each request, and the number of steps."""
    loop = engine.open_loop()
    submitted: list[Request] = []
    waiting = list(requests)
    step = 0
    while waiting or any(request.completion is None for request in submitted):
        while waiting and waiting[0][0] <= step:
            _, prompt, params = waiting.pop(0)
            new = engine.make_requests([prompt], params, {})
            loop.submit(new)
            submitted += new
        loop.step()
        between(step)
        step += 1
        if not loop.scheduler.busy:
            engine.idle()
    assert [str(request.completion.error) for request in submitted if request.completion.error] == []
    return [request.completion.token_ids for request in submitted], step


@pytest.mark.parametrize("mode", ["graph", "hybrid"])
def test_two_thousand_random_steps_with_eviction_and_poison(path: Path, mode: str) -> None:
    requests = arrivals(7, 560)
    with load(path, mode="eager") as engine:
        expected, _ = run(engine, requests, lambda step: None)
    with load(path, mode=mode, max_graphs=6, capture_after=2, max_padding_ratio=2.0) as engine:

        def between(step: int) -> None:
            if step % 7 == 0:
                poison(engine)
            if step % 40 == 0:  # a capture between steps is not what the engine does, but it must do no harm
                engine._runner.capture_pending()

        found, steps = run(engine, requests, between)
        stats = engine.stats()
    assert found == expected
    assert steps >= 2000
    assert stats.graphs.evictions > 5
    assert stats.graphs.hits > 1000
    assert stats.graphs.padded_hits > 100
    assert not stats.fallbacks
    assert stats.free_pages == stats.pages


@pytest.mark.parametrize("order", list(itertools.permutations((1, 2, 4, 8)))[::5])
def test_survivors_of_evictions_replay(path: Path, order: tuple[int, ...]) -> None:
    prompts = families.prompts_of((9,) * 8)
    with load(path, mode="eager") as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=6)]
    settings = {"max_graphs": 2, "decode_buckets": [1, 2, 4, 8], "prefill_buckets": [], "capture_after": 1}
    with load(path, mode="graph", capture_at_start=False, validate=True, **settings) as engine:
        for size in order * 2:
            for _ in range(2):
                outs = engine.generate(prompts[:size], max_new_tokens=6)
                assert [out.token_ids for out in outs] == expected[:size]
            keys = {recording.key.tokens for recording in engine._runner.graphs.recordings}
            assert size in keys
            for survivor in keys:
                outs = engine.generate(prompts[:survivor], max_new_tokens=6)
                assert [out.token_ids for out in outs] == expected[:survivor]
        assert engine.stats().graphs.evictions >= 4
        assert not engine.stats().fallbacks


@pytest.mark.parametrize("mode", ["graph", "hybrid"])
def test_large_prefill_calls_replay(path: Path, mode: str) -> None:
    """Many prompts, chunks, shared prefixes, all samplers; padding longer than a context, and pages of padding NaN."""
    settings = {"token_budget": 2000, "max_batch": 32, "decode_buckets": [1, 32]}
    prompts = families.prompts_of((300,) * 9 + (3, 90, 200) + (61,) * 11)
    prompts += [[*prompts[0][:200], 7, 9, 11], [*prompts[3][:128], *prompts[4]][:300]]
    kinds = [{}, {"temperature": 0.9}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.2, "logprobs": 2}]
    params = [
        hybridgen.SamplingParams(max_new_tokens=4, seed=i, ignore_eos=True, **kinds[i % len(kinds)])
        for i in range(len(prompts))
    ]

    def tokens(engine: hybridgen.Engine, count: int) -> list[tuple[int, ...]]:
        outs = engine.generate(prompts[:count], params[:count])
        assert [str(out.error) for out in outs if out.error] == []
        return [out.token_ids for out in outs]

    counts = (25, 25, 7, 4, 3)
    with load(path, mode="eager", **settings) as engine:
        expected = [tokens(engine, count) for count in counts]
    with load(path, mode=mode, max_padding_ratio=64, prefix_cache=False, **settings) as engine:
        large = [row for row in engine.stats().graphs.graphs if row.tokens > 512]
        assert [(row.tokens, row.rows, row.sampling) for row in large] == [(2000, 32, "outside"), (1024, 32, "outside")]
        poison(engine)
        assert [tokens(engine, count) for count in counts] == expected
        stats = engine.stats()
        hits = {row.tokens: row.hits for row in stats.graphs.graphs if row.phase == "prefill" and row.hits}
        assert hits[2000] >= 3
        assert hits[1024] >= 1
        assert "prefill" in stats.graphs.phases
        assert stats.graphs.phases["prefill"].misses == 0
        assert not stats.fallbacks
    with load(path, mode=mode, validate=True, max_padding_ratio=64, **settings) as engine:  # later calls are cached
        assert [tokens(engine, count) for count in counts] == expected
        assert not engine.stats().fallbacks


def fault(kind: str) -> Callable[[], None]:
    device = torch.device("cuda")
    if kind == "exception":

        def fail() -> None:
            raise ValueError("injected")
    elif kind == "wait":

        def fail() -> None:
            torch.ones(3, device=device).sum().item()
    else:

        def fail() -> None:
            torch.empty(2**45, device=device)

    return fail


@pytest.mark.parametrize("kind", ["exception", "wait", "memory"])
def test_a_failed_capture_leaves_the_others_and_torch_usable(path: Path, kind: str) -> None:
    prompts = families.prompts_of((9,) * 8)
    with load(path, mode="eager") as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=12)]
    with load(path, mode="hybrid", decode_buckets=[1, 8], prefill_buckets=[64]) as engine:
        runner = engine._runner
        original, fail = runner.steps.run, fault(kind)

        def broken(key: GraphKey) -> None:
            original(key)
            if torch.cuda.is_current_stream_capturing():
                fail()

        runner.steps.run = broken
        key = GraphKey.decode(4, GREEDY)
        with pytest.warns(RuntimeWarning, match="capture of the decode graph of 4 rows failed"):
            runner.capture([key], lambda: None)
        runner.steps.run = original
        for size in (1, 4, 8):
            outs = engine.generate(prompts[:size], max_new_tokens=12)
            assert [out.token_ids for out in outs] == expected[:size]
        assert torch.isfinite(torch.randn(100, device="cuda")).all()
        torch.cuda.empty_cache()
        later = GraphKey.decode(2, GREEDY)
        runner.capture([later], lambda: None)
        assert later in {recording.key for recording in runner.graphs.recordings}
        outs = engine.generate(prompts[:2], max_new_tokens=12)
        assert [out.token_ids for out in outs] == expected[:2]
        stats = engine.stats()
        assert len(stats.graphs.failures) == 1
        assert sum(stats.fallbacks.values()) == 1


def test_what_another_thread_does_in_a_capture_does_no_harm(path: Path) -> None:
    """An allocation and a wait elsewhere would invalidate a capture whose errors are global."""
    prompts = families.prompts_of((9,) * 4)
    with load(path, mode="eager") as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=12)]
    with load(path, mode="graph", decode_buckets=[1], prefill_buckets=[]) as engine:
        runner, seen = engine._runner, []
        original = runner.steps.run

        def disturb() -> None:
            torch.cuda.set_device(0)
            block = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than is cached: the driver is asked
            block[:16].fill_(7)
            seen.append(int(block[3].item()))

        def disturbed(key: GraphKey) -> None:
            original(key)
            if torch.cuda.is_current_stream_capturing():
                thread = threading.Thread(target=disturb)
                thread.start()
                thread.join()

        runner.steps.run = disturbed
        key = GraphKey.decode(4, GREEDY)
        runner.capture([key], lambda: None)
        runner.steps.run = original
        assert seen == [7]
        assert key in {recording.key for recording in runner.graphs.recordings}
        outs = engine.generate(prompts, max_new_tokens=12)
        assert [out.token_ids for out in outs] == expected
        assert not engine.stats().fallbacks


def test_a_step_is_warm_before_it_is_captured(path: Path) -> None:
    """Two runs on the capturing stream, before the first that is timed; the caller's stream sees none of them."""
    with load(path, mode="graph", decode_buckets=[1], prefill_buckets=[]) as engine:
        runner, runs = engine._runner, []
        original = runner.steps.run

        def noted(key: GraphKey) -> None:
            runs.append((torch.cuda.is_current_stream_capturing(), torch.cuda.current_stream() == runner.stream))
            original(key)

        runner.steps.run = noted
        runner.capture([GraphKey.decode(3, GREEDY)], lambda: None)
        runner.steps.run = original
    assert runs.count((True, False)) == 1
    assert runs.index((True, False)) == len(runs) - 1
    assert set(runs[:-1]) == {(False, False)}
    assert len(runs) == 2 + 3 + 1  # warm-up, timing, capture


def test_manual_graphs_replay_after_trees_have_recorded(path: Path) -> None:
    prompts = families.prompts_of((9,) * 8)
    with load(path, mode="eager") as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=12)]
    settings = {"decode_buckets": [1, 2, 4, 8], "prefill_buckets": [32], "capture_after": 1}
    with load(path, mode="hybrid", graphs="both", **settings) as engine:
        owners = Counter(row.owner for row in engine.stats().graphs.graphs)
        assert owners == {"cuda graph": 10, "cudagraph tree": 1}
        for _ in range(2):
            for size in (5, 6, 7, 3):  # trees record what lies between the buckets
                outs = engine.generate(prompts[:size], max_new_tokens=12)
                assert [out.token_ids for out in outs] == expected[:size]
            for size in (1, 2, 4, 8):
                outs = engine.generate(prompts[:size], max_new_tokens=12)
                assert [out.token_ids for out in outs] == expected[:size]
        stats = engine.stats()
        hits: Counter[tuple[str, int]] = Counter()
        for row in stats.graphs.graphs:
            hits[row.owner, row.tokens] += row.hits if row.phase == "decode" else 0
        assert all(hits["cuda graph", size] > 0 for size in (1, 2, 4, 8))
        assert sum(hit for (owner, _), hit in hits.items() if owner == "cudagraph tree") > 0
        assert not stats.fallbacks
        assert stats.late_compiles == 0


def test_trees_alone(path: Path) -> None:
    prompts = families.prompts_of(LENGTHS)
    with load(path, mode="eager") as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=20)]
    with load(path, mode="hybrid", graphs="trees", prefill_buckets=[96]) as engine:
        for _ in range(3):
            outs = engine.generate(prompts, max_new_tokens=20)
            assert [out.token_ids for out in outs] == expected
        assert engine.stats().graphs.hits > 40
        assert not engine.stats().fallbacks


def test_validation_passes_bit_for_bit_and_finds_a_wrong_graph(path: Path) -> None:
    prompts = families.prompts_of(LENGTHS)
    with load(path, mode="eager") as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=20)]
    with load(path, mode="hybrid", validate=True, check_addresses=True) as engine:
        outs = engine.generate(prompts, max_new_tokens=20)
        assert [out.token_ids for out in outs] == expected
        assert not engine.stats().fallbacks
    with load(path, mode="hybrid", validate=True) as engine:
        by_key = {recording.key: recording for recording in engine._runner.graphs.recordings}
        two = by_key[GraphKey.decode(2, GREEDY)]
        eight = by_key[GraphKey.decode(8, GREEDY)]
        eight.recorded = two.recorded  # leaves six rows as they were
        engine._runner.graphs._changed()
        with pytest.warns(RuntimeWarning, match="gave other values"):
            outs = engine.generate(prompts, max_new_tokens=20)
        assert [out.token_ids for out in outs] == expected


def test_a_steady_decode_step_is_one_launch_and_waits_for_nothing(path: Path) -> None:
    """What the driver is asked for in steps whose batch stays the same: a graph launch and an event each."""
    with load(path, mode="hybrid") as engine:
        loop = engine.open_loop()
        requests = engine.make_requests(families.prompts_of((9, 12, 4)), None, {"max_new_tokens": 200})
        loop.submit(requests)
        for _ in range(10):
            loop.step()
        decode = engine._runner.decode

        def guarded(slots: tuple[int, ...]):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return decode(slots)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        engine._runner.decode = guarded
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(50):
                loop.step()
        calls = Counter(event.name for event in profile.events() if event.name.startswith(("cuda", "cu")))
        loop.cancel(requests)
    steps = {name: count / 50 for name, count in calls.items()}
    assert 0.9 <= steps.get("cudaGraphLaunch", 0) <= 1.1, steps
    copies = sum(count for name, count in steps.items() if "Memcpy" in name)
    waits = sum(count for name, count in steps.items() if "DeviceSynchronize" in name or "StreamSynchronize" in name)
    assert copies < 0.1, steps
    assert waits < 0.1, steps


def test_a_model_that_moves_is_noticed(path: Path) -> None:
    prompts = families.prompts_of((9, 9))
    with load(path, mode="hybrid", check_addresses=True) as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=6)]
        weight = engine._runner.bound.model.lm_head.weight
        weight.data = weight.data.clone()
        with pytest.warns(RuntimeWarning, match="moved since the capture: lm_head"):
            outs = engine.generate(prompts, max_new_tokens=6)
        assert [out.token_ids for out in outs] == expected


def test_experts_in_bfloat16_are_compiled_and_recorded(tmp_path: Path) -> None:
    path = families.write("qwen3_moe", tmp_path)
    prompts = families.prompts_of(LENGTHS)
    with load(path, mode="hybrid", dtype="bfloat16", token_budget=256) as engine:
        for _ in range(2):
            outs = engine.generate(prompts, max_new_tokens=20)
        stats = engine.stats()
        assert all(len(out.token_ids) == 20 for out in outs)
        assert stats.late_compiles == 0
        assert stats.graphs.hits > 20
        assert not stats.fallbacks


@pytest.mark.parametrize("mode", ["graph", "hybrid"])
def test_a_prefill_that_cannot_be_captured_runs_without(mode: str, tmp_path: Path) -> None:
    """Experts in float32 wait for the device inside a prefill; that must cost its graphs and nothing else."""
    path = families.write("qwen3_moe", tmp_path)
    prompts = families.prompts_of(LENGTHS)
    with load(path, mode="eager") as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=20)]
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="capture of the prefill graph"):
            engine = load(path, mode=mode)
        with engine:
            outs = engine.generate(prompts, max_new_tokens=20)
            assert [out.token_ids for out in outs] == expected
            stats = engine.stats()
            assert {row.phase for row in stats.graphs.graphs} == {"decode"}
            # Two sizes with two samplers, all alike: the others are not tried.
            assert sum(stats.fallbacks.values()) == 4
            assert all("capture of the prefill graph" in why for why in stats.fallbacks)
            assert torch.isfinite(torch.randn(9, device="cuda")).all()
            torch.cuda.empty_cache()


def test_the_last_graph_can_be_evicted_and_another_captured(path: Path) -> None:
    prompts = families.prompts_of((9,) * 4)
    with load(path, mode="eager") as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=6)]
    settings = {"max_graphs": 1, "capture_after": 1, "prefill_buckets": [], "capture_at_start": False}
    with load(path, mode="graph", **settings) as engine:
        for size in (1, 2, 4, 1, 2, 4):
            for _ in range(2):
                outs = engine.generate(prompts[:size], max_new_tokens=6)
                assert [out.token_ids for out in outs] == expected[:size]
        assert engine.stats().graphs.evictions >= 5
        assert not engine.stats().fallbacks


def free_memory() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def test_the_last_graph_gives_its_memory_back_to_the_device() -> None:
    """As the device counts it; the others keep theirs, and the next capture works."""
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.zeros((), device=device)
    size, slack = 256 * 2**20, 48 * 2**20  # a graph itself takes some of the driver's memory, and that stays

    def step() -> None:
        total.add_(torch.ones(size // 4, device=device)[-1])

    recorder = CudaGraphRecorder(device)
    recorder.record(GraphKey.decode(1, GREEDY), total.zero_, None).release()  # what is paid once
    torch.cuda.empty_cache()
    before = free_memory()
    for _ in range(3):
        total.zero_()
        first = recorder.record(GraphKey.decode(1, GREEDY), step, None)
        second = recorder.record(GraphKey.decode(2, GREEDY), step, None)
        assert before - free_memory() > size - slack
        first.release()
        assert before - free_memory() > size - slack  # the other's too
        total.zero_()
        second.replay()
        torch.cuda.synchronize()
        assert total.item() == 1
        second.release()
        assert before - free_memory() < slack
    recorder.close()


def test_a_step_that_fails_before_any_graph_leaves_no_pool() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = CudaGraphRecorder(device)
    size = 256 * 2**20

    def step() -> None:
        torch.ones(size // 4, device=device)
        raise ValueError("injected")

    recorder.record(GraphKey.decode(1, GREEDY), torch.zeros(1, device=device).zero_, None).release()
    torch.cuda.empty_cache()
    before = free_memory()
    with pytest.raises(ValueError, match="injected"):
        recorder.record(GraphKey.decode(1, GREEDY), step, None)
    assert before - free_memory() < size / 2
    recorder.close()


def test_an_engine_whose_graphs_are_all_dropped_has_their_memory_back(path: Path) -> None:
    prompts = families.prompts_of((9,) * 8)
    settings = {"decode_buckets": [1, 8], "prefill_buckets": [], "lazy_capture": False}
    with load(path, mode="graph", **settings) as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=6)]
        graphs = engine._runner.graphs
        keys = [recording.key for recording in graphs.recordings]
        held, before = torch.cuda.memory_reserved(), free_memory()
        with pytest.warns(RuntimeWarning, match="the model changed"):
            graphs.drop_all("the model changed")
        assert free_memory() > before
        assert torch.cuda.memory_reserved() < held
        engine._runner.capture(keys, lambda: None)
        assert len(graphs.recordings) == len(keys)
        assert [out.token_ids for out in engine.generate(prompts, max_new_tokens=6)] == expected
        assert engine.stats().graphs.hits > 0


@pytest.mark.parametrize("graphs", ["manual", "trees"])
def test_callers_on_other_streams_and_threads(path: Path, graphs: str) -> None:
    prompts = families.prompts_of((9,) * 4)
    with load(path, mode="eager") as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=12)]
    settings = {"graphs": graphs, "decode_buckets": [1, 4], "prefill_buckets": []}
    with load(path, mode="hybrid", **settings) as engine:
        for _ in range(3):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(10_000_000)
                outs = engine.generate(prompts, max_new_tokens=12)
                assert [out.token_ids for out in outs] == expected
            outs = engine.generate(prompts, max_new_tokens=12)
            assert [out.token_ids for out in outs] == expected
        found: list[tuple[int, ...]] = []
        other = threading.Thread(
            target=lambda: found.extend(out.token_ids for out in engine.generate(prompts, max_new_tokens=12))
        )
        context = (
            pytest.warns(RuntimeWarning, match="on the thread that recorded") if graphs == "trees" else nullcontext()
        )
        with context:
            other.start()
            other.join()
        assert found == expected
        assert bool(engine.stats().fallbacks) == (graphs == "trees")


def test_two_engines_with_trees_in_one_process(path: Path, tmp_path: Path) -> None:
    second = families.write("qwen2", tmp_path)
    prompts = families.prompts_of((9,) * 3)
    settings = {"decode_buckets": [1, 3], "prefill_buckets": []}
    for where in (path, second):
        with load(where, mode="eager") as engine:
            expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=8)]
        with load(where, mode="hybrid", graphs="trees", **settings) as engine:
            outs = engine.generate(prompts, max_new_tokens=8)
            assert [out.token_ids for out in outs] == expected
            assert engine.stats().graphs.hits > 0
            assert not engine.stats().fallbacks
