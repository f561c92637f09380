"""The subjects of a comparison: engines and baselines on one copy of the weights."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from hybridgen.comparison.data.config import REFERENCE, CompareConfig
from hybridgen.comparison.data.results import MODE, NOT_MEASURED, SubjectResult
from hybridgen.comparison.data.schedule import kind_of
from hybridgen.comparison.measuring.baselines import Unavailable, build_baseline
from hybridgen.comparison.measuring.measure import release, status_of
from hybridgen.comparison.measuring.subjects import EngineSubject, Subject, build, compile_something
from hybridgen.device.memory import taken
from hybridgen.errors import described
from hybridgen.loading import Checkpoint, LoadedModel
from hybridgen.models.projections import fuse_projections
from hybridgen.models.twin import twin
from hybridgen.telemetry.traffic import Traffic

logger = logging.getLogger(__name__)


@dataclass
class Built:
    """What building a subject brought."""

    result: SubjectResult
    subject: Subject | None = None
    """None where it could not be built; the result says why."""
    growth: int | None = None
    """Bytes of memory that it took (`device.memory.taken`); None where the system does not say."""


class Builder:
    """Builds subjects around a model whose weights are loaded once."""

    def __init__(
        self,
        config: CompareConfig,
        checkpoint: Checkpoint,
        loaded: LoadedModel,
        *,
        limit: int,
        folder: str,
    ) -> None:
        """
        Args:
            loaded: the module with the weights.
            limit: the model's longest context.
            folder: for what is compiled.
        """
        self.traffic: Traffic | None = None
        """What a decode step reads, as the newest engine counted it."""
        model = loaded.model
        self._config, self._checkpoint, self._model, self._loaded = config, checkpoint, model, loaded
        self._limit, self._folder = limit, folder
        self._device = checkpoint.device
        self._owned = checkpoint.module is None
        # Weights are joined once: a twin of the template shares the joined ones too. A live module's stay apart.
        self._template = twin(model)
        self._fuse_seconds = 0.0
        if config.engine.get("fuse_projections", True) and self._owned:
            start = time.perf_counter()
            fuse_projections(self._template)
            self._fuse_seconds = time.perf_counter() - start

    def _share(self, module: Any) -> LoadedModel:
        """A twin as an engine gets it. A live module's owner may change it, so each call looks at it first, as it does
        outside of a comparison."""
        return LoadedModel(module, 0.0, owned=self._owned, notes=self._loaded.notes, kv_scales=self._loaded.kv_scales)

    def pay_once(self) -> float:
        """Spend what a process spends once, so that it is in no row: Inductor's imports, kernels of ours.

        Returns:
            The seconds that it took.
        """
        config = self._config
        start = time.perf_counter()
        inductor = config.engine.get("compile_backend", "inductor") == "inductor"
        if config.fresh_compile and inductor and {"jit", "hybrid"} & set(config.modes):
            compile_something(self._device)
        if self._device.type == "cuda":
            engine_config = config.engine_config({"mode": REFERENCE}, self._limit)
            try:
                build(REFERENCE, engine_config, self._share(twin(self._template)), config, None).close()
            except Exception as error:  # the row of mode eager will say so
                logger.debug("the first engine failed: %s", error)
            release(self._device)
        return time.perf_counter() - start

    def build(self, name: str) -> Built:
        """A subject, or why there is none."""
        result = SubjectResult(name=name, kind=kind_of(name, self._config))
        built = Built(result)
        release(self._device)
        before = taken(self._device)
        try:
            variant = self._config.variants.get(name)
            built.subject = self._baseline(result) if variant is None else self._engine(variant, result)
        except Unavailable as error:
            result.status, result.error = NOT_MEASURED, str(error)
        except Exception as error:  # whatever a model, a compiler or a peer raises: the others are worth having
            result.status, result.error = status_of(error), described(error)
            logger.warning("%s cannot be built: %s", name, result.error)
            logger.debug("a subject failed", exc_info=error)
            error.__traceback__ = None  # its frames hold tensors
        release(self._device)
        if before is not None:
            built.growth = (taken(self._device) or 0) - before
            if self._device.type == "cpu":  # what was released meanwhile is no gain of this subject
                built.growth = max(0, built.growth)
        return built

    def _baseline(self, result: SubjectResult) -> Subject:
        path = str(self._checkpoint.name) if self._checkpoint.source is not None else None
        start = time.perf_counter()
        subject: Subject = build_baseline(result.name, twin(self._model), path, self._config)
        result.startup = {"load weights": self._loaded.seconds, "other": time.perf_counter() - start}
        return subject

    def _engine(self, variant: dict[str, Any], result: SubjectResult) -> EngineSubject:
        config = self._config
        engine_config = config.engine_config(variant, self._limit)
        module = twin(self._template if engine_config.fuse_projections else self._model)
        # A switch is not compared by its start-up: it finds what mode hybrid compiled.
        fresh = config.fresh_compile and result.kind == MODE
        subject = build(result.name, engine_config, self._share(module), config, self._folder if fresh else None)
        self.traffic = subject.engine.traffic
        if subject.engine.mode.compiles:
            result.compile_cache = "empty" if fresh and engine_config.compile_backend == "inductor" else "shared"
        parts = dict(subject.stats().startup)
        other = max(0.0, subject.build_seconds - sum(parts.values()))
        parts |= {"load weights": self._loaded.seconds}
        if self._fuse_seconds and engine_config.fuse_projections:
            parts |= {"fuse projections": self._fuse_seconds}
        result.startup = {**parts, "other": other}
        return subject
