"""Rollouts of TRL's trainers on an engine that shares the trainer's weights: the extra `trl`."""

from __future__ import annotations

from typing import Any

import torch

from hybridgen.arguments import check_keywords
from hybridgen.config import EngineConfig
from hybridgen.engine import Engine
from hybridgen.params import SamplingParams

_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Rollout:
    """A `rollout_func` of `GRPOTrainer`. The engine is loaded by the first call and lives until `close()`."""

    def __init__(self, config: EngineConfig, *, release: bool) -> None:
        """See `rollout()`."""
        self._config = config
        self._release = release
        self.engine: Engine | None = None
        """What generates; None before the first call."""

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """One completion for each prompt. A trainer repeats a prompt for each of its generations; they share what they
        begin with.

        Args:
            prompts: texts, or lists of chat messages.
            trainer: whose model generates, with what its `args` say of sampling.

        Returns:
            `prompt_ids`, `completion_ids` and `logprobs` (of the distribution that was drawn from): a list for each.

        Raises:
            RequestError: a prompt failed while it ran.
        """
        if self.engine is None:
            model = trainer.accelerator.unwrap_model(trainer.model)
            self.engine = Engine.load(model, self._config, tokenizer=trainer.processing_class)
        else:
            self.engine.resume()
            self.engine.weights_changed()
        given = {name: getattr(trainer.args, name, None) for name in _FIELDS}
        fields = {name: value for name, value in given.items() if value is not None}
        seeds = torch.randint(2**62, (len(prompts),), device="cpu").tolist()
        new = trainer.args.max_completion_length
        params = [
            SamplingParams(max_new_tokens=new, seed=seed, logprobs=0, logprobs_of="sampled", **fields) for seed in seeds
        ]
        outs = self.engine.generate(list(prompts), params)
        for out in outs:
            if out.error is not None:
                raise out.error
        if self._release:
            self.engine.release_cache()
        return {
            "prompt_ids": [list(out.prompt_token_ids) for out in outs],
            "completion_ids": [list(out.token_ids) for out in outs],
            "logprobs": [[entry.logprob for entry in out.logprobs] for out in outs],
        }

    def close(self) -> None:
        """Close the engine. The trainer's model is as it was."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


def rollout(config: EngineConfig | None = None, *, release: bool = True, **fields: Any) -> Rollout:
    """What `GRPOTrainer(rollout_func=...)` takes: rollouts by an engine on the trainer's own weights.

    Args:
        config: how to run it; `fields` set single fields of it.
        release: give the KV cache's memory back between rollouts.

    Raises:
        ConfigError: a field is unknown, or a value out of its range.
    """
    check_keywords(fields, EngineConfig.field_names())
    return Rollout(EngineConfig.of(config, fields), release=release)
