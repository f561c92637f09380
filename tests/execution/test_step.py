"""A step's inputs on their way, its first node, and sizes."""

from __future__ import annotations

from collections.abc import Iterator

import families
import pytest
import torch
from runners import attach_cache, free_runner, make_runner

from hybridgen.cache import LayerShape, PagedKV, allocate
from hybridgen.execution import ModelRunner
from hybridgen.execution import step as step_module
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.execution.staging import StagedBlock
from hybridgen.graphs.key import LAYERS, GraphKey
from hybridgen.kernels.attention.ops import Options, Places
from hybridgen.kernels.step import metadata
from hybridgen.models import attention, bind
from hybridgen.models.attention import Phase
from hybridgen.params import SamplingParams
from hybridgen.sampling import SamplerPlan, resolve

GREEDY = SamplerPlan()
MAX_BATCH, BUDGET = 4, 32


def make(**fields: object) -> ModelRunner:
    bound = bind(families.build("llama", num_hidden_layers=2))
    runner = ModelRunner(
        bound, vocab_size=families.VOCAB, max_batch=MAX_BATCH, max_pages=4, token_budget=BUDGET, **fields
    )
    attach_cache(runner, bound, 9)
    return runner


@pytest.fixture
def runner() -> Iterator[ModelRunner]:
    runner = make()
    with torch.inference_mode():
        yield runner
    runner.close()
    runner.bound.release()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[StagedBlock]:
    """Blocks as they are sent."""
    found: list[StagedBlock] = []
    send = StagedBlock.send
    monkeypatch.setattr(StagedBlock, "send", lambda block: found.append(block) or send(block))
    return found


def test_a_decode_batch_is_sent_once(runner: ModelRunner, sent: list[StagedBlock]) -> None:
    prompt = families.prompts_of((9,))[0]
    params = resolve(SamplingParams(temperature=0.0), None, (), families.VOCAB)
    for slot in (0, 2):
        runner.admit(Admission(slot, [1 + slot, 2 + slot], params, prompt))
        runner.prefill([PrefillChunk(slot, prompt, 0, len(prompt), 0, True)])
    sent.clear()
    batch = (2, 0)
    for _ in range(3):
        runner.decode(batch)
    assert len(sent) == 1
    for slots in ((0, 2), (0,), (0, 2)):
        runner.decode(slots)
    assert len(sent) == 4


def test_decode_rows_end_in_padding(runner: ModelRunner) -> None:
    for slots in ((2, 0, 3), (1,), (0, 1, 2, 3), ()):
        runner.steps.stage_decode(slots)
        for name in ("rows", "slots"):
            field = runner.steps._decode_block.device[name].tolist()
            assert field == [*slots, *[MAX_BATCH] * (MAX_BATCH + 1 - len(slots))]


def test_a_padded_prefill(runner: ModelRunner) -> None:
    """Two chunks, of which one ends its prompt, and three tokens of padding in a run of their own."""
    first = PrefillChunk(3, [7, 8], 4, 9, 1, False)
    second = PrefillChunk(1, [5, 6, 9], 2, 5, 2, True)
    runner.steps.stage_prefill([first, second], 8, 2)
    device = {name: field.tolist() for name, field in runner.steps._prefill_block.device.items()}
    assert device["ids"][:8] == [7, 8, 5, 6, 9, 0, 0, 0]
    assert device["slots"][:8] == [3, 3, 1, 1, 1, 4, 4, 4]
    assert device["positions"][:8] == [4, 5, 2, 3, 4, 0, 1, 2]
    assert device["rope"][:8] == [9, 9, 5, 5, 5, 3, 3, 3]
    assert device["starts"] == [0, 2, 5, 8, 8, 8]
    assert device["keep"][:2] == [4, 0]
    assert device["rows"][:2] == [1, 4]
    assert device["lengths"][:2] == [5, 0]
    assert device["generated"][:2] == [2, 0]


def test_padding_is_cut_into_runs_that_a_request_can_have() -> None:
    """The block table has no columns behind the longest context."""
    runner = make(max_context=10)
    runner.steps.stage_prefill([PrefillChunk(3, [7, 8], 4, 9, 1, True)], 25, 1)
    device = {name: field.tolist() for name, field in runner.steps._prefill_block.device.items()}
    assert device["positions"][:25] == [4, 5, *range(10), *range(10), *range(3)]
    assert device["slots"][:25] == [3, 3, *[4] * 23]
    assert device["rope"][:25] == [9, 9, *[10] * 23]
    assert device["starts"] == [0, 2, 12, 22, 25, 25]
    assert runner.steps.metadata.runs == ((2, False), (10, True), (10, True), (3, True))
    rooms = [(0, 40, True), (1, 40, True), (1, 41, False), (4, 10, True), (4, 11, False), (5, 0, True), (4, 0, True)]
    assert [(*room[:2], runner.steps.has_room(*room[:2])) for room in rooms] == rooms
    runner.bound.release()


