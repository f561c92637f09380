"""What a runner does before its first request: compile, check, run every size once, measure memory.

All of it runs with padding alone, which writes to the dummy page only. Not while requests run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from hybridgen.compilation.layers import CompiledLayers
from hybridgen.device.capture import CAPTURING
from hybridgen.errors import CacheMissError, described
from hybridgen.execution import numerics, products
from hybridgen.execution.executors import Cuts
from hybridgen.execution.runner import ModelRunner
from hybridgen.execution.stream import on_its_stream
from hybridgen.graphs import GraphKey
from hybridgen.models.measured import Measured
from hybridgen.sampling import SamplerPlan
from hybridgen.sampling.state import every_kind

logger = logging.getLogger(__name__)

WARM_UP_RUN = 7
"""Tokens of the warm-up prefill on a CPU: few enough for the first page, and no dimension of a model."""

WARM_UP_ROWS = 3

_SIZES = (4099, 2053, 1031, 521, 251, 127, 61, 31, 13, WARM_UP_RUN, WARM_UP_ROWS, 2)
"""What layers are compiled at on CUDA: primes, which no dimension of a model is likely to be."""
_MOST_COMPILED_ROWS = 251

_NODE_BYTES = 128 * 2**20
"""For the nodes of all graphs; a 1B model's took 1 to 6 MiB each on an H200."""


@on_its_stream
def compile_layers(runner: ModelRunner) -> None:
    """Compile prefill, decode of several rows and of one.

    Where a backend's choices depend on the number of tokens (grouped matrix products of experts in bfloat16 do, in
    torch 2.11), there is a graph for each part of the range that the sizes tried here meet.

    One graph serves all sizes, but Inductor cuts its kernels for the one that it is shown: for 7 tokens it takes blocks
    of 256 elements, 2 a thread, whose loads of 4 bytes reach a quarter of the memory's speed in a call of 8192. So on
    CUDA it is shown a large one, at which it also measures which blocks are faster.
    """
    compiled = runner.compiled
    if compiled is None:
        return
    compiled.install()
    run, several = shown_sizes(runner)
    try:
        if not compiled.strict:
            raise ConstraintViolationError("a graph may serve a part of the range")
        _compile(runner, compiled, [run], [several, 1])
    except ConstraintViolationError as error:
        logger.debug("not one graph for all sizes: %s", error)
        compiled.strict = False
        rows = [2**i for i in range(runner.max_batch.bit_length())]
        runs = [run, *(2**i for i in range(4, 14))]
        _compile(runner, compiled, runs, [several, *rows, runner.max_batch])


def shown_sizes(runner: ModelRunner) -> tuple[int, int]:
    """Tokens of the prefill, and rows of the decode step, that layers are compiled at."""
    if runner.device.type != "cuda":
        return WARM_UP_RUN, WARM_UP_ROWS
    most = max(2, runner.max_tokens), max(2, min(_MOST_COMPILED_ROWS, runner.max_batch))
    run, several = (next(size for size in _SIZES if size <= limit) for limit in most)
    return run, several


def _compile(runner: ModelRunner, compiled: CompiledLayers, runs: Sequence[int], rows: Sequence[int]) -> None:
    sampler = SamplerPlan()
    keys = [GraphKey.prefill(size, 1, sampler) for size in dict.fromkeys(min(run, runner.max_tokens) for run in runs)]
    sizes = list(dict.fromkeys(min(row, runner.max_batch) for row in rows))
    # The executor is the layers: a prefill of one token runs them as decode does, and so does a step that no fused
    # executor serves.
    keys += [GraphKey.decode(size, sampler) for size in sizes]
    if runner.state.query_len > 1:
        several = sizes[:1] if compiled.strict else sizes
        keys += [GraphKey.decode(size, sampler, query_len=runner.state.query_len) for size in several]
    with compiled.warming_up():
        for key in keys:
            runner.run_padding(key)


@on_its_stream
def check_numerics(runner: ModelRunner) -> str | None:
    """Compare compiled layers with uncompiled ones on a few tokens; what differs too much, or None."""
    if runner.compiled is None:
        return None
    wrong = numerics.compare(runner, runner.compiled)
    runner.recover()
    return wrong


def last_layer_stays_whole(runner: ModelRunner) -> str | None:
    """Why the last layer of no prefill can be cut; None if it may be tried."""
    compiled = runner.compiled
    if compiled is None or not compiled.strict or not runner.bound.can_end or runner.drafting is not None:
        return "it is not compiled for all sizes at once, or does not keep keys and values alone"
    if runner.max_tokens < Cuts().tokens:
        return "no prefill is long enough"
    return None


