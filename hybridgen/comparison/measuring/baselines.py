"""Other engines in the same run, each behind an adapter of a few lines.

They run on the weights of the model that is compared: the Hugging Face ones on a module tree of their own that shares
the parameters, vLLM on the checkpoint that the model was read from. gpt-fast has no adapter: it is a set of scripts
without a package, on checkpoints of a format of its own.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import time
from typing import Any

import torch

from hybridgen.comparison.data.config import CompareConfig
from hybridgen.comparison.data.results import BASELINE
from hybridgen.comparison.measuring.subjects import Output
from hybridgen.errors import EngineError
from hybridgen.models.mixers import cache_keyword

_CPU_BLOCKS = 64
"""Pages of `generate_batch`'s cache on a CPU, of 256 positions each."""

_NO_TOKEN = 2**31 - 1
"""An id that no vocabulary has, so that nothing ends a text. transformers warns of a negative one at every call."""


class Unavailable(EngineError):
    """A baseline that this machine or this model does not have; the message says why."""


class _Clock:
    """A stopping criterion that never stops, and notes when the host could read each token.

    Reading waits for the device, as whoever streams tokens does. (`generate` itself waits in every step too.)
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        input_ids[:, -1].tolist()
        self.times.append(time.perf_counter() - self.start)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class HuggingFaceGenerate:
    """`model.generate` with its default, dynamic cache, or with a static one, which it compiles for on CUDA."""

    kind = BASELINE

    def __init__(self, name: str, model: Any, config: CompareConfig, *, static: bool) -> None:
        self.name = name
        self._model = model
        self._config = config
        self._static = static
        self._caches: dict[int, Any] = {}

    def call(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Generate for prompts of one length."""
        from transformers import StoppingCriteriaList

        clock = _Clock()
        ids = torch.tensor(prompts, device=self._model.device)
        options: dict[str, Any] = {"do_sample": self._config.temperature > 0, "repetition_penalty": 1.0}
        if options["do_sample"]:
            options |= {"temperature": self._config.temperature, "top_k": 0, "top_p": 1.0}
        if self._static:
            options[cache_keyword(self._model)] = self._cache(len(prompts))
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            eos_token_id=_NO_TOKEN,  # ignored, not forbidden: a minimum length would add processors to every step
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),  # type: ignore[list-item]
            **options,
        )
        tokens = output[:, ids.shape[1] :].tolist()
        return Output(tokens, None, [clock.times] * len(prompts))

    def _cache(self, batch: int) -> Any:
        """One static cache per batch size for all prompt lengths: with its addresses, compiled code stays valid."""
        from transformers import StaticCache

        if batch not in self._caches:
            longest = max(self._config.prompt_lengths) + self._config.new_tokens
            self._caches[batch] = StaticCache(config=self._model.config, max_cache_len=longest)
        self._caches[batch].reset()
        return self._caches[batch]

    def settle(self) -> None:
        """Nothing is left to do."""

    def stats(self) -> None:
        """There are none."""

    def close(self) -> None:
        """Free the caches."""
        self._caches.clear()


class HuggingFaceBatch:
    """`model.generate_batch`: continuous batching on a paged cache."""

    kind = BASELINE

    def __init__(self, name: str, model: Any, config: CompareConfig) -> None:
        self.name = name
        self._model = model
        model.set_attn_implementation(paged_attention())
        self._logger = logging.getLogger("ContinuousBatchingLogger")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)  # it warns in every call that the manager is kept
        # The manager that is kept sizes itself by its first call.
        self.call([[3] * max(config.prompt_lengths)] * max(config.batch_sizes), config.new_tokens)

    def call(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Generate; the tokens' times are those of its own clock.

        Raises:
            EngineError: a request is missing from the results, or failed.
        """
        from transformers import GenerationConfig

        found = self._model.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=new_tokens, eos_token_id=_NO_TOKEN, pad_token_id=0
            ),
            continuous_batching_config=batching_config(),
            record_timestamps=True,
            persistent_manager=True,
        )
        results = list(found.values())
        failed = [result.error for result in results if result.error is not None]
        if failed or len(results) != len(prompts):
            raise EngineError(
                f"generate_batch returned {len(results)} of {len(prompts)} requests; first error: "
                f"{failed[0] if failed else 'none'}"
            )
        times = [[moment - result.created_time for moment in result.timestamps or ()] for result in results]
        return Output([list(result.generated_tokens) for result in results], None, times)

    def settle(self) -> None:
        """Nothing is left to do."""

    def stats(self) -> None:
        """There are none."""

    def close(self) -> None:
        """Free its cache."""
        self._logger.setLevel(self._level)
        self._model.destroy_cached_continuous_batching_manager()


class Vllm:
    """vLLM's offline `LLM`, on the checkpoint's files. It says nothing of single tokens' times."""

    kind = BASELINE

    def __init__(self, name: str, path: str, config: CompareConfig, dtype: str) -> None:
        import vllm

        self.name = name
        self._vllm = vllm
        self._temperature = config.temperature
        free, total = torch.cuda.mem_get_info()
        self._llm = vllm.LLM(
            model=path,
            dtype=dtype,
            max_model_len=max(config.prompt_lengths) + config.new_tokens,
            max_num_seqs=max(config.batch_sizes),
            gpu_memory_utilization=0.8 * free / total,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )

    def call(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Generate."""
        params = self._vllm.SamplingParams(
            temperature=self._temperature, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        results = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return Output([list(result.outputs[0].token_ids) for result in results], None, [])

    def settle(self) -> None:
        """Nothing is left to do."""

    def stats(self) -> None:
        """There are none."""

    def close(self) -> None:
        """Let go of the engine."""
        del self._llm


def build_baseline(name: str, model: Any, path: str | None, config: CompareConfig) -> Any:
    """A baseline's adapter.

    Args:
        model: a Hugging Face module that nobody else uses.
        path: where the checkpoint is, if it was read from files.

    Raises:
        Unavailable: it cannot run here.
    """
    if name in ("hf-dynamic", "hf-static"):
        return HuggingFaceGenerate(name, model, config, static=name == "hf-static")
    if name == "hf-batch":
        if config.temperature > 0:
            raise Unavailable("hf-batch is measured greedy only; set temperature=0")
        return HuggingFaceBatch(name, model, config)
    if importlib.util.find_spec("vllm") is None:
        raise Unavailable("vllm cannot be imported; install it beside hybridgen to compare with it")
    if path is None:
        raise Unavailable("vllm reads a checkpoint's files, and the model was given in memory; give its directory")
    return Vllm(name, path, config, str(model.dtype).removeprefix("torch."))


def paged_attention() -> str:
    """What `generate_batch` attends with when nothing is installed beside torch."""
    return "sdpa" if _is_new_batching() else "paged|sdpa"


def batching_config(**options: Any) -> Any:
    """`ContinuousBatchingConfig` that stays with that attention; transformers 5.17 and 5.23 have different fields."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    if not torch.cuda.is_available():
        options.setdefault("num_blocks", _CPU_BLOCKS)  # else it takes most of the machine's memory
    if "allow_block_sharing" in inspect.signature(ContinuousBatchingConfig).parameters:
        options.setdefault("allow_block_sharing", False)  # prompts come again in every call; nobody else may reuse them
    if _is_new_batching():
        options["auto_switch_to_flash"] = False
    return ContinuousBatchingConfig(**options)


def _is_new_batching() -> bool:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return "auto_switch_to_flash" in inspect.signature(ContinuousBatchingConfig).parameters