def test_as_many_prompts_as_there_are_slots_and_padding(runner: ModelRunner) -> None:
    chunks = [PrefillChunk(slot, [slot + 5] * 7, 0, 7, 0, True) for slot in range(MAX_BATCH)]
    runner.steps.stage_prefill(chunks, BUDGET, MAX_BATCH)
    assert runner.steps._prefill_block.device["starts"].tolist() == [0, 7, 14, 21, 28, BUDGET]
    runner.steps.stage_prefill([PrefillChunk(0, list(range(3, 3 + BUDGET)), 0, BUDGET, 0, True)], BUDGET, 1)
    assert runner.steps._prefill_block.device["starts"].tolist() == [0, *[BUDGET] * (MAX_BATCH + 1)]


@pytest.mark.parametrize("one_copy", [True, False])
def test_the_first_node_resets_the_padding_slot_and_brings_in_what_was_staged(one_copy: bool) -> None:
    runner = make(one_copy=one_copy)
    with torch.inference_mode():
        steps = runner.steps
        for rows in (1, 3, 4):
            steps.stage_decode((2, 0, 1)[:rows])
            runner.state.table.fill_(77)
            for field in steps._decode.values():
                field.fill_(-1)
            steps._bring_in(GraphKey.decode(rows, GREEDY))
            assert runner.state.table[:, -1].tolist() == [0, 0, 0]
            assert (runner.state.table[:, :-1] == 77).all()
            padded = [2, 0, 1, MAX_BATCH][:rows] if rows == 4 else [2, 0, 1][:rows]
            for field in steps._decode.values():
                assert field.tolist() == padded + [-1] * (MAX_BATCH + 1 - rows)  # no more than the step has
        steps.stage_padding(GraphKey.prefill(8, 2, GREEDY))
        for field in steps._prefill.values():
            field.fill_(-1)
        steps._bring_in(GraphKey.prefill(8, 2, GREEDY))
        for name, size in {"ids": 8, "slots": 8, "positions": 8, "rope": 8, "keep": 2, "rows": 2, "starts": 6}.items():
            field = steps._prefill[name]
            assert (field[:size] >= 0).all()
            assert (field[size:] == -1).all()
    runner.bound.release()