@on_its_stream
def cut_last_layer(runner: ModelRunner) -> str | None:
    """From now on the last layer of long prefills goes on with the prompts' last tokens alone, if that gives the same
    logits on a few tokens. Layers are compiled already.

    Returns:
        Why not; None if they do.
    """
    layers, compiled = runner.layers, runner.compiled
    why = last_layer_stays_whole(runner)
    if why is not None or compiled is None:
        return why
    layers.cuts = Cuts(1, 1)
    try:
        with compiled.warming_up():
            runner.run_padding(GraphKey.prefill(shown_sizes(runner)[0], 1, SamplerPlan()))
            wrong = numerics.compare_cut(runner)
    except CacheMissError:
        wrong = "it is not in the compile cache"
    except Exception as error:  # the model's code gets other tokens than it expects
        logger.debug("the last layer is not cut", exc_info=True)
        wrong = described(error)
    finally:
        layers.cuts = None
        runner.recover()
    if wrong is None:
        layers.cuts = Cuts()
    return wrong


@on_its_stream
def run_all_sizes(runner: ModelRunner) -> None:
    """Run a few sizes of prefill and decode: on CUDA, kernels have variants for sizes.

    They are compiled, loaded and chosen on their first use, which takes up to half a second each: not in a user's step.
    """
    sampler = SamplerPlan()
    for tokens in _spread(runner.max_tokens):
        runner.run_padding(runner.router.served(GraphKey.prefill(tokens, 1, sampler)))
    for rows in _spread(runner.max_batch):
        for key in _decode_kinds(runner, rows, sampler):
            runner.run_padding(runner.router.served(key))
    torch.cuda.synchronize(runner.device)


@on_its_stream
def choose_products(runner: ModelRunner, sizes: Sequence[int], measured: Measured) -> None:
    """Say which steps, by their tokens, multiply by cublasLt in the layers: where that was measured to be faster."""
    runner.layers.by_cublaslt = products.choose(runner.bound.layers, sizes, products.seconds_of, measured)


@on_its_stream
def run_all_samplers(runner: ModelRunner) -> None:
    """Run a decode step with each kind of sampler, as `run_all_sizes()` does for sizes."""
    runner.ring.drain()
    for sampler in every_kind(runner.sampler.vocab_size):
        for key in _decode_kinds(runner, 1, sampler):
            runner.run_padding(runner.router.served(key))
    runner.recover()


@on_its_stream
def measure_activations(runner: ModelRunner, recorded: int = 0) -> int:
    """Bytes that steps allocate at their peak on CUDA (0 elsewhere), by the largest prefill call.

    Args:
        recorded: tokens of the largest step that will be recorded; a graph's memory is its own.
    """
    if runner.device.type != "cuda":
        return 0
    key = GraphKey.prefill(runner.max_tokens, 1, SamplerPlan())
    torch.cuda.synchronize(runner.device)
    torch.cuda.reset_peak_memory_stats(runner.device)
    before = torch.cuda.memory_allocated(runner.device)
    runner.run_padding(key)
    peak = torch.cuda.max_memory_allocated(runner.device) - before
    # The sampler works on [rows, vocab_size] in float32: logits, processed, sorted values and ids, noise.
    sampling = 8 * 4 * runner.max_batch * runner.state.query_len * runner.sampler.vocab_size
    # Logits of scored tokens, and what some models make of them before they hand them out.
    sampling += 3 * runner.score_budget * runner.sampler.vocab_size * runner.bound.logits_dtype.itemsize
    with CAPTURING:
        torch.cuda.empty_cache()
    if not recorded:
        return peak + sampling
    # In a graph: activations, sampler and kept logits, and the nodes.
    in_graphs = peak * min(1.0, recorded / runner.max_tokens) + sampling * 5 // 4 + _NODE_BYTES
    return peak + sampling + int(in_graphs)


def _decode_kinds(runner: ModelRunner, rows: int, sampler: SamplerPlan) -> list[GraphKey]:
    """Decode steps of so many rows: without drafts, with them, and where drafting pauses."""
    keys = [GraphKey.decode(rows, sampler, query_len=count) for count in (1, *runner.query_lens)]
    pauses = runner.drafting is not None and runner.drafting.can_pause
    return [*keys, GraphKey.decode(rows, sampler, quiet=True)] if pauses else keys


def _spread(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
