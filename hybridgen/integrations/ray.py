"""Many machines with Ray Data: a data set's rows through engines in its actors. The extra `ray`.

Columns in and out are named as those of `ray.data.llm`, so that a pipeline can change from one to the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridgen.arguments import check_keywords
from hybridgen.compilation.store.bundle import import_bundle
from hybridgen.compilation.store.store import Store
from hybridgen.config import EngineConfig
from hybridgen.core import Completion
from hybridgen.engine import Engine
from hybridgen.errors import CacheError, ConfigError, EngineError, HybridgenError, SamplingError, described, shown
from hybridgen.params import SamplingParams, row_seed

try:
    import ray.data
except ImportError as error:
    raise ConfigError("Ray Data is needed; pip install 'hybridgen[ray]'") from error

ERROR = "__inference_error__"
"""The column with what went wrong with a row; empty where nothing did."""
_OUT: dict[str, Any] = {
    "generated_text": "",
    "generated_tokens": (),
    "num_input_tokens": 0,
    "num_generated_tokens": 0,
    "finish_reason": "",
    "time_taken_llm": 0.0,
}
"""Columns that are added, and what a row that failed has there."""

Row = dict[str, Any]


def build_processor(
    model: str | os.PathLike[str] | None = None,
    *,
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 32,
    max_concurrent_batches: int = 8,
    num_gpus: float = 0,
    sampling: Mapping[str, Any] | None = None,
    seed: int | None = None,
    id_column: str = "id",
    bundle: str | os.PathLike[str] | None = None,
    trust_bundle: bool = False,
    preprocess: Callable[[Row], Row] | None = None,
    postprocess: Callable[[Row], Row] | None = None,
    **fields: Any,
) -> Callable[[ray.data.Dataset], ray.data.Dataset]:
    """A function that generates for each row of a data set.

    A row has `prompt` (text or token ids) or `messages` (a chat), and may have `sampling_params`, a mapping of
    `SamplingParams` fields. It keeps its columns and gets `generated_text`, `generated_tokens`, `num_input_tokens`,
    `num_generated_tokens`, `finish_reason`, `time_taken_llm` (seconds) and `__inference_error__`: why it failed, or "".
    An actor whose engine breaks ends, Ray starts another and runs its batches again.

    Args:
        model: local path or hub id, as every machine of the cluster finds it; None: the demo model.
        concurrency: actors, each with an engine; a pair is the least and the most.
        batch_size: rows that an actor is given at once.
        max_concurrent_batches: batches that an actor has at once, so that the last rows of one do not leave it idle.
        num_gpus: of each actor; a part of one if several share it, with `kv_memory=` for each then.
        sampling: fields of `SamplingParams` for rows that have none of their own.
        seed: of the run. A row's seed is made of it and of its id, so retries draw the same; rows without an id, or
            with a seed in `sampling_params`, are left as they are.
        id_column: the column of the ids.
        bundle: a compile cache's bundle (`hybridgen cache export`), at a place that every machine reads; actors import
            it before they start. Needs `trust_bundle=True`, because it is code.
        preprocess, postprocess: of rows, before and after; rows that failed do not go through `postprocess`.
        fields: of `EngineConfig`.

    Raises:
        ConfigError, SamplingError: a value that cannot be.
    """
    check_keywords(fields, EngineConfig.field_names())
    EngineConfig.of(None, fields)
    SamplingParams(**dict(sampling or {}))
    if model is not None and not isinstance(model, str | os.PathLike):
        raise ConfigError(f"model={shown(model)}: actors read the weights themselves; give a path or hub id")
    if bundle is not None and not trust_bundle:
        raise ConfigError(
            f"bundle={shown(os.fspath(bundle))} is code that every actor would run; say trust_bundle=True if you trust "
            "who made it"
        )
    numbers = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
    if len(numbers) != 2 or not all(isinstance(each, int) and each > 0 for each in numbers) or numbers[0] > numbers[1]:
        raise ConfigError(f"concurrency={shown(concurrency)}; give a number from 1, or a pair (least, most)")
    strategy = ray.data.ActorPoolStrategy(
        min_size=numbers[0],
        max_size=numbers[1],
        max_tasks_in_flight_per_actor=max_concurrent_batches,
        max_concurrent_calls_per_actor=max_concurrent_batches,
    )
    order = {
        "model": None if model is None else os.fspath(model),
        "fields": fields,
        "sampling": dict(sampling or {}),
        "seed": seed,
        "id_column": id_column,
        "bundle": None if bundle is None else os.fspath(bundle),
    }

    def process(dataset: ray.data.Dataset) -> ray.data.Dataset:
        if preprocess is not None:
            dataset = dataset.map(preprocess)
        done = dataset.map_batches(
            EngineActor,
            fn_constructor_kwargs=order,
            batch_size=batch_size,
            batch_format="numpy",
            compute=strategy,
            num_gpus=num_gpus,
        )
        if postprocess is not None:
            done = done.map(lambda row: row if row[ERROR] else postprocess(row))
        return done

    return process


class EngineActor:
    """What each actor of the pool runs: one engine, which several batches share."""

    def __init__(
        self,
        model: str | None,
        fields: dict[str, Any],
        sampling: dict[str, Any],
        seed: int | None,
        id_column: str,
        bundle: str | None,
    ) -> None:
        """See `build_processor`."""
        self._sampling = SamplingParams(**sampling)
        self._seed, self._id_column = seed, id_column
        if bundle is not None:
            _import(bundle, fields.get("compile_cache", True))
        self._engine = Engine.load(model, **{"progress": False, **fields})

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """A batch, as columns, with what was generated for its rows."""
        count = len(next(iter(batch.values()), ()))
        rows = [{name: _plain(column[place]) for name, column in batch.items()} for place in range(count)]
        failed: dict[int, HybridgenError] = {}
        prompts: dict[int, tuple[Any, SamplingParams]] = {}
        for place, row in enumerate(rows):
            try:
                prompts[place] = self._request(row)
            except HybridgenError as error:
                failed[place] = error
        start = time.perf_counter()
        try:
            done: list[Completion] = await self._engine.agenerate(
                [prompt for prompt, _ in prompts.values()], [params for _, params in prompts.values()], errors="return"
            )
        except EngineError:
            self._end()
        if self._engine.closed:
            self._end()
        seconds = time.perf_counter() - start
        results = dict(zip(prompts, done, strict=True))
        told = [_result(results.get(place), failed.get(place), seconds) for place in range(count)]
        yield {**batch, **{name: _column([each[name] for each in told]) for name in (*_OUT, ERROR)}}

    def _request(self, row: Row) -> tuple[Any, SamplingParams]:
        """A row's prompt, and how it is sampled.

        Raises:
            HybridgenError: it has none, or a field is wrong.
        """
        prompt = row.get("messages") if row.get("messages") is not None else row.get("prompt")
        if prompt is None:
            raise ConfigError("the row has neither prompt nor messages")
        if row.get("messages") is not None:
            prompt = {"messages": prompt}
        own = {name: value for name, value in (row.get("sampling_params") or {}).items() if value is not None}
        # A column of integers with gaps comes as floats.
        own = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in own.items()}
        check_keywords(own, frozenset(SamplingParams.field_names()))
        params = replace(self._sampling, **own)
        if params.n != 1:
            raise SamplingError(f"n={params.n}: a row has one completion; repeat the row instead")
        if "seed" not in own and row.get(self._id_column) is not None:
            params = replace(params, seed=row_seed(self._seed, row[self._id_column]))
        return prompt, params

    @staticmethod
    def _end() -> None:
        """The engine is broken: end the process, so that Ray makes another. An exception would be tried here again."""
        os._exit(1)


def _import(bundle: str, cache: Any) -> None:
    store, problems = Store.find(cache)
    if store is None:
        raise CacheError(f"there is no compile cache for the bundle: {'; '.join(problems)}")
    import_bundle(store, Path(bundle), trust=True)


def _result(completion: Completion | None, error: BaseException | None, seconds: float) -> dict[str, Any]:
    error = error if completion is None else completion.error
    if completion is None or error is not None:
        return {**_OUT, ERROR: described(error) if error is not None else ""}
    return {
        "generated_text": completion.text,
        "generated_tokens": list(completion.token_ids),
        "num_input_tokens": len(completion.prompt_token_ids),
        "num_generated_tokens": len(completion.token_ids),
        "finish_reason": str(completion.finish_reason),
        "time_taken_llm": seconds,
        ERROR: "",
    }


def _column(values: list[Any]) -> Any:
    """A column of lists of any length; of other values as Ray takes it."""
    import numpy as np

    if not any(isinstance(value, list | tuple) for value in values):
        return np.array(values)
    column = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        column[place] = np.array(value, dtype=np.int64)
    return column


def _plain(value: Any) -> Any:
    """A value as numpy has it, as Python has it: arrays as lists, numbers of its own as numbers, and nothing where a
    column has a gap, which is NaN there."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    value = _plain(value.tolist()) if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and value != value else value
