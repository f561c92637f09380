"""Hidden states on request: the requests, and what is made of their parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hybridgen.arguments import SCORES
from hybridgen.engine.requests import Request, check_fits
from hybridgen.errors import ConfigError, shown
from hybridgen.execution.plan import Hidden
from hybridgen.loading import Checkpoint
from hybridgen.sampling.resolve import resolve
from hybridgen.text.prompts import encode_prompt

POOLS = (None, "mean", "last")


def wanted(layers: int | Iterable[int], pool: Any, count: int) -> Hidden:
    """What a call asks for, checked.

    Args:
        count: decoder layers of the model.

    Raises:
        ConfigError: a layer that the model has not, or another way to pool.
    """
    if pool not in POOLS:
        raise ConfigError(f"pool={shown(pool)}; give 'mean', 'last', or None for every token")
    listed = [layers] if isinstance(layers, int) else layers
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Iterable):
        raise ConfigError(f"layers={shown(layers)}; give an integer or a list of them")
    found = []
    for layer in listed:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count - 1 <= layer <= count:
            raise ConfigError(
                f"layers has {shown(layer)}; give integers from 0 (what goes into the first layer) to {count} (what "
                "comes behind the last norm), or from the end with -1"
            )
        found.append(layer % (count + 1))
    if not found:
        raise ConfigError("layers is empty; give at least one")
    return Hidden(tuple(found), pool)


def hidden_requests(
    prompts: list[Any], hidden: Hidden, checkpoint: Checkpoint, max_context: int, cache_tokens: int
) -> list[Request]:
    """A request for each prompt, which generates nothing.

    Raises:
        PromptError, TokenizerError: see `encode_prompt`; a prompt is too long.
    """
    vocab = checkpoint.vocab_size
    sampling = resolve(SCORES, checkpoint.generation_config, (), vocab)
    requests = []
    for index, prompt in enumerate(prompts):
        ids = encode_prompt(prompt, index, **checkpoint.encoding)
        check_fits(index, len(ids), 0, max_context, cache_tokens, fed=len(ids))
        requests.append(Request(ids, sampling, index, hidden=hidden))
    return requests


def joined(request: Request) -> Tensor:
    """The states of a request: [layers, tokens, hidden], or [layers, hidden] if they are pooled.

    Raises:
        HybridgenError: it failed.
    """
    completion, pool = request.completion, None if request.hidden is None else request.hidden.pool
    if completion is not None and completion.error is not None:
        raise completion.error
    parts = request.output.states
    if pool == "last":
        return parts[-1][:, 0]
    if pool == "mean":
        return torch.stack(parts).sum(0)[:, 0] / len(request.prompt_ids)
    return torch.cat(parts, dim=1)