@pytest.mark.parametrize("phase", list(Phase))
def test_a_step_copies_once_and_first(runner: ModelRunner, phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    steps, forward = runner.steps, runner.bound.forward
    copy = metadata.reference
    monkeypatch.setattr(metadata, "reference", lambda *pairs: order.append("copy") or copy(*pairs))
    monkeypatch.setattr(runner.bound, "forward", lambda *args: order.append("forward") or forward(*args))
    for size in (1, 2, 4, 2):
        key = GraphKey.decode(size, GREEDY) if phase is Phase.DECODE else GraphKey.prefill(size, 1, GREEDY)
        steps.stage_padding(key)
        order.clear()
        steps.run(key)
        assert order == ["copy", "forward"]


def test_nothing_moves(runner: ModelRunner) -> None:
    before = {name: tensor.data_ptr() for name, tensor in runner.steps.tensors().items()}
    assert len(before) > 25
    for size in (1, 3):
        for key in (GraphKey.decode(size, GREEDY), GraphKey.prefill(8 * size, size, GREEDY)):
            runner.steps.stage_padding(key)
            runner.steps.run(key)
    assert {name: tensor.data_ptr() for name, tensor in runner.steps.tensors().items()} == before


def test_no_buffer_is_as_long_as_a_step_can_be(runner: ModelRunner) -> None:
    """Else a step that is compiled whole is specialised to that size."""
    steps = runner.steps
    for name, field in (steps._decode | steps._prefill).items():
        assert field.shape[0] not in range(2, MAX_BATCH + 1), name
    for name in ("ids", "slots", "positions", "rope"):
        assert steps._prefill[name].shape[0] == BUDGET + 1


def test_prepared_copies_of_very_many_sizes_do_not_pile_up(runner: ModelRunner) -> None:
    for tokens in range(1, BUDGET + 1):
        for rows in range(MAX_BATCH + 1):
            runner.steps._bring_in(GraphKey.decode(min(tokens, MAX_BATCH), GREEDY))
            runner.steps._bring_in(GraphKey.prefill(tokens, rows, GREEDY))
    assert len(runner.steps._copies) <= 256


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("kind", [{}, {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.2, "logprobs": 2}])
def test_a_step_in_two_parts_is_the_step(runner: ModelRunner, phase: Phase, kind: dict[str, object]) -> None:
    """Up to its logits, then `finish`: the same values, bit for bit."""
    prompt = families.prompts_of((9,))[0]
    found = []
    runner.steps.keep_logits()
    for split in (False, True):
        runner.admit(Admission(1, [3, 4], resolve(SamplingParams(**kind), None, (), families.VOCAB), prompt))
        runner.prefill([PrefillChunk(1, prompt[:-1], 0, len(prompt), 0, False)])
        plan = runner.sampler.needs((1,))
        tokens = 3
        if phase is Phase.DECODE:
            runner.prefill([PrefillChunk(1, prompt[-1:], 8, len(prompt), 0, True)]).read()
            runner.steps.stage_decode((1,))
        else:
            runner.steps.stage_prefill([PrefillChunk(1, prompt[-1:], 8, len(prompt), 0, True)], tokens, tokens)
        runner.ring.reserve()
        if split:
            runner.steps.run(GraphKey(LAYERS, phase, tokens, tokens, 1, None))
            counter = runner.ring.counter.item()
            runner.steps.finish(GraphKey(LAYERS, phase, tokens, tokens, 1, None), plan)
            assert runner.ring.counter.item() == counter + 1
        else:
            runner.steps.run(GraphKey(LAYERS, phase, tokens, tokens, 1, plan))
        output = runner.ring.launched(1, plan.logprobs, "", "").read()
        counts = None if runner.sampler.output_counts is None else runner.sampler.output_counts[1].tolist()
        found.append((output, runner.state.table.tolist(), counts))
    assert found[0] == found[1]


class Noted(PagedKV):
    """Pages that ask to be reset and committed, as a state by slot does that a second run of a step would change."""

    bytes_per_slot = 4

    def __init__(self, shape: LayerShape, rerunnable: bool) -> None:
        super().__init__(shape, 16, torch.float32)
        self.rerunnable = rerunnable  # type: ignore[misc]
        self.calls: list[tuple[str, list[int], list[int]]] = []

    def reset(self, slot: int) -> None:
        self.calls.append(("reset", [slot], []))

    def commit(self, slots: torch.Tensor, accepted: torch.Tensor) -> None:
        self.calls.append(("commit", slots.tolist(), accepted.tolist()))


def test_states_are_reset_at_admission_and_committed_by_steps_unless_they_are_rerunnable(runner: ModelRunner) -> None:
    shapes = [site.shape for site in runner.bound.sites]
    states = [Noted(shape, rerunnable) for shape, rerunnable in zip(shapes, (True, False), strict=True)]
    allocate(states, 9, MAX_BATCH + 1, torch.device("cpu"))
    runner.attach(states)
    tensors = runner.steps.tensors()
    assert tensors["keys of layer 1"] is states[1].pages.keys
    assert tensors["values of layer 0"] is states[0].pages.values
    sampling = resolve(SamplingParams(), None, frozenset(), families.VOCAB)
    for slot in (2, 0):
        runner.admit(Admission(slot, [1 + slot], sampling, [5, 6, 7]))
        runner.prefill([PrefillChunk(slot, [5, 6, 7], 0, 3, 0, True)])
    runner.decode((0, 2))
    resets = [("reset", [2], []), ("reset", [0], [])]
    assert states[0].calls == resets
    padding, lines = [MAX_BATCH] * MAX_BATCH, [1] * (MAX_BATCH + 1)  # a prefill's slots, chunks in the middle included
    commits = [("commit", [slot, *padding], lines) for slot in (2, 0)] + [("commit", [0, 2], [1, 1])]
    assert sorted(states[1].calls) == sorted(resets + commits)


@pytest.mark.parametrize("phase", list(Phase))
def test_all_layers_read_one_set_of_metadata(
    runner: ModelRunner, phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed or copied for a layer: each is given the same tensors, where the step has them."""
    found: list[list[int]] = []
    name = "decode_attention" if phase is Phase.DECODE else "prefill_attention"
    attend = getattr(attention, name)

    def note(query: torch.Tensor, places: Places, *rest: object, **fields: object) -> torch.Tensor:
        starts = [each for each in rest if isinstance(each, torch.Tensor)]
        found.append([each.data_ptr() for each in (places.block_table, places.slots, places.positions, *starts)])
        return attend(query, places, *rest, **fields)

    monkeypatch.setattr(attention, name, note)
    key = GraphKey.decode(3, GREEDY) if phase is Phase.DECODE else GraphKey.prefill(8, 1, GREEDY)
    runner.steps.stage_padding(key)
    runner.steps.run(key)
    first, second = found  # two layers
    assert len(first) == (3 if phase is Phase.DECODE else 4)
    assert first == second
    step = runner.steps.metadata
    fields = [step.block_table, step.slots, step.positions, step.query_starts]
    assert first == [tensor.data_ptr() for tensor in fields[: len(first)]]


@pytest.mark.parametrize("phase", list(Phase))
def test_what_is_left_of_a_step_reads_its_logits_where_they_are(
    runner: ModelRunner, phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.Tensor] = []
    sample = step_module.sample
    monkeypatch.setattr(
        step_module, "sample", lambda logits, *rest, **more: found.append(logits) or sample(logits, *rest, **more)
    )
    key = GraphKey.decode(3, None) if phase is Phase.DECODE else GraphKey.prefill(8, 3, None)
    runner.prepare(key)
    runner.steps.run(key)
    runner.steps.finish(key, GREEDY)
    [logits] = found
    kept = runner.steps.logits
    assert (logits.data_ptr(), logits.shape) == (kept.data_ptr(), (3, families.VOCAB))
    assert logits.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()


def schedules_in_the_order_of_attention(runner: ModelRunner, key: GraphKey, monkeypatch: pytest.MonkeyPatch) -> list:
    """What a step asks of attention: ("schedule" or "attend", window, the schedule's address)."""
    found: list[tuple[str, int, int]] = []
    schedule, attend = attention.schedule_attention, attention.decode_attention

    def note_schedule(places: Places, query_heads: int, window: int, chunk: int, out: torch.Tensor) -> None:
        step = runner.steps.metadata
        assert [each.data_ptr() for each in places[2:]] == [
            each.data_ptr() for each in (step.block_table, step.slots, step.positions)
        ]
        assert query_heads == 4
        found.append(("schedule", window, id(out)))
        schedule(places, query_heads, window, chunk, out)

    def note_attention(query: torch.Tensor, places: Places, options: Options, **fields: torch.Tensor) -> torch.Tensor:
        found.append(("attend", options.window, id(fields["schedule"])))
        return attend(query, places, options, **fields)

    monkeypatch.setattr(attention, "schedule_attention", note_schedule)
    monkeypatch.setattr(attention, "decode_attention", note_attention)
    runner.steps.stage_padding(key)
    runner.steps.run(key)
    return found


@pytest.mark.parametrize("query_len", [1, 3])
def test_layers_alike_share_one_attention_schedule(query_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written once a step for each window, before the first layer reads it."""
    runner = make_runner("gemma2", query_len=query_len, num_hidden_layers=4)
    with torch.inference_mode():
        key = GraphKey.decode(3, GREEDY, query_len=query_len)
        found = schedules_in_the_order_of_attention(runner, key, monkeypatch)
    schedules, layers = found[:2], found[2:]
    assert [what for what, _, _ in found] == ["schedule"] * 2 + ["attend"] * 4
    of_window = {window: schedule for _, window, schedule in schedules}
    assert len(of_window) == len(set(of_window.values())) == 2
    assert [schedule for _, _, schedule in layers] == [of_window[window] for _, window, _ in layers]
    assert {window for _, window, _ in layers} == set(of_window)
    free_runner(runner)


def test_prefill_needs_no_attention_schedule(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not schedules_in_the_order_of_attention(runner, GraphKey.prefill(8, 1, GREEDY), monkeypatch)


def test_attention_schedules_are_among_what_must_not_move(runner: ModelRunner) -> None:
    kept = runner.steps.tensors()
    binding = next(m._hybridgen for m in runner.bound.model.modules() if hasattr(m, "_hybridgen"))
    assert kept["attention schedule 0"] is binding.schedule
    assert "attention schedule 1" not in kept
