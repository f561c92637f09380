"""A live module's own `generate` and `generate_batch`, served by an engine: for training loops and libraries that call
them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import compress
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridgen.arguments import check_keywords
from hybridgen.config import EngineConfig
from hybridgen.core import Completion
from hybridgen.engine import Engine
from hybridgen.errors import ConfigError, EngineError, shown
from hybridgen.loading.files import eos_ids, not_applied
from hybridgen.loading.wrappers import unwrapped
from hybridgen.params import SamplingParams
from hybridgen.sampling.resolve import resolve

_TAKEN = ("generate", "generate_batch")
_UNUSED = frozenset({"attention_mask", "use_model_defaults", "synced_gpus"})
"""What `generate` is given that is no field of a GenerationConfig, and is understood."""
_WHOLE = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


_SAME = (
    "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "sequence_bias", "begin_suppress_tokens", "stop", "stop_token_ids",
)  # fmt: skip
"""Fields that mean the same before and after they are resolved."""


class Attached:
    """An engine behind a live module, until `detach()`. Use it as a context manager, or call that."""

    def __init__(self, model: PreTrainedModel, config: EngineConfig, tokenizer: Any = None) -> None:
        """See `attach()`."""
        model = unwrapped(model)
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(f"attach() takes a live PreTrainedModel, not {shown(model)}; load one first")
        taken = [name for name in _TAKEN if name in vars(model)]
        if taken:
            raise EngineError(f"{taken[0]} of this {type(model).__name__} was replaced already; detach() that first")
        self.model = model
        own = str(model.dtype).removeprefix("torch.")
        self._cast: PreTrainedModel | None = None
        if config.dtype not in ("auto", own):
            self._cast = copy.deepcopy(model).to(getattr(torch, config.dtype)).eval().requires_grad_(False)
            config = replace(config, dtype="auto")
        self.engine = Engine.load(model if self._cast is None else self._cast, config, tokenizer=tokenizer)
        """What generates."""
        self._originals: dict[str, Callable[..., Any]] = {name: getattr(model, name) for name in _TAKEN}
        for name in _TAKEN:
            vars(model)[name] = getattr(self, f"_{name}")

    def weights_changed(self) -> None:
        """The weights have other values now. Every call looks for itself; this is for a count in results
        (`Completion.weights_version`)."""
        self._refresh()
        self.engine.weights_changed()

    def _refresh(self) -> None:
        """Cast the weights anew, where the engine has another dtype: one pass over them."""
        if self._cast is None:
            return
        with torch.no_grad():
            pairs = zip(self._cast.parameters(), self.model.parameters(), strict=True)
            to, of = map(list, zip(*pairs, strict=True))
            torch._foreach_copy_(to, of)
            for buffer, other in zip(self._cast.buffers(), self.model.buffers(), strict=True):
                buffer.copy_(other)

    def detach(self) -> None:
        """Give the module its methods back and close the engine. Detaching twice is fine."""
        for name in _TAKEN:
            vars(self.model).pop(name, None)
        self.engine.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _generate(self, inputs: Tensor | None = None, generation_config: Any = None, **given: Any) -> Any:
        """`model.generate`."""
        ids = given.pop("input_ids", None) if inputs is None else inputs
        mask = given.get("attention_mask")
        why, params = self._understood(ids, generation_config, given)
        if params is None:
            self.engine.fall_back(f"model.generate ran as transformers': {why}")
            return self._originals["generate"](ids, generation_config=generation_config, **given)
        prompts = ids.tolist()
        if mask is not None:
            kept = mask.bool().tolist()
            prompts = [list(compress(row, its)) for row, its in zip(prompts, kept, strict=True)]
        completions = self._run(prompts, params)
        pad = self._padding(generation_config, given)
        rows = [choice.token_ids for completion in completions for choice in completion.choices]
        longest = max(map(len, rows))
        tails = torch.from_numpy(np.array([[*row, *[pad] * (longest - len(row))] for row in rows], dtype=np.int64))
        return torch.cat((ids.repeat_interleave(params.n, 0), tails.to(ids.device)), dim=1)

    def _generate_batch(self, inputs: list[list[int]], generation_config: Any = None, **given: Any) -> Any:
        """`model.generate_batch`: continuous batching of transformers, whose result it has."""
        from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

        ours = {"continuous_batching_config", "progress_bar", "warmup", "persistent_manager"}
        rest = {name: value for name, value in given.items() if name not in ours}
        width = max(map(len, inputs), default=0)
        if not inputs:
            return {}
        why, params = self._understood(torch.zeros(1, width, dtype=torch.long), generation_config, rest)
        if params is None:
            self.engine.fall_back(f"model.generate_batch ran as transformers': {why}")
            return self._originals["generate_batch"](inputs, generation_config=generation_config, **given)
        outputs = {}
        choices = [choice for out in self._run(inputs, replace(params, logprobs=0)) for choice in out.choices]
        for number, choice in enumerate(choices):
            name = f"req_{number}"
            outputs[name] = GenerationOutput(
                request_id=name,
                prompt_ids=list(choice.prompt_token_ids),
                generated_tokens=list(choice.token_ids),
                logprobs=[entry.logprob for entry in choice.logprobs or ()],
                status=RequestStatus.FINISHED,
            )
        return outputs

    def _run(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        self._refresh()
        # torch.manual_seed() makes the draws the same again, as it does in transformers.
        seeds = torch.randint(2**62, (len(prompts),), device="cpu").tolist()
        completions: list[Completion] = self.engine.generate(prompts, [replace(params, seed=seed) for seed in seeds])
        for completion in completions:
            for choice in completion.choices:
                if choice.error is not None:
                    raise choice.error
        return completions

    def _understood(self, ids: Any, generation_config: Any, given: dict[str, Any]) -> tuple[str, SamplingParams | None]:
        """What a call asks for; else why it is left to transformers."""
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
            return "it has no input_ids [rows, tokens]", None
        config, rest = _prepared(self.model, generation_config, given)
        unknown = sorted(name for name, value in rest.items() if name not in _UNUSED and value is not None)
        if unknown:
            return f"it has {unknown[0]}=", None
        left = [name for name in not_applied(config) if name != "num_return_sequences"]
        left += [name for name in (*_WHOLE, "prompt_lookup_num_tokens", "stop_strings") if getattr(config, name, None)]
        if left:
            return f"it asks for {left[0]}", None
        new = config.max_new_tokens
        if new is None:
            asked = (generation_config, self.model.generation_config)
            has_length = "max_length" in given or any(getattr(each, "max_length", None) for each in asked)
            new = config.max_length - ids.shape[1] if has_length else config.max_length
        if new < 1:
            return "its max_length leaves no room", None
        ends = eos_ids(config, self.model.config)
        try:
            found = resolve(SamplingParams(max_new_tokens=new), config, ends, self._vocab, ids.shape[1])
            # All of it is said, so that nothing is left to the model's own generation_config.
            return "", SamplingParams(
                max_new_tokens=new,
                n=config.num_return_sequences or 1,
                logit_bias=dict(found.logit_bias),  # bans by id are in it
                suppress_tokens=[],
                bad_words_ids=[],
                forced_bos_token_id=config.forced_bos_token_id if config.forced_bos_token_id is not None else [],
                forced_eos_token_id=config.forced_eos_token_id if config.forced_eos_token_id is not None else [],
                ignore_eos=True,  # the ends are among the stop ids
                **{name: getattr(found, name) for name in _SAME},
            )
        except ValueError as error:
            return str(error), None

    @property
    def _vocab(self) -> int:
        return self.engine.checkpoint.vocab_size

    def _padding(self, generation_config: Any, given: dict[str, Any]) -> int:
        """What fills rows that end before the longest."""
        config, _ = _prepared(self.model, generation_config, given)
        ends = eos_ids(config, self.model.config)
        pad = config.pad_token_id
        return int(pad if pad is not None else ends[0] if ends else 0)


def _prepared(model: Any, generation_config: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The generation config of a call as transformers makes it, and what is left of its keywords."""
    config, rest = model._prepare_generation_config(generation_config, **given)
    return config, rest


def attach(model: Any, config: EngineConfig | None = None, *, tokenizer: Any = None, **fields: Any) -> Attached:
    """Serve a live module's own `generate` and `generate_batch` by an engine, until `detach()`.

    The module stays its owner's: it can be trained, hooked and saved meanwhile, and each call sees its weights as they
    are. They are shared, unless `dtype=` names another one: then the engine has a copy that each call casts anew.
    A call that asks for what is not there (beams, an assistant, processors, returned scores) runs as before, counted
    with its reason in `engine.stats().fallbacks` and warned of once.

    Args:
        model: a live `PreTrainedModel`, or a PEFT model around one.
        tokenizer: for calls of `engine.generate` with text.
        config: how to run it; `fields` set single fields of it.

    Raises:
        ConfigError, UnsupportedModelError, EngineError: see `Engine.load`; the methods were replaced already.
    """
    check_keywords(fields, EngineConfig.field_names())
    return Attached(model, EngineConfig.of(config, fields), tokenizer)
