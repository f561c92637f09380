"""A server with the demo model in a process of its own: results, load, death and restart."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from places import short_directory
from waiting import HANGS, until
from wire import Process, Raw, environment
from worker import case

import hybridgen
from hybridgen import Completion, FinishReason, SamplingParams
from hybridgen.serving.unix.messages import completion_from_wire, sampling_from_wire

WORKER = Path(__file__).with_name("worker.py")
LONG = {"max_new_tokens": 900, "ignore_eos": True}


@pytest.fixture
def client(demo: Process) -> Iterator[hybridgen.Client]:
    with demo.client() as opened:
        yield opened


def at_rest(client: hybridgen.Client) -> bool:
    stats = client.stats()
    engine, server = stats["engine"], stats["server"]
    now = (engine["running"], engine["waiting"], engine["pages"] - engine["free_pages"], server["in_flight"])
    return now == (0, 0, 0, 0)


def same(ours: Completion, theirs: Completion) -> None:
    """Everything but times, exactly."""
    blank = theirs.timing
    for mine, other in zip(ours.choices or [ours], theirs.choices or [theirs], strict=True):
        assert dataclasses.replace(mine, timing=blank, choices=()) == dataclasses.replace(
            other, timing=blank, choices=()
        )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.8, "seed": 5},
        {"logprobs": 3},
        {"stop": ["return", "\n\n"]},
        {"logit_bias": {13: float("-inf")}, "repetition_penalty": 1.2, "frequency_penalty": 0.1},
        {"n": 3, "temperature": 1.2, "seed": 9, "logprobs": 0},
        {"stop_token_ids": [200], "skip_special_tokens": False, "min_new_tokens": 2},
    ],
)
def test_results_equal_those_in_process(
    client: hybridgen.Client, engine: hybridgen.Engine, fields: dict[str, Any]
) -> None:
    fields = {"max_new_tokens": 12, "seed": 1} | fields
    for prompt in ("def read(path):\n", [5, 6, 7]):
        same(client.generate(prompt, **fields), engine.generate(prompt, **fields))
        ours, theirs = list(client.stream(prompt, **fields)), list(engine.stream(prompt, **fields))
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert dataclasses.replace(mine, completion=None) == dataclasses.replace(other, completion=None)
            assert (mine.completion is None) == (other.completion is None)
            if mine.completion is not None and other.completion is not None:
                same(mine.completion, other.completion)


def test_prompts_of_every_kind(client: hybridgen.Client, engine: hybridgen.Engine) -> None:
    text = "def read(path):\n"
    ids = engine.tokenizer(text)["input_ids"]
    expected = engine.generate(text, max_new_tokens=5).token_ids
    for prompt in (ids, tuple(ids), torch.tensor(ids), torch.tensor(ids).numpy(), engine.tokenizer(text)):
        assert client.generate(prompt, max_new_tokens=5).token_ids == expected
    for prompts in ([text], [ids], torch.tensor([ids]), [torch.tensor(ids)], [torch.tensor([ids])]):
        assert [out.token_ids for out in client.generate(prompts, max_new_tokens=5)] == [expected]
    params = [SamplingParams(max_new_tokens=k) for k in (1, 2, 3)]
    assert [len(out.token_ids) for out in client.generate([text] * 3, params)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("", {}),
        ([], {}),
        ("x", {"temperature": -1}),
        ("x", {"temprature": 1}),
        ("x", {"max_new_tokens": 10**6}),
        ([10**6], {}),
        ([1.5], {}),
        ("\ud800", {}),
        (b"x", {}),
        ([b"x"], {}),
        ([{"role": "user", "content": "x"}], {}),
        (["x", "y"], {"sampling": [SamplingParams()]}),
        (17, {}),
        ("x", {"logit_bias": {10**6: 1.0}}),
        ([1] * 2000, {}),
    ],
)
def test_errors_are_those_of_the_engine(
    client: hybridgen.Client, engine: hybridgen.Engine, prompt: Any, fields: dict[str, Any]
) -> None:
    with pytest.raises(hybridgen.HybridgenError) as here:
        engine.generate(prompt, **fields)
    with pytest.raises(hybridgen.HybridgenError) as there:
        client.generate(prompt, **fields)
    assert type(there.value) is type(here.value)
    with pytest.raises(type(here.value)):
        list(client.stream(prompt, **fields))


def test_a_streamer(client: hybridgen.Client, engine: hybridgen.Engine) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.calls.append(value.tolist())

        def end(self) -> None:
            self.calls.append("end")

    for count in (1, 8):
        here, there = Recorder(), Recorder()
        engine.generate("import os", max_new_tokens=count, streamer=here)
        client.generate("import os", max_new_tokens=count, streamer=there)
        assert there.calls == here.calls
    with pytest.raises(hybridgen.SamplingError, match="streamer= takes one prompt"):
        client.generate(["a", "b"], streamer=Recorder())
    with pytest.raises(hybridgen.SamplingError, match="has no put"):
        client.generate("a", streamer=object())
    for prompt, fields in (("", {}), ([10**9], {}), ("a", {"temperature": -1}), (["a", "b"], {})):
        for generate in (client.generate, lambda *args, **kw: hybridgen.generate(f"unix:{client.path}", *args, **kw)):
            refused = Recorder()
            with pytest.raises(hybridgen.HybridgenError):
                generate(prompt, streamer=refused, **fields)
            assert refused.calls == ["end"]


def test_the_front_door(demo: Process, engine: hybridgen.Engine) -> None:
    model = f"unix:{demo.path}"
    same(
        hybridgen.generate(model, "import os", max_new_tokens=6, seed=0),
        engine.generate("import os", max_new_tokens=6, seed=0),
    )
    outs = hybridgen.generate(model=model, prompts=["import os", "def f"], max_new_tokens=3)
    assert [len(out.token_ids) for out in outs] == [3, 3]
    events = hybridgen.stream(model, "import os", max_new_tokens=6)
    assert "".join(event.text for event in events) == engine.generate("import os", max_new_tokens=6).text
    with pytest.raises(hybridgen.ConfigError, match="max_batch= cannot be changed on a server"):
        hybridgen.generate(model, "x", max_batch=3)
    with pytest.raises(hybridgen.ConfigError, match="config= cannot be changed on a server"):
        hybridgen.generate(model, "x", config=hybridgen.EngineConfig())
    with pytest.raises(hybridgen.ServerError, match="no server answers"):
        hybridgen.generate("unix:/nowhere/at/all", "x")
    with pytest.raises(hybridgen.PromptError, match="no prompts"):
        hybridgen.generate(model)
    stream = hybridgen.stream(model, "import os", **LONG)
    next(stream)
    stream.close()
    with demo.client() as client:
        until(lambda: at_rest(client))


def test_stats_and_ping(client: hybridgen.Client) -> None:
    before = client.stats()
    client.generate("x = ", max_new_tokens=5)
    after = client.stats()
    assert after["engine"]["tokens"]["generated"] == before["engine"]["tokens"]["generated"] + 5
    assert after["server"]["counts"]["completions"] == before["server"]["counts"]["completions"] + 1
    ping = client.ping()
    assert ping["healthy"]
    assert ping["steps"] >= 5
    assert ping["step_age"] < 60
    assert client.server["max_context"] == 1024
    assert client.server["limits"]["queue"] == 400


def matches(ours: Completion, theirs: Completion) -> bool:
    """Equal ids, text and reason, and log-probabilities that differ by rounding at most."""
    exact = ("token_ids", "text", "finish_reason", "stop_match", "seed", "prompt_token_ids", "error")
    if any(getattr(ours, name) != getattr(theirs, name) for name in exact):
        return False
    for mine, other in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert len(mine.top) == len(other.top)
    return True


@pytest.mark.parametrize("each", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_sixteen_clients_with_several_requests_each(
    demo: Process, client: hybridgen.Client, engine: hybridgen.Engine, each: int
) -> None:
    descriptors = demo.descriptors()
    steps = client.ping()["steps"]
    workers = [
        forks.Popen(
            [sys.executable, str(WORKER), str(demo.path), str(each * number), str(each)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for number in range(16)
    ]
    found: dict[int, Completion] = {}
    for worker in workers:
        out, err = worker.communicate(timeout=HANGS)
        assert worker.returncode == 0, err
        for record in map(json.loads, out.splitlines()):
            found[record["number"]] = completion_from_wire(record["completion"])
    assert sorted(found) == list(range(16 * each))
    steps = client.ping()["steps"] - steps
    prompts, wires = zip(*map(case, range(16 * each)), strict=True)
    expected = dict(enumerate(engine.generate(list(prompts), list(map(sampling_from_wire, wires)))))
    different = [number for number in range(16 * each) if not matches(found[number], expected[number])]
    # In a batch of another size a matrix product may end in other last bits, and a token whose two best candidates are
    # that close may then be another one.
    assert len(different) <= 2, different
    tokens = sum(len(choice.token_ids) for out in expected.values() for choice in out.choices or [out])
    assert steps < tokens / 1.5  # they ran together
    until(lambda: at_rest(client))
    until(lambda: demo.descriptors() == descriptors)


def test_killed_clients_leave_nothing(demo: Process, client: hybridgen.Client) -> None:
    code = (
        "import sys, hybridgen\n"
        "client = hybridgen.Client(sys.argv[1])\n"
        "for event in client.stream(['import os', 'def f'], max_new_tokens=600, ignore_eos=True):\n"
        "    print(event.token_id, flush=True)\n"
    )
    descriptors = demo.descriptors()
    victims = [
        forks.Popen([sys.executable, "-c", code, str(demo.path)], stdout=subprocess.PIPE, env=environment())
        for _ in range(4)
    ]
    for victim in victims:
        assert victim.stdout is not None
        for _ in range(3):
            assert victim.stdout.readline()
    until(lambda: client.stats()["engine"]["running"] == 8)
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert victim.stdout is not None
        victim.stdout.close()
    steps = client.ping()["steps"]
    until(lambda: at_rest(client))
    assert client.ping()["steps"] - steps <= 100  # at the next step, not when they would have ended
    assert demo.descriptors() == descriptors
    assert client.generate("x", max_new_tokens=2).finish_reason is FinishReason.LENGTH


def test_memory_comes_back(demo: Process, client: hybridgen.Client) -> None:
    def load(rounds: int) -> None:
        for _ in range(rounds):
            raw = Raw(demo.path)
            for key in range(40):
                prompt = [[1 + key] * 200]
                raw.send({"type": "request", "id": key, "prompts": prompt, "sampling": LONG | {"max_new_tokens": 800}})
            raw.close()
            until(lambda: at_rest(client))

    load(3)
    before, descriptors = demo.resident(), demo.descriptors()
    load(6)
    assert demo.resident() - before < 24 * 2**20
    assert demo.descriptors() == descriptors


def test_a_stopped_client_does_not_stop_others(demo: Process, client: hybridgen.Client) -> None:
    slow = Raw(demo.path)
    slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.send({"type": "request", "id": 1, "prompts": ["x"] * 4, "sampling": LONG | {"logprobs": 64}, "stream": True})
    for _ in range(10):
        assert len(client.generate("import", max_new_tokens=5).token_ids) == 5
    slow.close()
    until(lambda: at_rest(client))


def test_interrupted(demo: Process) -> None:
    code = (
        "import sys, hybridgen\n"
        "from hybridgen import SamplingParams as P\n"
        "client = hybridgen.Client(sys.argv[1])\n"
        "hand_out = client._link._hand_out\n"
        "def told(message):\n"
        "    hand_out(message)\n"
        "    if message['type'] == 'done': print('one is done', flush=True)\n"
        "client._link._hand_out = told\n"
        "try:\n"
        "    client.generate(['x', 'y'], [P(max_new_tokens=2), P(max_new_tokens=1000, ignore_eos=True)])\n"
        "except hybridgen.Interrupted as error:\n"
        "    print([(str(c.finish_reason), len(c.token_ids)) for c in error.completions], error)\n"
        "del client._link._hand_out\n"
        "print(len(client.generate('x', max_new_tokens=3).token_ids))\n"
    )
    child = forks.Popen(
        [sys.executable, "-c", code, str(demo.path)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "one is done\n"
    time.sleep(0.2)  # the child has read it, and looks at it now
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=HANGS)
    first, last = (line for line in out.splitlines() if line != "one is done")
    assert first.startswith("[('length', 2), ('cancelled', ")
    assert "1 of 2 requests finished" in first
    assert last == "3"


def scrape(demo: Process) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{demo.facts['metrics_port']}/metrics", timeout=HANGS) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_metrics(demo: Process, client: hybridgen.Client) -> None:
    before = scrape(demo)
    client.generate(["a = ", "b = "], max_new_tokens=4)
    with pytest.raises(hybridgen.PromptError):
        client.generate([10**6])
    until(lambda: scrape(demo)['hybridgen_tokens_total{kind="generated"}'] - before[
        'hybridgen_tokens_total{kind="generated"}'] == 8)  # fmt: skip
    after = scrape(demo)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grew("hybridgen_requests_total") == 2
    assert grew('hybridgen_requests_failed_total{kind="error"}') == 1
    assert grew('hybridgen_completions_total{finish_reason="length"}') == 2
    assert grew("hybridgen_ttft_seconds_count") == 2
    assert grew("hybridgen_tpot_seconds_count") == 2
    assert grew("hybridgen_tpot_seconds_sum") > 0
    assert grew("hybridgen_steps_total") == 4
    assert after["hybridgen_pages_free"] == after["hybridgen_pages"] > 0
    assert after["hybridgen_pages_kept"] >= 0
    # Prompts of less than a page.
    assert grew('hybridgen_prefix_tokens_total{result="hit"}') == 0
    assert grew('hybridgen_prefix_tokens_total{result="miss"}') == grew('hybridgen_tokens_total{kind="prompt"}') > 0
    assert after["hybridgen_in_flight"] == after["hybridgen_running"] == after["hybridgen_waiting"] == 0
    assert after["hybridgen_healthy"] == 1
    for phase, result in itertools.product(("prefill", "decode"), ("hit", "padded_hit", "miss")):
        assert f'hybridgen_graph_steps_total{{phase="{phase}",result="{result}"}}' in after
    for name in ("graph_capture_failures_total", "graph_evictions_total", "graph_bytes"):
        assert after[f"hybridgen_{name}"] == 0


def command(demo: Process, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return forks.run(
        [sys.executable, "-m", "hybridgen", "client", "--socket", str(demo.path), *arguments],
        capture_output=True,
        text=True,
        input=text,
        env=environment(),
    )


def test_the_client_command(demo: Process, engine: hybridgen.Engine, tmp_path: Path) -> None:
    expected = engine.generate("import os", max_new_tokens=6).text
    assert command(demo, "import os", "--max-new-tokens", "6").stdout == f"import os{expected}\n"
    assert command(demo, "--max-new-tokens", "6", "--stream", text="import os").stdout == f"import os{expected}\n"
    done = command(demo, "import os", "x", "--json", "--max-new-tokens", "6", "--stats")
    assert {json.loads(line)["id"] for line in done.stdout.splitlines()} == {0, 1}
    assert '"free_pages"' in done.stderr
    output = tmp_path / "out.jsonl"
    assert command(demo, "import os", "--output", str(output), "--max-new-tokens", "6").returncode == 0
    assert json.loads(output.read_text())["text"] == expected
    ping = command(demo, "--ping")
    assert ping.returncode == 0
    assert json.loads(ping.stdout)["pid"] == demo.popen.pid
    bad = command(demo, "x", "--temperature", "-1")
    assert bad.returncode == 2
    assert bad.stderr.startswith("hybridgen: temperature=-1")
    assert command(demo, "x", "--ping").returncode == 2


def test_killed_and_started_again_under_load() -> None:
    first = Process(short_directory())
    client = first.client()
    raw = Raw(first.path)
    raw.send({"type": "request", "id": 1, "prompts": ["x"], "sampling": LONG, "stream": True})
    raw.receive()
    first.kill()
    assert raw.ended()
    second = Process(first.directory)
    try:
        assert len(client.generate("x", max_new_tokens=3).token_ids) == 3
        third = Process(first.directory, wait=False)  # two on one path, long before it would have loaded
        assert third.popen.wait(HANGS) == 2
        assert "another server has" in third.log()
        raw = Raw(second.path)
        sampling = {"max_new_tokens": 24}
        raw.send(*({"type": "request", "id": key, "prompts": ["x"], "sampling": sampling} for key in range(30)))
        until(lambda: client.ping()["in_flight"] > 20)
        second.popen.send_signal(signal.SIGTERM)  # shutdown under load: all 30 are answered
        assert {raw.receive()["id"] for _ in range(30)} == set(range(30))
        assert raw.ended()
        assert second.popen.wait(HANGS) == 0
        assert not second.path.exists()
    finally:
        second.kill()


def test_half_a_frame_and_then_death(demo: Process, client: hybridgen.Client) -> None:
    descriptors = demo.descriptors()
    for size in (1, 3, 4, 5, 40):
        raw = Raw(demo.path)
        body = json.dumps({"type": "request", "id": 1, "prompts": ["x"], "sampling": {}}).encode()
        raw.socket.sendall((struct.pack(">I", len(body)) + body)[:size])
        raw.close()
    until(lambda: demo.descriptors() == descriptors)
    time.sleep(0.05)
    assert at_rest(client)


def test_bad_rows_are_returned_with_their_error(demo: Process, client: hybridgen.Client) -> None:
    """A server refuses a request as a whole; the client finds which prompts it is."""
    prompts = ["import os", "", [10**9], {"messages": "hi"}, [5] * 5000, None, b"x", "x" * 300_000, "y"]
    with pytest.raises(hybridgen.PromptError):
        client.generate(prompts, max_new_tokens=3)
    outs = client.generate(prompts, max_new_tokens=3, errors="return")
    assert [index for index, out in enumerate(outs) if out.error is None] == [0, 8]
    assert all(str(out.error).startswith(f"prompt {index}") for index, out in enumerate(outs) if out.error), outs
    assert [out.prompt for out in outs[:2]] == ["import os", ""]
    assert client.generate("", errors="return").error is not None
    sampled = client.generate(["", "x"], max_new_tokens=3, n=2, temperature=1.0, errors="return")
    assert [len(out.choices) for out in sampled] == [1, 2]

    async def wanted() -> list[Completion]:
        async with hybridgen.AsyncClient(demo.path) as asynchronous:
            return await asynchronous.generate(prompts, max_new_tokens=3, errors="return")

    again = asyncio.run(wanted())
    assert [out.token_ids for out in again] == [out.token_ids for out in outs]


def test_a_chat_in_a_mapping_and_a_cut_prompt_go_over_the_wire(client: hybridgen.Client) -> None:
    chat = {"messages": [{"role": "user", "content": "x = "}], "chat_template": "{{ messages[0].content }}1"}
    out = client.generate(chat, max_new_tokens=2)
    assert out.prompt == chat
    assert out.prompt_token_ids == client.generate("x = 1", max_new_tokens=2).prompt_token_ids
    cut = client.generate([5] * 5000, max_new_tokens=2, truncate_prompt=20)
    assert (cut.truncated_tokens, len(cut.prompt_token_ids)) == (4980, 20)
