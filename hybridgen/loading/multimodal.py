"""What a multimodal checkpoint says of itself: the class that generates with it, and the tokens that stand for images,
video and sound."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

_MAPPINGS = (
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
)
"""Of transformers; the first is newer than the oldest version that is supported."""
_PLACEHOLDER = re.compile(r"(image|video|audio|speech|media)_(patch_|soft_)?token_(id|index)")
"""Fields of a config with the token that an encoder's output takes the place of."""


def whole_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers for a multimodal config: the one that it names, if there are several. None: none."""
    found: list[Any] = []
    for name in _MAPPINGS:
        mapping = getattr(transformers, name, None)
        try:
            entry = None if mapping is None else mapping[type(config)]
        except KeyError:
            continue
        found += entry if isinstance(entry, (tuple, list)) else [entry]
    # Classes for the text part alone are in the mappings, too.
    fitting = [each for each in found if each is not None and each.config_class is type(config)]
    names = getattr(config, "architectures", None) or ()
    return next((each for each in fitting if each.__name__ in names), fitting[0] if fitting else None)


def placeholders(config: PreTrainedConfig) -> Mapping[int, str]:
    """The tokens that stand for what is no text, with the names of their fields."""
    values = {name: getattr(config, name, None) for name in dir(config) if _PLACEHOLDER.fullmatch(name)}
    # Of two names of one token, the shorter.
    pairs = sorted(values.items(), key=lambda pair: -len(pair[0]))
    return {value: name for name, value in pairs if isinstance(value, int) and not isinstance(value, bool)}
